import json

import pytest
from PIL import Image

from customized_grpo.data import JsonlDataset, load_datasets
from customized_grpo.data.check import check_data
from customized_grpo.data.settings import DataSettings
from customized_grpo.errors import UserError
from customized_grpo.settings import Spec
from customized_grpo.train.evaluation import cluster


@pytest.fixture
def folder(tmp_path):
    for name in ("dog/0.png", "dog/1.png", "cat/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), "red").save(tmp_path / name)
    mask = Image.new("L", (6, 4), 0)
    mask.paste(255, (0, 0, 3, 4))
    mask.save(tmp_path / "dog" / "mask.png")
    return tmp_path


def write(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "data.jsonl").write_text(text)
    return folder / "data.jsonl"


def line(name="a", **fields):
    return {"id": name, "prompt": "a dog", "references": ["dog/0.png"]} | fields


def test_reads_everything_in_a_line(folder):
    masks = [None, "dog/mask.png"]
    pair = ["dog/0.png", "dog/1.png"]
    path = write(
        folder,
        line(
            references=pair,
            masks=masks,
            subject="dog",
            split="eval",
            kind=" a  scene ",
            target="dog/1.png",
            weights={"identity": 0.25},
        ),
        "",
    )
    (example,) = list(JsonlDataset(path))
    assert (example.id, example.prompt, example.subject, example.kind) == ("a", "a dog", "dog", "a scene")
    assert JsonlDataset(path).all_kinds() == ["a scene"]
    assert [picture.size for picture in example.references] == [(6, 4), (6, 4)]
    assert example.masks[0] is None
    assert (example.target.size, example.weights) == ((6, 4), {"identity": 0.25})
    assert [example.masks[1].getpixel((x, 0)) for x in (0, 5)] == [255, 0]


def test_a_single_reference_needs_no_list_and_ids_may_be_numbers(folder):
    dataset = JsonlDataset(write(folder, line(7, references="dog/0.png")))
    assert dataset[0].id == "7"
    assert dataset[0].masks == ()
    assert len(dataset[0:1]) == 1


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([line(), "{oops"], r"line 2: not JSON"),
        ([line(), "", "[" * 3000], "line 3: not JSON that can be read"),
        (['{"id": ' + "9" * 5000 + "}"], "line 1: not JSON that can be read"),
        ([line(prompt="a \ud800 dog")], r"line 1: '\\ud800' is half of a surrogate pair"),
        ([line(references=["d" * 300 + ".png"])], "line 1: there is no image"),
        (["[1, 2]"], r"line 1: expected a JSON object"),
        ([line("a"), line("b"), line("a")], r"line 3: the id 'a' is already on line 1"),
        ([line(promt="a dog")], r"unknown field 'promt'\. Did you mean 'prompt'"),
        ([line(prompt="  ")], r"line 1: field 'prompt': the prompt is empty"),
        ([{"id": "a", "references": ["dog/0.png"]}], r"line 1: there is no field 'prompt'"),
        ([line(references=[])], r"line 1: field 'references' is empty; give at least one picture of the subject"),
        ([line(references=["dog/9.png"])], r"line 1: there is no image '.*dog/9.png'"),
        ([line(masks=["dog/mask.png", None])], r"line 1: 2 masks for 1 references"),
        ([line(target="dog/9.png")], r"line 1: there is no image '.*dog/9.png'"),
        ([line(weights={"identity": -1})], r"line 1: field 'weights': expected .*0"),
        ([line(masks=["dog/absent.png"])], r"line 1: there is no image '.*absent.png'"),
        ([""], r"holds no example"),
        ([line(kind="k" * 41)], r"line 1: field 'kind': 'kkk.*' has 41 characters; name .* at most 40\.$"),
        (
            [line(str(n), kind=f"k{n}") for n in range(21)],
            r"has 21 kinds of prompt, such as k0, k1, k2; use at most 20",
        ),
    ],
)
def test_a_bad_line_is_named(lines, sentence, folder):
    with pytest.raises(UserError, match=sentence):
        JsonlDataset(write(folder, *lines))


def test_bad_files(folder):
    with pytest.raises(UserError, match="There is no data file"):
        JsonlDataset(folder / "absent.jsonl")
    (folder / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    with pytest.raises(UserError, match=r"latin\.jsonl', line 1: this is not UTF-8 text"):
        JsonlDataset(folder / "latin.jsonl")
    for content in (b"", b"\x89PNG\r\n\x1a\n damaged", (folder / "dog/0.png").read_bytes()[:40]):
        (folder / "dog/1.png").write_bytes(content)
        with pytest.raises(UserError, match=r"The image '.*1.png' cannot be read"):
            JsonlDataset(write(folder, line(references=["dog/1.png"])))[0]


SPACES = "\u2028\u2029\x85\v\f\x1c\r"
"""What `str.splitlines` takes for the end of a line and JSON for a part of one (or, raw, for white space)."""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_and_ends_of_lines(encoding, end, folder):
    raw = SPACES[:3]  # JSON has the others as escapes alone
    lines = [json.dumps(line(name, prompt=f"a{SPACES}dog"), ensure_ascii=False) for name in ("a", f"b{raw}")]
    text = end.join([*lines, ""])
    mark = "\ufeff" if encoding[-2:] in ("le", "be") else ""
    (folder / "data.jsonl").write_bytes((mark + text).encode(encoding))
    assert [(e.id, e.prompt) for e in JsonlDataset(folder / "data.jsonl")] == [
        (name, f"a{SPACES}dog") for name in ("a", f"b{raw}")
    ]
    assert check_data(folder / "data.jsonl", smallest=1).examples == 2


def test_a_subject_id_says_who_it_is(folder):
    lines = [
        line("0", subject_id="rex"),
        line("1", subject_id=7),
        line("2", references=["cat/0.png"], subject_id="rex"),
    ]
    dataset = JsonlDataset(write(folder, *lines))
    assert dataset.subjects == ["rex", "7", "rex"]
    assert check_data(dataset.path, smallest=1).subjects == 2


def test_outlines_are_examples_with_empty_images_of_the_right_sizes(folder):
    lines = [line("0"), line("1"), line("2", references=["dog/0.png", "cat/0.png"])]
    dataset = JsonlDataset(write(folder, *lines))
    assert [(e.id, [image.size for image in e.references]) for e in dataset.outlines()] == [
        ("0", [(6, 4)]), ("2", [(6, 4), (6, 4)]),
    ]  # fmt: skip
    weighted = write(folder, line("0"), line("1", weights={"identity": 0.5}), line("2", weights={"identity": 1}))
    assert [(e.id, e.weights) for e in JsonlDataset(weighted).outlines()] == [("0", {}), ("1", {"identity": 0.5})]
    (folder / "cat" / "0.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"cat/0.png' cannot be read"):
        list(dataset.outlines())


def test_a_mask_of_another_size(folder):
    Image.new("L", (5, 5)).save(folder / "small.png")
    with pytest.raises(UserError, match="is 5 x 5, its image 6 x 4"):
        JsonlDataset(write(folder, line(masks=["small.png"])))[0]


# ---- splits


def test_held_out_subjects_are_not_trained_on(folder):
    lines = [line(f"d{n}") for n in range(3)] + [line("c", references=["cat/0.png"])]
    train, held_out = JsonlDataset(write(folder, *lines)).held_out()
    assert [record.id for record in train.records] == ["d0", "d1", "d2"]
    assert [record.id for record in held_out.records] == ["c"]


def test_in_a_flat_folder_every_reference_is_a_subject(folder):
    lines = [line("0"), line("1"), line("2", references=["dog/1.png"])]
    train, held_out = JsonlDataset(write(folder, *lines)).held_out()
    assert [record.id for record in train.records] == ["0", "1"]
    assert [record.id for record in held_out.records] == ["2"]


def test_one_subject_cannot_be_held_out(folder):
    dataset = JsonlDataset(write(folder, line("0"), line("1")))
    assert dataset.held_out() == (dataset, None)


def test_held_out_examples_begin_with_one_of_each_subject(folder):
    references = ["dog/0.png"] * 3 + ["cat/0.png"]
    lines = [line(str(n), references=[name], split="eval") for n, name in enumerate(references)]
    _, held_out = load_datasets(DataSettings(train=str(write(folder, *lines, line("t"))), eval=None))
    assert [example.id for example in held_out] == ["0", "3", "1", "2"]
    assert [cluster(example) for example in held_out] == ["dog", "cat", "dog", "dog"]


def test_data_that_is_no_sequence_is_one_sentence():
    with pytest.raises(UserError, match=r"data.train: json:loads gives a function; expected a sequence of examples"):
        load_datasets(DataSettings(train=Spec(use="json:loads")))


def test_held_out_examples_begin_with_all_kinds(folder):
    """Prompts are often listed kind by kind, and evaluation takes the first few examples."""
    kinds = ("scene", "scene", "colour") * 2
    lines = [line(str(n), kind=kind, subject_id=str(n // 3)) for n, kind in enumerate(kinds)]
    spread = JsonlDataset(write(folder, *lines)).spread()
    assert [example.id for example in spread] == ["0", "5", "2", "3", "1", "4"]
    assert [example.kind for example in spread][:4] == ["scene", "colour", "colour", "scene"]


def test_as_many_kinds_as_a_table_can_show(folder):
    lines = [line(str(n), kind="k" * 39 + chr(ord("a") + n)) for n in range(20)]
    assert len({example.kind for example in JsonlDataset(write(folder, *lines, line("none")))}) == 21


def test_two_dogs_are_two_subjects(folder):
    lines = [line("0", subject="dog"), line("1", subject="dog", references=["cat/0.png"])]
    first, second = JsonlDataset(write(folder, *lines))
    assert cluster(first) != cluster(second)


def test_splits_that_the_manifest_names(folder):
    dataset = JsonlDataset(write(folder, line("0"), line("1", split="eval"), line("2", split="train")))
    train, held_out = dataset.held_out()
    assert ([r.id for r in train.records], [r.id for r in held_out.records]) == (["0", "2"], ["1"])
    with pytest.raises(UserError, match="no example with split 'test'; it has eval, train"):
        dataset.split("test")


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "test", "Eval", " TEST "])
def test_other_names_of_the_held_out_split_are_held_out(name, folder):
    train, held_out = JsonlDataset(write(folder, line("0", split="training"), line("1", split=name))).held_out()
    assert ([r.id for r in train.records], [r.id for r in held_out.records]) == (["0"], ["1"])


@pytest.mark.parametrize("name", ["held-out", "evla", "train2", "none"])
def test_an_unknown_split_is_refused_not_trained_on(name, folder):
    with pytest.raises(
        UserError, match=f"line 2: field 'split': '{name}' is not a known split; write train, or one of"
    ):
        JsonlDataset(write(folder, line("0"), line("1", split=name)))


def test_the_label_of_the_subject(folder):
    labels = Image.new("L", (6, 4), 0)
    labels.paste(1, (0, 0, 3, 4))
    labels.paste(2, (3, 0, 6, 4))
    labels.save(folder / "labels.png")
    (example,) = JsonlDataset(write(folder, line(masks=["labels.png"], mask_labels=[2])))
    assert [example.masks[0].getpixel((x, 0)) for x in (0, 5)] == [0, 255]
    for labels, sentence in (([7], "has no pixel with the label 7"), (["no"], "neither a number nor a colour")):
        with pytest.raises(UserError, match=sentence):
            JsonlDataset(write(folder, line(masks=["labels.png"], mask_labels=labels)))[0]
    with pytest.raises(UserError, match="line 1: 2 mask_labels for 1 masks; give one each, or null"):
        JsonlDataset(write(folder, line(masks=["labels.png"], mask_labels=[1, 2])))
