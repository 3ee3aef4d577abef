"""With the datasets package where it is installed, and with a stand-in table where it is not."""

import sys

import pytest
from PIL import Image

from customized_grpo.data import HubDataset, hub
from customized_grpo.data.importers import import_subjects200k
from customized_grpo.errors import UserError
from data.test_importers import row


class Table(list):
    column_names = ("key", "text", "photo", "more", "kind")


@pytest.fixture
def table(monkeypatch):
    picture = Image.new("RGBA", (3, 2), "red")
    rows = Table([
        dict(zip(Table.column_names, ("a", "a dog", picture, [picture, picture], "dog"), strict=True)),
        dict(zip(Table.column_names, ("b", "a cat", row(as_bytes=True)["image"], [], None), strict=True)),
    ])  # fmt: skip
    monkeypatch.setattr(hub, "open_dataset", lambda path, split: rows)


def test_columns_become_examples(table):
    dataset = HubDataset("somewhere", prompt="text", references=["photo", "more"], subject="kind", id="key")
    first, second = dataset
    assert (first.id, first.prompt, first.subject, len(first.references)) == ("a", "a dog", "dog", 3)
    assert (second.subject, second.references[0].size) == ("", (22, 12))
    assert first.references[0].mode == "RGB"
    assert HubDataset("somewhere", prompt="text", references="photo")[0:1][0].id == "0"


def test_a_column_that_is_not_there(table):
    with pytest.raises(UserError, match=r"has no column 'txt', only key, text.*Did you mean 'text'"):
        HubDataset("somewhere", prompt="txt", references="photo")


def test_without_datasets_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        import_subjects200k(tmp_path, tmp_path / "data.jsonl")


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
