import importlib.util
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from customized_grpo.data import decode
from customized_grpo.data.decode import image_size, read_mask, read_picture
from customized_grpo.errors import UserError

_spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).parents[2] / "tools" / "fuzz.py")
fuzz = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (6, 4), "blue")
    image.paste("red", (0, 0, 3, 4))  # left half; after a quarter turn it is the upper half
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    picture, _ = read_picture(tmp_path / "turned.png")
    assert picture.size == (4, 6)
    assert [picture.getpixel((1, y)) for y in (0, 5)] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("size", [(4, 4), (1, 9), (301, 7)])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "I;16", "I", "F"])
def test_modes_and_aspects(mode, size, tmp_path):
    """A picture of 60 % grey, or of the nearest thing its mode has, is read as that grey."""
    grey = Image.new("L", size, 153)
    if mode in ("I;16", "I", "F"):
        pixels = {"I;16": 153 * 257, "I": 153 * 257, "F": 0.6}[mode]
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image, expected = Image.fromarray(np.full(size[::-1], pixels, dtype)), 153
    else:
        image = grey.convert("RGB").convert(mode, dither=Image.Dither.NONE)
        expected = 255 if mode == "1" else 153
    assert image.mode == mode
    image.save(tmp_path / "picture.tiff")
    picture, alpha = read_picture(tmp_path / "picture.tiff")
    assert (picture.mode, picture.size, alpha) == ("RGB", size, None)
    assert max(abs(c - expected) for c in picture.getpixel((0, 0))) <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_becomes_a_mask_on_white(mode, tmp_path):
    image = Image.new("RGBA", (4, 2), (90, 90, 90, 255))
    image.paste((0, 0, 0, 0), (2, 0, 4, 2))
    (image.quantize() if mode == "P" else image.convert(mode)).save(tmp_path / "cut.png")
    picture, alpha = read_picture(tmp_path / "cut.png")
    assert [picture.getpixel((x, 0)) for x in (0, 3)] == [(90, 90, 90), (255, 255, 255)]
    assert [alpha.getpixel((x, 0)) for x in (0, 3)] == [255, 0]


def test_opaque_alpha_says_nothing(tmp_path):
    Image.new("RGBA", (4, 2), (90, 90, 90, 255)).save(tmp_path / "opaque.png")
    assert read_picture(tmp_path / "opaque.png")[1] is None


@pytest.mark.parametrize(
    "mask", [Image.new("1", (2, 2), 1), Image.new("L", (2, 2), 1), Image.new("RGB", (2, 2), "white"),
             Image.new("RGBA", (2, 2), "white"), Image.fromarray(np.full((2, 2), 65535, np.uint16))],
    ids=lambda mask: mask.mode,
)  # fmt: skip
def test_masks_of_every_kind(mask, tmp_path):
    mask.save(tmp_path / "mask.png")
    read = read_mask(tmp_path / "mask.png", (2, 2))
    assert (read.mode, read.getextrema()) == ("L", (255, 255))


def test_a_mask_that_is_marked_by_what_is_not_black_may_have_another_size(tmp_path):
    small = Image.new("RGB", (4, 2))
    small.paste((0, 0, 9), (0, 0, 2, 2))
    small.save(tmp_path / "small.png")
    mask = read_mask(tmp_path / "small.png", (8, 4), "nonzero")
    assert [mask.getpixel((x, 3)) for x in (0, 3, 4, 7)] == [255, 255, 0, 0]
    with pytest.raises(UserError, match="is 4 x 2, its image 8 x 4"):
        read_mask(tmp_path / "small.png", (8, 4))


def test_floats_that_are_not_finite(tmp_path):
    Image.fromarray(np.array([[np.nan, 0.6, np.inf, -np.inf]], np.float32)).save(tmp_path / "odd.tiff")
    picture, _ = read_picture(tmp_path / "odd.tiff")
    assert picture.getpixel((0, 0)) == (0, 0, 0)


# ---- damaged files


def test_valid_files_are_read(tmp_path):
    for kind, contents in fuzz.seeds().items():
        for content in contents if kind != "manifest" else ():
            assert read_picture(content, "It")[0].mode == "RGB"


def test_damaged_files_are_read_or_refused_in_one_sentence(tmp_path):
    """300 of what `make fuzz` reads 20,000 of."""
    Image.new("RGB", (24, 16)).save(tmp_path / "0.png")
    refused = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, content in fuzz.mutants(300, seed=1):
            assert fuzz.check(kind, content, tmp_path) == "", kind
            try:
                read_picture(content, "It")
            except UserError:
                refused.add(kind)
    assert refused == {*fuzz.FORMATS, "manifest"}


@pytest.mark.parametrize(
    "error",
    [AttributeError("a\nb"), struct.error("b"), RuntimeError("c"), MemoryError(), RecursionError("d"), KeyError(1)],
)
@pytest.mark.parametrize("read", [read_picture, lambda path: read_mask(path, (4, 2))])
def test_whatever_the_decoder_raises_is_the_fault_of_the_image(error, read, tmp_path, monkeypatch):
    Image.new("L", (4, 2), 255).save(tmp_path / "0.png")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(
        UserError, match=rf"'.*0\.png' cannot be read \({type(error).__name__}: .*\); replace it"
    ) as caught:
        read(tmp_path / "0.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_data_alone_keeps_the_image(kind, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    good = exif.tobytes()
    damaged = [b"Exif\0\0XX" + good[8:], b"Exif\0\0M", good[:14], good[:-9], b"Exif\0\0MM\0\x2a\xff\xff\xff\xff"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in damaged:
            Image.new("RGB", (6, 4), "red").save(tmp_path / "0", kind, exif=data)
            assert read_picture(tmp_path / "0")[0].size == (6, 4)


def test_images_too_large_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 10**6)) + chunk(b"IEND", b"")
    )
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="It has 13000 x 13000 pixels, more than 120 million; shrink it"):
            read_picture(bomb, "It")
        with pytest.raises(UserError, match="cannot be read"):
            read_picture(bomb.replace(head[:8], b"\0\1\0\0\0\1\0\0"), "It")


def test_formats_that_start_programs_are_not_opened():
    with pytest.raises(UserError, match=r"cannot be read \(unknown format\)"):
        read_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "It")
    assert "EPS" not in decode.FORMATS


def test_sources_of_every_kind_are_left_as_they_are(tmp_path):
    image, file = Image.new("RGBA", (4, 2), (9, 9, 9, 255)), io.BytesIO()
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.info["dpi"] = (72, 72)
    image.save(tmp_path / "0.png")
    image.save(file, "PNG")
    for source in (tmp_path / "0.png", file.getvalue(), image):
        picture, alpha = read_picture(source, "It")
        assert (picture.getpixel((0, 0)), alpha.getpixel((0, 0))) == ((255, 255, 255), 0)
    assert (image.mode, image.info) == ("RGBA", {"dpi": (72, 72)})
    assert image_size(tmp_path / "0.png") == (4, 2)
