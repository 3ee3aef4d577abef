"""`cgrpo data import`, `masks`, `split` and `view`."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.testing import CliRunner

from customized_grpo.cli.data import app
from customized_grpo.data import JsonlDataset
from customized_grpo.data.decode import read_picture
from customized_grpo.data.importers import import_folder
from customized_grpo.errors import UserError


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two subjects in photos/, and a stand-in of rembg that finds something in the image that is not white."""
    for name, colour in (("dog", "red"), ("cat", "white")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 4), colour).save(tmp_path / "photos" / name / "0.png")

    def remove(picture: Image.Image, **_: object) -> Image.Image:
        return Image.new("L", picture.size, 255 * (picture.getpixel((0, 0)) != (255, 255, 255)))

    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(new_session=str, remove=remove))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def imported(place: Path) -> None:
    import_folder(place / "photos", place / "data.jsonl", ["a {subject}", "a red {subject}"])


def test_import_passes_what_a_format_takes(place: Path) -> None:
    Path("rows.jsonl").write_text(
        '{"text": "a red dog", "a": "photos/dog/0.png", "b": "photos/cat/0.png", "score": 3}\n'
        '{"text": "a cat", "a": "photos/cat/0.png", "score": 2}\n{"text": "a dog", "a": "photos/dog/0.png"}\n'
    )
    columns = ["--columns", "prompt=text", "--columns", "references=a,b"]
    printed = said("import", "rows", "rows.jsonl", "one.jsonl", *columns, "--least", "score=2.5", "--limit", "2")
    assert "one.jsonl: 1 examples of 1 subjects, 1 entries left out.\n" in printed
    assert "left out, score below 2.5: rows.jsonl, line 2\nnext: " in printed
    assert len(JsonlDataset("one.jsonl")[0].references) == 2
    Path("prompts.txt").write_text("a {subject} in the snow\n")
    assert "2 examples" in said("import", "folder", "photos", "data.jsonl", "--prompts", "prompts.txt")
    for words, expected in {
        ("folder", "photos", "x.jsonl"): "A folder requires --prompts FILE",
        ("dreambench", "photos", "x.jsonl", "--limit", "2"): "'dreambench' takes no --limit; leave it out",
        ("omnirf", "photos", "x.jsonl"): "Unknown format 'omnirf'.*Did you mean 'omniref'",
        ("rows", "rows.jsonl", "x.jsonl", "--columns", "text"): "'text' is not NAME=VALUE; write prompt=COLUMN",
        ("rows", "rows.jsonl", "x.jsonl", "--least", "score=high"): "'score=high' is not NAME=VALUE",
    }.items():
        with pytest.raises(UserError, match=expected):
            said("import", *words)


def test_masks_of_a_folder_and_of_a_manifest(place: Path) -> None:
    imported(place)
    printed = said("masks", "data.jsonl", "masked.jsonl")
    assert "masked.jsonl: 4 examples\nnothing found in photos/cat/0.png\nlook at masked.png\n" in printed
    assert [bool(example.masks) for example in JsonlDataset("masked.jsonl")] == [False, False, True, True]
    printed = said("masks", "photos", "--model", "rembg:birefnet-general")
    assert printed == "1 masks beside the images of photos\nnothing found in cat/0.png\nlook at photos.png\n"
    assert (place / "photos" / "dog" / "0_mask.png").is_file()
    assert read_picture(Path("masked.png"))[0].height > read_picture(Path("photos.png"))[0].height


def test_nothing_is_overwritten(place: Path) -> None:
    imported(place)
    (place / "photos.png").touch()
    with pytest.raises(UserError, match=r"'photos.png' exists already; name another contact sheet"):
        said("masks", "photos")
    assert not (place / "photos" / "dog" / "0_mask.png").exists()
    said("view", "data.jsonl")
    for words in (["view", "data.jsonl"], ["masks", "data.jsonl", "data.jsonl"], ["split", "data.jsonl", "data.jsonl"]):
        with pytest.raises(UserError, match="exists already"):
            said(*words)
    for words, expected in {
        ("masks", "photos", "m.jsonl"): "is a folder, whose masks go beside its images; leave OUTPUT out",
        ("masks", "data.jsonl"): "is no folder; of a manifest, name the new one as OUTPUT",
        ("view", "data.jsonl", "--output", "v.pdf"): "'v.pdf' is no name of a contact sheet",
        ("split", "data.jsonl", "s.jsonl", "--fold", "3/2"): "--fold is '3/2'; the second of eight is --fold 2/8",
    }.items():
        with pytest.raises(UserError, match=expected):
            said(*words)


def test_few_held_out_subjects_are_named_and_folds_proposed(place: Path) -> None:
    imported(place)
    printed = said("split", "data.jsonl", "split.jsonl")
    assert "split.jsonl: 1 subjects for training, 1 held out\n" in printed
    assert "1 held-out subject is too few to tell small changes from chance; make five folds (" in printed
    assert "data split data.jsonl split-1.jsonl --fold 1/5` to 5/5)." in printed
    assert "train on every fold and take their scores together" in said(
        "split", "data.jsonl", "f.jsonl", "--fold", "1/2"
    )


def test_view_shows_each_subject_in_turn(place: Path) -> None:
    imported(place)
    said("view", "data.jsonl", "--count", "2", "--output", "two.png")
    sheet, _ = read_picture(Path("two.png"))
    assert [sheet.getpixel((64, 22 + 64 + row * 154)) for row in range(2)] == [(255, 255, 255), (255, 0, 0)]
