import sys

import pytest
from PIL import Image, ImageOps

from customized_grpo.data import JsonlDataset
from customized_grpo.data.importers import import_folder
from customized_grpo.data.segment import add_masks
from customized_grpo.errors import UserError


def dark_is_subject(picture):
    return ImageOps.invert(picture.convert("L")).point(lambda value: 255 if value > 128 else 0)


@pytest.fixture
def manifest(tmp_path):
    """Four subjects: dark on the left half; with a mask of its own; with an alpha channel; with nothing dark."""
    photo = Image.new("RGB", (8, 4), "white")
    photo.paste("black", (0, 0, 4, 4))
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
    photo.save(tmp_path / "a" / "0.png")
    photo.save(tmp_path / "b" / "0.png")
    Image.new("L", (8, 4), 200).save(tmp_path / "b" / "0_mask.png")
    cut = photo.convert("RGBA")
    cut.putalpha(dark_is_subject(photo))
    cut.save(tmp_path / "c" / "0.png")
    Image.new("RGB", (8, 4), "white").save(tmp_path / "d" / "0.png")
    return import_folder(tmp_path, tmp_path / "data.jsonl", ["a {subject}", "a red {subject}"]).manifest


def test_every_reference_gets_a_mask(manifest):
    done = []
    output = manifest.parent / "other" / "masked.jsonl"
    lines = manifest.read_text().splitlines()
    lines[0] = lines[0][:-1] + ', "target": "d/0.png"}'
    manifest.write_text("\n".join(lines))
    made = add_masks(manifest, output, dark_is_subject, progress=lambda *count: done.append(count))
    assert (made.examples, made.skipped) == (8, 1)
    assert done[-1] == (3, 3)
    a, _, b, _, c, _, d, _ = JsonlDataset(output)
    assert a.target.size == (8, 4)
    assert [a.masks[0].getpixel((x, 0)) for x in (0, 7)] == [255, 0]
    assert b.masks[0].getextrema() == (255, 255)
    assert [c.masks[0].getpixel((x, 0)) for x in (0, 7)] == [255, 0]
    assert d.masks == ()
    assert len(list((manifest.parent / "other" / "masked").iterdir())) == 1
    with pytest.raises(UserError, match="exists already"):
        add_masks(manifest, output, dark_is_subject)


def test_bad_segmenters(manifest, monkeypatch):
    with pytest.raises(UserError, match=r"made a mask of \(2, 2\)"):
        add_masks(manifest, manifest.with_name("x.jsonl"), lambda picture: Image.new("L", (2, 2)))
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(UserError, match=r"pip install -e '.*\[masks\]'"):
        add_masks(manifest, manifest.with_name("y.jsonl"))
