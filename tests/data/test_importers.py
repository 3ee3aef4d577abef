import io
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from customized_grpo.data import JsonlDataset
from customized_grpo.data.check import check_data
from customized_grpo.data.importers import import_dreambench, import_folder, import_subjects200k, import_syncd
from customized_grpo.data.segment import add_masks
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
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# ---- folders


def test_import_folder(subjects, tmp_path):
    imported = import_folder(subjects, tmp_path / "out" / "data.jsonl", tmp_path / "prompts.txt")
    assert imported[1:] == (4, 2, {"subject folder without an image": ["empty"]})
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


def test_everything_left_out_is_counted_and_named(subjects, tmp_path):
    cat = subjects / "cat"
    for name in ("a.JPG", "b.jfif", "c.gif", "d.webp", "e.avif"):
        save(cat / name)
    for name in ("A_mask.PNG", "b_mask.jpg", "masks/C.tif", "z_mask.png", "d_mask.jpg", "d_mask.png"):
        (cat / name).parent.mkdir(exist_ok=True)
        Image.new("L", (6, 4), 255).save(cat / name)
    for name in ("._a.JPG", ".DS_Store", "Thumbs.db", "f.HEIC", "notes.txt", "masks/.DS_Store"):
        (cat / name).write_bytes(b"")
    (cat / "CLASS.txt").write_bytes("chaton d'été\r\n".encode("utf-16"))
    save(cat / "2024" / "g.jpg")
    save(subjects / "__MACOSX" / "cat" / "._a.JPG")
    (subjects / "phone").mkdir()
    (subjects / "phone" / "IMG_1.heic").write_bytes(b"")
    save(subjects / "loose.jpg")
    (subjects / "p.txt").write_text("a {subject}\u2028here")
    imported = import_folder(subjects, tmp_path / "data.jsonl", subjects / "p.txt", references="all")
    assert imported.left_out == {
        "hidden, or a system's file": [
            "__MACOSX", "cat/.DS_Store", "cat/._a.JPG", "cat/Thumbs.db", "cat/masks/.DS_Store",
        ],
        "folder inside a subject folder": ["cat/2024"],
        "not an image that can be read": ["cat/f.HEIC", "cat/notes.txt", "phone/IMG_1.heic"],
        "mask that belongs to no image, or a second mask of one": ["cat/d_mask.jpg", "cat/z_mask.png"],
        "subject folder without an image": ["empty", "phone"],
        "not in a subject folder": ["loose.jpg"],
    }  # fmt: skip
    assert imported.skipped == 14
    found = next(line for line in lines(imported.manifest) if line["id"].startswith("cat-"))
    assert (found["prompt"], found["subject"]) == ("a chaton d'été\u2028here", "chaton d'été")
    assert [Path(mask).name if mask else None for mask in found["masks"]] == [
        "A_mask.PNG", "b_mask.jpg", "C.tif", "d_mask.png", None,
    ]  # fmt: skip
    for subject in ("cat", "dog2", "red_teapot"):
        shutil.rmtree(subjects / subject)
    with pytest.raises(UserError, match=r"no subject folder .*read: phone/IMG_1\.heic"):
        import_folder(subjects, tmp_path / "b.jsonl", ["a {subject}"])


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes")
def test_a_name_that_is_not_text_is_left_out(subjects, tmp_path):
    (subjects / "dog2" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    imported = import_folder(subjects, tmp_path / "data.jsonl", ["a {subject}"], references="all")
    assert imported.left_out["name that is not UTF-8"] == [os.fsdecode(b"dog2/caf\xe9.jpg")]


@pytest.mark.parametrize("prompt", ["a {} here", "a {0}", "a {Subject}", "{{subject}}", "a {subject", "{ subject }"])
def test_other_braces_than_those_of_the_subject_are_refused(prompt, subjects, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"a {{subject}}\n{prompt}\n")
    for prompts, where in ((tmp_path / "prompts.txt", r"prompts\.txt', line 2"), (["a {subject}", prompt], "Prompt 2")):
        with pytest.raises(UserError, match=f"{where}: .* has braces other than {{subject}}"):
            import_folder(subjects, tmp_path / "data.jsonl", prompts)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "class.txt' must be one line with the class noun, and it is empty"),
        (b"\xef\xbb\xbf \r\n", "it is empty"),
        (b"dog\n\na good one\n", "and line 3 is 'a good one'"),
        (b"chien d'\xe9t\xe9", "class.txt', line 1: this is not UTF-8 text"),
    ],
)
def test_a_class_file_of_no_line_or_two(content, sentence, subjects, tmp_path):
    (subjects / "dog2" / "class.txt").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        import_folder(subjects, tmp_path / "data.jsonl", ["a {subject}"])


def test_a_manifest_behind_a_link_finds_its_images(subjects, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "far" / "away")
    (tmp_path / "far" / "link").symlink_to(subjects / "dog2")
    JsonlDataset(import_folder(subjects, tmp_path / "out" / "data.jsonl", ["a {subject}"]).manifest)
    back = tmp_path / "far" / "link" / ".."
    for number, folder in enumerate((back, tmp_path / "out" / ".." / "link" / "..")):
        manifest = import_folder(folder, tmp_path / "out" / f"{number}.jsonl", ["a {subject}"]).manifest
        assert JsonlDataset(manifest)[0].references[0].size == (6, 4)
    masked = add_masks(tmp_path / "out" / "data.jsonl", tmp_path / "masked.jsonl", lambda picture: picture.convert("L"))
    JsonlDataset(masked.manifest)


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
        assert [r["kind"] for r in lines(imported.manifest)] == ["recontext", "property", "accessory"]


def test_a_clone_that_is_none(clone, tmp_path):
    (clone / "dataset" / "cat2" / "00.jpg").unlink()
    with pytest.raises(UserError, match="has no images of cat2"):
        import_dreambench(clone, tmp_path / "data.jsonl")
    with pytest.raises(UserError, match="give a clone of"):
        import_dreambench(tmp_path, tmp_path / "data.jsonl")


@pytest.mark.skipif(not DREAMBENCH.is_dir(), reason="the real DreamBench is not beside the repository")
def test_the_real_dreambench_asks_what_the_published_protocol_asks(tmp_path):
    imported = import_dreambench(DREAMBENCH, tmp_path / "data.jsonl")
    assert imported[1:] == (750, 30, {})
    protocol = json.loads((DREAMBENCH / "protocol_single.json").read_text())
    theirs = {(Path(entry["image_paths"][0]).parent.name, entry["prompt"]) for entry in protocol}
    ours = {(record.id.rpartition("-")[0], record.prompt) for record in JsonlDataset(imported.manifest).records}
    assert ours == theirs
    kinds = Counter(record.kind for record in JsonlDataset(imported.manifest).records)
    assert kinds == {"recontext": 21 * 20 + 9 * 10, "accessory": 9 * 10, "property": 30 * 5}, "as the lists have them"
    each = import_dreambench(DREAMBENCH, tmp_path / "each.jsonl", references="each")
    assert each.examples == 158 * 25


# ---- synthetic pairs


@pytest.fixture
def syncd(tmp_path):
    """What SynCD's own loader reads: sets of images with a prompt each; masks are not black where the object is."""
    root = tmp_path / "syncd"
    for name, size in (
        ("dog_0.jpg", (64, 48)),
        ("dog_1.jpg", (64, 48)),
        ("a/7_0.jpg", (32, 32)),
        ("a/7_1.jpg", (32, 32)),
    ):
        save(root / name, size=size)
    mask = Image.new("L", (16, 12), 0)
    mask.paste(9, (0, 0, 8, 12))
    (root / "masks").mkdir()
    mask.save(root / "masks" / "dog_0.jpg", quality=100)
    render = Image.new("RGB", (32, 32))
    render.paste("red", (0, 0, 16, 32))
    render.paste((0, 90, 250), (0, 0, 16, 16))
    (root / "a" / "masks").mkdir()
    render.save(root / "a" / "masks" / "7_0.jpg", quality=100, subsampling=0)
    write_sets(root / "deformable_metadata.json", (["dog_0.jpg", "dog_1.jpg"], ["a dog on sand", "a dog\u2028in snow"]))
    sets = (
        (["a/7_0.jpg", "a/7_1.jpg"], ["x", "y", "z"]),
        (["a/7_0.jpg", "a/8.jpg"], ["x", "y"]),
        (["a/7_0.jpg"], ["x"]),
    )
    write_sets(root / "metadata.json", *sets, objaverse_id="7")
    return root


def write_sets(file, *sets, **more):
    file.write_text(json.dumps([{"filenames": names, "prompts": prompts, **more} for names, prompts in sets]))


def test_import_syncd(syncd, tmp_path):
    imported = import_syncd(syncd, tmp_path / "out" / "data.jsonl")
    assert imported[1:] == (
        2, 2, {"set with a missing image": ["metadata.json, entry 1"], "set of one image": ["metadata.json, entry 2"]},
    )  # fmt: skip
    dog, thing = dataset = JsonlDataset(imported.manifest)
    assert (dog.id, dog.prompt, dog.references[0].size) == ("syncd-000000-01", "a dog\u2028in snow", (64, 48))
    assert (thing.prompt, dataset.subjects) == ("y", ["syncd-000000", "7"])
    assert [record.target for record in dataset.records] == ["../syncd/dog_1.jpg", "../syncd/a/7_1.jpg"]
    assert (dog.target.size, thing.target.size) == ((64, 48), (32, 32))
    # The loader takes what is not black for the object, and resizes masks to their images.
    for example, edge in ((dog, 32), (thing, 16)):
        width, height = example.references[0].size
        expected = Image.new("L", (width, height), 0)
        expected.paste(255, (0, 0, edge, height))
        assert ImageChops.difference(example.masks[0], expected).getbbox() is None
    assert check_data(imported.manifest, smallest=16).usable


@pytest.mark.parametrize(
    ("references", "tasks"), [("first", [(1, "y")]), ("all", [(1, "x"), (1, "y")]), ("each", [(1, "y"), (1, "x")])]
)
def test_which_images_of_a_set_are_references(references, tasks, syncd, tmp_path):
    (syncd / "deformable_metadata.json").unlink()
    dataset = JsonlDataset(import_syncd(syncd / "metadata.json", tmp_path / "data.jsonl", references=references)[0])
    assert [(len(record.references), record.prompt) for record in dataset.records] == tasks
    assert set(dataset.subjects) == {"7"}, "all examples of an object are one subject"


SCORED = {
    "filenames": ["a.jpg", "b.jpg", "c.jpg", "d.jpg"],
    "prompts": ["a", "b", "c", "d"],
    "dino_scores": [[0, 0.9, 0.2, 0.99], [0, 0, 0.6, 0.1], [0, 0, 0, 0.3], [0, 0, 0, 0]],
    "aesthetics_scores": {"a": 6.0, "b": 6.5, "c": 5.0, "d": 7.0},
}
"""What SynCD's cal_scores.py writes: an upper triangle, and scores by name."""


@pytest.mark.parametrize(
    ("least", "kept"),
    [
        ({"aesthetics": 6}, "abd"),
        ({"dino": 0.5}, "abc"),
        ({"dino": 0.5, "aesthetics": 6}, "ab"),
        ({"dino": 0.95}, ""),
        ({"dino": 0.25}, "abcd"),
    ],
)
def test_syncd_is_filtered_as_its_loader_does(least, kept, tmp_path):
    for name in SCORED["filenames"]:
        save(tmp_path / name)
    (tmp_path / "metadata_with_scores.json").write_text(json.dumps([SCORED]))
    (tmp_path / "metadata.json").write_text("not read")
    if not kept:
        with pytest.raises(
            UserError, match=r"set of fewer than two images that pass: metadata_with_scores.json, entry 0"
        ):
            import_syncd(tmp_path, tmp_path / "data.jsonl", least=least)
        return
    records = JsonlDataset(import_syncd(tmp_path, tmp_path / "data.jsonl", least=least).manifest).records
    assert [record.prompt for record in records] == list(kept[1:])
    assert {record.references for record in records} == {(f"{kept[0]}.jpg",)}


def test_a_filter_needs_scores(tmp_path):
    (tmp_path / "metadata.json").write_text(json.dumps([SCORED | {"dino_scores": [[0]]}]))
    for path, least, sentence in (
        (tmp_path, {"dino": 0.5}, r"is no folder with \*metadata_with_scores.json"),
        (tmp_path / "metadata.json", {"dino": 0.5}, r"entry 0 lacks scores of its images \(IndexError.*cal_scores.py"),
        (tmp_path / "metadata.json", {"score": 1}, "SynCD has no score 'score'; filter by dino or aesthetics"),
    ):
        with pytest.raises(UserError, match=sentence):
            import_syncd(path, tmp_path / "data.jsonl", least=least)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('[{"image": "x"}]', "entry 0: expected lists 'filenames' and 'prompts'"),
        ('[{"filenames": ["x", "y"], "prompts": ["a"]}]', "entry 0 has 2 filenames and 1 prompts"),
        ("[\n{", "metadata.json': not JSON .* at line 2, column 2"),
        ("{}", "holds a dict; expected a JSON list"),
        ("[" * 3000, "not JSON that can be read"),
        (
            '[{"filenames": ["x", "y"], "prompts": ["a", "b"]}]',
            r"Nothing was found .* missing image: metadata.json, entry 0",
        ),
        (None, "is no folder with "),
    ],
)
def test_what_is_no_syncd(content, sentence, tmp_path):
    if content is not None:
        (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        import_syncd(tmp_path, tmp_path / "data.jsonl")


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
    assert imported[1:] == (4, 2, {"graded below 5": ["row 1", "row 3"]})
    left, right, *_ = dataset = JsonlDataset(imported.manifest)
    assert (left.prompt, right.prompt, left.subject) == ("a mug, right", "a mug, left", "mug")
    for example, colour in zip(dataset, [(255, 0, 0), (0, 0, 255)] * 2, strict=True):
        assert example.references[0].getcolors() == [(64, colour)]
        other = (0, 0, 255) if colour[0] else (255, 0, 0)
        assert example.target.getcolors() == [(64, other)], "the half that the prompt describes"
    with pytest.raises(UserError, match="exists already"):
        import_subjects200k(rows, tmp_path / "data.jsonl")
    broken = [row() | {"image": {"bytes": b"no", "path": None}}, row() | {"description": {}}, row()]
    assert import_subjects200k(broken, tmp_path / "some.jsonl")[1:] == (
        1, 1, {"image that cannot be read": ["row 0"], "no description, or not two images side by side": ["row 1"]},
    )  # fmt: skip
    assert import_subjects200k(rows, tmp_path / "one.jsonl", limit=1).examples == 1
