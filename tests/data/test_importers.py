import io
import json
from pathlib import Path

import pytest
from PIL import Image

from customized_grpo.data import JsonlDataset
from customized_grpo.data.importers import (
    import_dreambench,
    import_folder,
    import_subjects200k,
    import_syncd,
)
from customized_grpo.errors import UserError

DREAMBENCH = Path(__file__).parents[3] / "shared" / "dreambench"


def save(path, colour="red", size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def subjects(tmp_path):
    root = tmp_path / "subjects"
    for name in ("dog2/b.jpg", "dog2/a.png", "red_teapot/0.webp"):
        save(root / name)
    Image.new("L", (6, 4), 255).save(root / "dog2" / "a_mask.png")
    (root / "red_teapot" / "class.txt").write_text("teapot\n")
    (root / "empty").mkdir()
    (tmp_path / "prompts.txt").write_text("# scenes\na {subject} in the snow\n\na picture of rain\n")
    return root


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- folders


def test_import_folder(subjects, tmp_path):
    imported = import_folder(subjects, tmp_path / "out" / "data.jsonl", tmp_path / "prompts.txt")
    assert imported[1:] == (4, 2, 0)
    first, _, third, _ = lines(imported.manifest)
    assert first == {
        "id": "dog2-00", "prompt": "a dog in the snow", "references": ["../subjects/dog2/a.png"],
        "subject": "dog", "masks": ["../subjects/dog2/a_mask.png"],
    }  # fmt: skip
    assert third["prompt"] == "a teapot in the snow"
    dataset = JsonlDataset(imported.manifest)
    assert [example.references[0].size for example in dataset] == [(6, 4)] * 4
    assert dataset[0].masks[0] is not None


@pytest.mark.parametrize(("references", "counts"), [("first", [1, 1]), ("all", [2, 1]), ("each", [1, 1, 1])])
def test_which_pictures_are_references(references, counts, subjects, tmp_path):
    imported = import_folder(subjects, tmp_path / "data.jsonl", ["a {subject}"], references=references)
    records = lines(imported.manifest)
    assert [len(record["references"]) for record in records] == counts
    assert len({record["id"] for record in records}) == len(records)
    JsonlDataset(imported.manifest)


def test_nothing_is_overwritten(subjects, tmp_path):
    output = tmp_path / "data.jsonl"
    output.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        import_folder(subjects, output, ["a {subject}"])
    assert output.read_text() == "mine"
    assert not list(tmp_path.glob("*.partial"))


def test_bad_input(subjects, tmp_path):
    output = tmp_path / "data.jsonl"
    (tmp_path / "blank.txt").write_text("# nothing\n")
    for arguments, sentence in (
        ((tmp_path / "absent", output, ["p"]), "There is no folder"),
        ((subjects / "empty", output, ["p"]), "has no subject folder"),
        ((subjects, output, tmp_path / "absent.txt"), "There is no prompt file"),
        ((subjects, output, tmp_path / "blank.txt"), "holds no prompt"),
        ((subjects, tmp_path / "data.json", ["p"]), "does not end in .jsonl"),
    ):
        with pytest.raises(UserError, match=sentence):
            import_folder(*arguments)
    with pytest.raises(UserError, match="must be 'first', 'all' or 'each'"):
        import_folder(subjects, output, ["p"], references="some")
    assert not output.exists()


# ---- DreamBench


@pytest.fixture
def clone(tmp_path):
    """The layout of the real one, with two of its subjects."""
    root = tmp_path / "clone" / "dataset"
    save(root / "backpack_dog" / "00.jpg")
    save(root / "cat2" / "00.jpg")
    (root / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\nbackpack_dog,backpack\ncat2,cat\n\nPrompts\n\nObject Prompts\n\n"
        "prompt_list = [\n'a {0} {1} in the jungle'.format(unique_token, class_token),\n"
        "'a red {0} {1}'.format(unique_token, class_token)\n]\n\nLive Subject Prompts\n\n"
        "prompt_list = [\n'a {0} {1} wearing a red hat'.format(unique_token, class_token)\n]\n"
    )
    return root.parent


def test_import_dreambench(clone, tmp_path):
    for source, name in ((clone, "a"), (clone / "dataset", "b")):
        imported = import_dreambench(source, tmp_path / f"{name}.jsonl")
        assert [(record["id"], record["prompt"], record["subject"]) for record in lines(imported.manifest)] == [
            ("backpack_dog-00", "a backpack in the jungle", "backpack"),
            ("backpack_dog-01", "a red backpack", "backpack"),
            ("cat2-00", "a cat wearing a red hat", "cat"),
        ]


def test_a_clone_that_is_none(clone, tmp_path):
    (clone / "dataset" / "cat2" / "00.jpg").unlink()
    with pytest.raises(UserError, match="has no pictures of cat2"):
        import_dreambench(clone, tmp_path / "data.jsonl")
    with pytest.raises(UserError, match="give a clone of"):
        import_dreambench(tmp_path, tmp_path / "data.jsonl")


@pytest.mark.skipif(not DREAMBENCH.is_dir(), reason="the real DreamBench is not beside the repository")
def test_the_real_dreambench_asks_what_the_published_protocol_asks(tmp_path):
    imported = import_dreambench(DREAMBENCH, tmp_path / "data.jsonl")
    assert imported[1:] == (750, 30, 0)
    protocol = json.loads((DREAMBENCH / "protocol_single.json").read_text())
    theirs = {(Path(entry["image_paths"][0]).parent.name, entry["prompt"]) for entry in protocol}
    ours = {(record.id.rpartition("-")[0], record.prompt) for record in JsonlDataset(imported.manifest).records}
    assert ours == theirs
    each = import_dreambench(DREAMBENCH, tmp_path / "each.jsonl", references="each")
    assert each.examples == 158 * 25


# ---- synthetic pairs


def test_import_syncd(tmp_path):
    save(tmp_path / "images" / "0_ref.jpg")
    save(tmp_path / "images" / "2_ref.jpg")
    entries = [
        {"ref_img": "images/0_ref.jpg", "img": "images/0.jpg", "text": "a dog on sand", "category_description": "dog"},
        {"ref_img": "images/1_ref.jpg", "img": "images/1.jpg", "text": "a cat", "category_description": "cat"},
        {"ref_img": ["images/0_ref.jpg", "images/2_ref.jpg"], "img": "images/2.jpg", "text": "two"},
    ]
    (tmp_path / "syncd.json").write_text(json.dumps(entries))
    (tmp_path / "syncd.jsonl").write_text("\n".join(map(json.dumps, entries)))
    imported = import_syncd(tmp_path / "syncd.json", tmp_path / "a" / "data.jsonl")
    assert (imported.examples, imported.skipped) == (2, 1)
    first, second = JsonlDataset(imported.manifest)
    assert (first.id, first.prompt, first.subject) == ("syncd-000000", "a dog on sand", "dog")
    assert len(second.references) == 2
    again = import_syncd(tmp_path / "syncd.jsonl", tmp_path / "a" / "again.jsonl")
    assert lines(again.manifest) == lines(imported.manifest)
    with pytest.raises(UserError, match=r"None of the 3 references .* set pictures"):
        import_syncd(tmp_path / "syncd.json", tmp_path / "b.jsonl", pictures=tmp_path / "a")
    (tmp_path / "other.json").write_text('[{"image": "x"}]')
    with pytest.raises(UserError, match="entry 0: there is no 'ref_img'"):
        import_syncd(tmp_path / "other.json", tmp_path / "b.jsonl")
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(UserError, match="is not JSON"):
        import_syncd(tmp_path / "broken.json", tmp_path / "b.jsonl")


def pair(margin, side=8):
    """Red on the left, blue on the right, black margins."""
    image = Image.new("RGB", (2 * side + 3 * margin, side + 2 * margin), "black")
    for half, colour in enumerate(("red", "blue")):
        image.paste(Image.new("RGB", (side, side), colour), (margin + half * (side + margin), margin))
    return image


def row(margin=2, grade=5, as_bytes=False):
    image = pair(margin)
    if as_bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = {"bytes": buffer.getvalue(), "path": None}
    grades = {"compositeStructure": 5, "objectConsistency": grade, "imageQuality": 5}
    told = {"item": "mug", "description_0": "a mug, left", "description_1": "a mug, right"}
    return {"image": image, "quality_assessment": grades, "description": told, "collection": "collection_1"}


def test_import_subjects200k(tmp_path):
    rows = [row(), row(grade=3), row(margin=0, as_bytes=True), row() | {"quality_assessment": None}]
    imported = import_subjects200k(rows, tmp_path / "data.jsonl", both_ways=True)
    assert imported[1:] == (4, 2, 2)
    left, right, *_ = dataset = JsonlDataset(imported.manifest)
    assert (left.prompt, right.prompt, left.subject) == ("a mug, right", "a mug, left", "mug")
    for example, colour in zip(dataset, [(255, 0, 0), (0, 0, 255)] * 2, strict=True):
        assert example.references[0].getcolors() == [(64, colour)]
    with pytest.raises(UserError, match="exists already"):
        import_subjects200k(rows, tmp_path / "data.jsonl")
    assert import_subjects200k(rows, tmp_path / "one.jsonl", limit=1).examples == 1
