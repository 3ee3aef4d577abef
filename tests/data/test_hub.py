"""With the datasets package where it is installed, and with a stand-in table where it is not."""

import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError
from PIL import Image

from customized_grpo.data import HubDataset, hub
from customized_grpo.data.importers import import_subjects200k
from customized_grpo.errors import UserError
from customized_grpo.train.evaluation import cluster
from data.test_importers import row


class Table(list):
    column_names = ("key", "text", "photo", "more", "kind")

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    def unique(self, column):
        return list(dict.fromkeys(row[column] for row in self))


@pytest.fixture
def table(monkeypatch):
    picture = Image.new("RGBA", (3, 2), "red")
    rows = Table([
        dict(zip(Table.column_names, ("a", "a dog", picture, [picture, picture], "dog"), strict=True)),
        dict(zip(Table.column_names, ("b", "a cat", row(as_bytes=True)["image"], [], None), strict=True)),
    ])  # fmt: skip
    monkeypatch.setattr(hub, "open_dataset", lambda path, split: rows)
    return rows


def test_columns_become_examples(table):
    dataset = HubDataset("somewhere", prompt="text", references=["photo", "more"], subject="kind", id="key")
    first, second = dataset
    assert (first.id, first.prompt, first.subject, len(first.references)) == ("a", "a dog", "dog", 3)
    assert (second.subject, second.references[0].size) == ("", (22, 12))
    assert first.references[0].mode == "RGB"
    assert HubDataset("somewhere", prompt="text", references="photo")[0:1][0].id == "0"


def test_the_target_is_a_column_and_a_cell_may_be_empty(table):
    first, second = HubDataset("somewhere", prompt="text", references="photo", target="more")
    assert (first.target.mode, first.target.getpixel((0, 0)), second.target) == ("RGB", (255, 0, 0), None)
    assert HubDataset("somewhere", prompt="text", references="photo")[0].target is None
    with pytest.raises(UserError, match="has no column 'mor'"):
        HubDataset("somewhere", prompt="text", references="photo", target="mor")


def test_the_kind_of_prompt_is_a_column(table, monkeypatch):
    first, second = HubDataset("somewhere", prompt="text", references="photo", kind="kind")
    assert (first.kind, second.kind) == ("dog", "")
    assert HubDataset("somewhere", prompt="text", references="photo", kind="kind").all_kinds() == ["dog", ""]
    assert HubDataset("somewhere", prompt="text", references="photo").all_kinds() == ["", ""]
    assert HubDataset("somewhere", prompt="text", references="photo")[0].kind == ""
    table[0]["kind"] = "k" * 41
    with pytest.raises(UserError, match=r"Row 0 of 'somewhere', column 'kind': 'kkk.*' has 41 characters"):
        HubDataset("somewhere", prompt="text", references="photo", kind="kind")[0]
    with pytest.raises(UserError, match=r"Row 0 of 'somewhere', column 'kind': 'kkk.*' has 41 characters"):
        HubDataset("somewhere", prompt="text", references="photo", kind="kind").all_kinds()
    table += [{"kind": f"k{n}"} for n in range(20)]
    with pytest.raises(UserError, match=r"'somewhere' has 21 kinds of prompt"):
        HubDataset("somewhere", prompt="text", references="photo", kind="kind")


def test_images_are_read_as_those_of_files_are(table, tmp_path, monkeypatch):
    deep = Image.fromarray(np.full((2, 3), 153 * 257, np.uint16))
    cut = Image.new("RGBA", (3, 2), (90, 90, 90, 255))
    cut.putpixel((0, 0), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[274] = 6
    cut.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    cells = [deep, cut, {"bytes": None, "path": str(tmp_path / "turned.jpg")}, str(tmp_path / "turned.jpg"),
             (tmp_path / "turned.jpg").read_bytes()]  # fmt: skip
    rows = Table([{"key": 1, "text": "a dog", "photo": cell, "more": "rex", "kind": "dog"} for cell in cells])
    monkeypatch.setattr(hub, "open_dataset", lambda path, split: rows)
    examples = list(HubDataset("somewhere", prompt="text", references="photo", subject="kind"))
    assert examples[0].references[0].getpixel((0, 0)) == (153, 153, 153)
    assert examples[1].references[0].getpixel((0, 0)) == (255, 255, 255)
    assert examples[1].masks[0].getpixel((0, 0)) == 0
    assert [example.references[0].size for example in examples[2:]] == [(2, 3)] * 3
    assert len({cluster(example) for example in examples}) == 3, "the last three are one photo, and one subject"
    named = HubDataset("somewhere", prompt="text", references="photo", subject_id="more")
    assert {cluster(example) for example in named} == {"rex"}
    assert len(list(named.outlines())) == 5


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ({"photo": {"bytes": b"no", "path": None}}, r"Row 0 of 'somewhere', column 'photo' cannot be read \(unknown"),
        ({"photo": {"bytes": None, "path": "/absent.png"}}, "column 'photo' cannot be read .FileNotFoundError"),
        ({"photo": {"bytes": None, "path": None}}, "column 'photo' is NoneType; expected an image"),
        ({"photo": 7}, "column 'photo' is int; expected an image"),
        ({"photo": None}, "Row 0 of 'somewhere' has no image in photo"),
        ({"text": None}, "Row 0 of 'somewhere': column 'text' has no prompt"),
        ({"text": ["a", "b"]}, "column 'text' has no prompt"),
    ],
)
def test_a_row_that_is_no_example_is_named(cells, sentence, table, monkeypatch):
    row = {"key": 1, "text": "a dog", "photo": Image.new("RGB", (3, 2)), "more": [], "kind": "dog"} | cells
    monkeypatch.setattr(hub, "open_dataset", lambda path, split: Table([row]))
    with pytest.raises(UserError, match=sentence):
        HubDataset("somewhere", prompt="text", references="photo")[0]


def test_what_the_package_raises_for_a_row_is_the_fault_of_the_row(monkeypatch):
    class Broken(Table):
        def __getitem__(self, index):
            raise RuntimeError("the decoder\nfailed")

    monkeypatch.setattr(hub, "open_dataset", lambda path, split: Broken([0]))
    with pytest.raises(UserError, match=r"Row 0 of 'x' cannot be read \(RuntimeError: the decoder failed\)"):
        HubDataset("x", prompt="text", references="photo")[0]


def test_a_column_that_is_not_there(table):
    with pytest.raises(UserError, match=r"has no column 'txt', only key, text.*Did you mean 'text'"):
        HubDataset("somewhere", prompt="txt", references="photo")


def test_without_datasets_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -e '.*\[data\]'"):
        import_subjects200k(tmp_path, tmp_path / "data.jsonl")


def test_a_gated_data_set_is_one_sentence_with_what_to_do(monkeypatch):
    def load(source, split):
        raise DatasetNotFoundError(f"Dataset '{source}' is gated.") from GatedRepoError("403", response=Mock())

    class DatasetNotFoundError(FileNotFoundError):
        pass

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    with pytest.raises(UserError, match=r"accept its licence at https://huggingface.co/datasets/owner/name, then log"):
        hub.open_dataset("owner/name")


def test_reading_parquet(tmp_path):
    pytest.importorskip("datasets", reason="the datasets package is optional")
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([row(as_bytes=True) | {"prompt": "a mug"}] * 2)
    parquet.write_table(table, tmp_path / "part-0.parquet")
    assert import_subjects200k(tmp_path, tmp_path / "data.jsonl").examples == 2
    dataset = HubDataset(tmp_path / "part-0.parquet")
    assert (len(dataset), dataset[1].prompt, dataset[1].references[0].size) == (2, "a mug", (22, 12))
    dataset.rows.save_to_disk(tmp_path / "saved")
    assert len(HubDataset(tmp_path / "saved")) == 2
    with pytest.raises(UserError, match="Could not read split 'test'"):
        HubDataset(tmp_path / "absent", split="test")
