"""Image files, bytes and PIL images to RGB images the right way up, whatever is in them."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from customized_grpo.data.masks import Warn, hides, subject_mask
from customized_grpo.errors import UserError

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "TGA", "HEIF")
"""What is decoded, where the installed Pillow can. The others start programs, such as Ghostscript, or are no photos."""
PICTURES = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
"""Endings of the files that are images."""
MAX_PIXELS = 120_000_000
"""More than any camera with one sensor but the largest phones write. Decoding takes about 10 bytes for each."""
NONZERO = "nonzero"
"""The label of masks that mark the subject by everything that is not black."""
Source = Path | bytes | Image.Image
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to undo each EXIF orientation."""


def read_picture(source: Source, name: str = "") -> tuple[Image.Image, Image.Image | None]:
    """An RGB image the right way up, and its alpha channel as a mask if it hides anything.

    16-bit and float images are scaled to 8 bits, transparent ones laid on white; of an animation it is the first frame.

    Args:
        source: a file, the content of one, or an image of any mode.
        name: begins the error sentences; "" is the path.

    Raises:
        UserError: if it cannot be decoded, is too large, or is transparent everywhere.
    """
    name = name or f"The image '{source}'"
    return as_rgb(open_image(source, name)[0], name)


def read_mask(
    path: Path, size: tuple[int, int], label: int | str | None = None, warn: Warn | None = None
) -> Image.Image:
    """An "L" image, 255 on the subject, of the given (width, height). See `subject_mask`.

    The label "nonzero" takes everything that is not black, and a mask of another size is resized.

    Raises:
        UserError: if it cannot be read, does not say what the subject is, or is of another size.
    """
    name = f"The mask '{path}'"
    image, _ = open_image(path, name)
    with _faults_of(name):
        if label == NONZERO:
            image, label = image.convert("L").point([0] + [255] * 255).resize(size, Image.Resampling.NEAREST), None
        if image.size != size:
            raise UserError(
                f"{name} is {image.size[0]} x {image.size[1]}, its image {size[0]} x {size[1]}; make them one size."
            )
        return subject_mask(image, name, label, warn)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) from the head of a file, before it is turned. Raises UserError if it is no image."""
    name = f"The image '{path}'"
    with _faults_of(name), _opened(path, name) as image:
        return image.size


def open_image(source: Source, name: str) -> tuple[Image.Image, bool]:
    """The decoded image in its own mode and format, the right way up, and whether it was turned.

    Whatever the decoder raises is the fault of the image. An image whose EXIF data alone is damaged is not turned.

    Raises:
        UserError: beginning with `name`, if it cannot be decoded or is too large.
    """
    with _faults_of(name), _opened(source, name) as image:
        image.load()
        try:
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        except Exception:
            turn = None
        upright, form = image if turn is None else image.transpose(turn), image.format
        upright.format = form
        upright.info = {key: value for key, value in image.info.items() if key == "transparency"}
        return upright, turn is not None


def as_rgb(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """What `read_picture` makes of a decoded image."""
    with _faults_of(name):
        image = _eight_bit(image)
        if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
            return image.convert("RGB"), None
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=alpha)
        return white, subject_mask(alpha, f"The alpha channel of {name[0].lower()}{name[1:]}") if hides(alpha) else None


@contextmanager
def _opened(source: Source, name: str) -> Iterator[Image.Image]:
    Image.init()
    formats = [kind for kind in FORMATS if kind in Image.OPEN]
    with source.copy() if isinstance(source, Image.Image) else Image.open(
        io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats
    ) as image:  # fmt: skip
        if image.width * image.height > MAX_PIXELS:
            raise UserError(
                f"{name} has {image.width} x {image.height} pixels, more than {MAX_PIXELS // 10**6} million; shrink it."
            )
        yield image


@contextmanager
def _faults_of(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)
        said = "unknown format" if unknown else f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise UserError(f"{name} cannot be read ({said}); replace it by a PNG or JPEG, or leave it out.") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float32))
    highest = float(pixels.max(initial=0))
    if image.mode == "F" and highest <= 1:
        scale = 255.0
    else:
        scale = 255 / 65535 if highest > 255 or image.mode.startswith("I;16") else 1.0
    return Image.fromarray((pixels * scale).round().clip(0, 255).astype(np.uint8))
