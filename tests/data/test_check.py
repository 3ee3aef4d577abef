import json
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from customized_grpo.data.check import SEVERITY, check_data
from customized_grpo.data.importers import import_dreambench, import_folder
from customized_grpo.errors import UserError
from rewards.tiny import picture

DREAMBENCH = Path(__file__).parents[3] / "shared" / "dreambench"


@pytest.fixture
def clean(tmp_path):
    for n in range(3):
        (tmp_path / f"dog{n}").mkdir()
        picture(32, 24, seed=n).save(tmp_path / f"dog{n}" / "0.png")
    return import_folder(tmp_path, tmp_path / "data.jsonl", ["a {subject}", "a red {subject}"]).manifest


def change(manifest, *changes):
    """Change line n by the n-th mapping; a string replaces the line."""
    lines = manifest.read_text().splitlines()
    for n, changed in enumerate(changes):
        lines[n] = changed if isinstance(changed, str) else json.dumps(json.loads(lines[n]) | changed)
    manifest.write_text("\n".join(lines))


def found(manifest, **settings):
    report = check_data(manifest, **{"smallest": 16} | settings)
    return report, [(finding.kind, finding.where) for finding in report.findings]


def test_a_clean_manifest(clean):
    done = []
    report, findings = found(clean, progress=lambda *count: done.append(count))
    assert findings == []
    assert report.usable
    assert (report.examples, report.subjects, report.pictures, report.splits) == (6, 3, 3, {"train": 6})
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_everything_wrong_is_told_at_once(clean):
    root = clean.parent
    (root / "dog0" / "0.png").write_bytes(b"")
    picture(40, 8, seed=9).save(root / "dog1" / "0.png")
    picture(40, 8, seed=9).save(root / "dog2" / "0.png", compress_level=1)
    change(clean, {"prompt": " "}, {"references": ["dog7/0.png"]}, {"promt": "p"}, {"id": "dog2-00"}, {}, "{")
    report, findings = found(clean)
    assert findings == [
        ("bad line", "line 3"),
        ("bad line", "line 6"),
        ("empty prompt", "line 1"),
        ("repeated id", "line 5"),
        ("missing picture", "dog7/0.png"),
        ("tiny", "dog1/0.png"),
    ]
    assert not report.usable
    assert "Did you mean 'prompt'" in report.findings[0].message
    assert report.counts() == {"bad line": 2, "empty prompt": 1, "repeated id": 1, "missing picture": 1, "tiny": 1}


def test_too_many_kinds_of_prompt(clean):
    rows = [json.loads(clean.read_text().splitlines()[0]) | {"id": str(n), "kind": f"k{n}"} for n in range(21)]
    clean.write_text("\n".join(map(json.dumps, rows[:20])))
    assert check_data(clean, smallest=16).usable
    clean.write_text("\n".join(map(json.dumps, rows)))
    report, findings = found(clean)
    assert findings == [("many kinds", "data.jsonl")]
    assert not report.usable


def test_pictures(clean):
    root = clean.parent
    (root / "dog0" / "0.png").write_bytes((root / "dog0" / "0.png").read_bytes()[:60])
    exif = Image.Exif()
    exif[274] = 6
    picture(32, 24, seed=5).convert("L").save(root / "dog1" / "0.png", exif=exif)
    again = Image.open(root / "dog1" / "0.png").rotate(-90, expand=True)
    again.save(root / "dog2" / "0.png")  # the same pixels in another file
    report, findings = found(clean)
    assert findings == [
        ("corrupt", "dog0/0.png"),
        ("duplicate", "dog2/0.png"),
        ("not RGB", "dog1/0.png"),
        ("not RGB", "dog2/0.png"),
        ("rotated", "dog1/0.png"),
    ]
    assert [finding.severity for finding in report.findings] == ["error", "warning", "note", "note", "note"]


def test_one_damaged_file_does_not_hide_the_others(clean, monkeypatch):
    """Also if the decoder raises what it should not."""
    broken = clean.parent / "dog0" / "0.png"

    def load(image, real=ImageFile.ImageFile.load):
        if image.filename == str(broken):
            raise RuntimeError("the decoder")
        return real(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    report, findings = found(clean)
    assert findings == [("corrupt", "dog0/0.png")]
    assert "RuntimeError: the decoder" in report.findings[0].message


def test_targets(clean):
    root = clean.parent
    picture(32, 24, seed=8).save(root / "target.png")
    (root / "corrupt.png").write_bytes(b"no")
    names = ("target", "corrupt", "absent")
    change(clean, *({"target": f"{name}.png"} for name in names), {}, {"target": "target.png", "split": "eval"}, {})
    report, findings = found(clean)
    assert findings == [
        ("missing picture", "absent.png"),
        ("corrupt", "corrupt.png"),
        ("leaked picture", "line 5"),
        ("leaked picture", "line 6"),
        ("leaked subject", "line 6"),
    ]
    assert report.pictures == 6
    Image.new("L", (32, 24), 255).save(root / "good.png")
    change(clean, {"masks": ["good.png"]}, {"target": ""}, {"target": ""}, {}, {"split": "train"}, {})
    assert found(clean)[1] == [("no mask", "dog1/0.png"), ("no mask", "dog2/0.png")], "a target needs no mask"


def test_masks(clean):
    root = clean.parent
    Image.new("L", (32, 24), 255).save(root / "good.png")
    Image.new("L", (9, 9), 255).save(root / "small.png")
    Image.new("L", (32, 24), 0).save(root / "empty.png")
    (root / "corrupt.png").write_bytes(b"no")
    names = ("good", "small", "empty", "corrupt", "absent")
    change(clean, *({"masks": [f"{name}.png"]} for name in names), {})
    _, findings = found(clean)
    assert sorted(findings) == [
        ("corrupt", "corrupt.png"),
        ("empty mask", "empty.png"),
        ("mask size", "small.png"),
        ("missing mask", "absent.png"),
    ]
    change(clean, {"masks": ["good.png"]}, *[{"masks": []}] * 5)
    report, findings = found(clean)
    assert findings == [("no mask", "dog1/0.png"), ("no mask", "dog2/0.png")]
    assert report.usable


def test_masks_that_say_nothing_or_the_opposite(clean):
    root = clean.parent
    hole = Image.new("L", (32, 24), 255)
    hole.paste(0, (4, 4, 28, 20))
    hole.save(root / "hole.png")
    labels = Image.new("L", (32, 24), 0)
    labels.paste(1, (8, 4, 16, 20))
    labels.paste(2, (16, 4, 24, 20))
    labels.save(root / "labels.png")
    Image.new("RGBA", (32, 24), (255, 255, 255, 0)).save(root / "clear.png")
    masks = [{"masks": [f"{name}.png"]} for name in ("hole", "labels", "clear")]
    change(clean, *masks, masks[1] | {"mask_labels": [2]}, {"masks": []}, {"masks": []})
    report, findings = found(clean)
    assert findings == [
        ("empty mask", "clear.png"), ("unclear mask", "labels.png"), ("inverted mask", "hole.png"),
        ("no mask", "dog2/0.png"),
    ]  # fmt: skip
    assert "name the one of the subject in mask_labels" in report.findings[1].message


def test_a_mask_shared_by_pictures_of_two_sizes(clean):
    picture(20, 24, seed=3).save(clean.parent / "dog1" / "0.png")
    Image.new("L", (20, 24), 255).save(clean.parent / "shared.png")
    change(clean, *[{"masks": ["shared.png"]}] * 6)
    report, findings = found(clean)
    assert findings == [("mask size", "shared.png")] * 2
    assert "is 20 x 24, its image 32 x 24" in report.findings[0].message


def test_leaks_between_splits(clean):
    change(clean, {"split": "eval"}, {}, {}, {}, {"split": "eval"}, {"split": "eval"})
    report, findings = found(clean)
    assert findings == [("leaked picture", "line 2"), ("leaked subject", "line 2")]
    assert report.splits == {"eval": 3, "train": 3}
    assert not report.usable
    picture(32, 24, seed=77).save(clean.parent / "dog0" / "other.png")
    change(clean, {"references": ["dog0/other.png"]})
    report, findings = found(clean)
    assert findings == [("leaked subject", "line 2")]
    assert report.usable


def test_a_leak_through_a_copy_of_the_picture(clean):
    copy = clean.parent / "dog2" / "0.png"
    copy.write_bytes((clean.parent / "dog0" / "0.png").read_bytes())
    change(clean, {"split": "eval"}, {"split": "eval"})
    assert found(clean)[1] == [("leaked picture", "line 5"), ("duplicate", "dog2/0.png")]


def test_no_manifest(tmp_path):
    with pytest.raises(UserError, match="There is no data file"):
        check_data(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert not check_data(tmp_path / "empty.jsonl").usable


def test_every_kind_has_a_severity():
    assert set(SEVERITY.values()) == {"error", "warning", "note"}


@pytest.mark.skipif(not DREAMBENCH.is_dir(), reason="the real DreamBench is not beside the repository")
def test_the_real_dreambench_is_usable(tmp_path):
    manifest = import_dreambench(DREAMBENCH, tmp_path / "data.jsonl", references="all").manifest
    report = check_data(manifest)
    assert report.usable
    assert (report.examples, report.subjects, report.pictures) == (750, 30, 158)
