"""Masks of any kind to one kind: 255 on the subject, 0 elsewhere."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from customized_grpo.errors import UserError

LOSSY = {"JPEG", "MPO", "WEBP", "AVIF"}
MANY = 64
"""A mask with more different values than this is a matte, not labels."""
AREA = 1e-4
"""The least share of a mask that a label fills."""


Warn = Callable[[str], None]


def subject_mask(
    image: Image.Image, name: str = "The mask", label: int | str | None = None, warn: Warn | None = None
) -> Image.Image:
    """An "L" mask of the same size, 255 on the subject.

    Two values, whatever they are, are background and subject: the darker one (of a palette without black, index 0) is
    the background. More grey levels are a matte. A partly transparent image is read by its alpha channel, and a
    coloured one if it is of one colour on black.

    Args:
        image: of any mode.
        name: begins the error sentences.
        label: the value of the subject, for a mask with several labels: a number (of a palette, its index) or a colour
            such as "#ff0000" or "red".
        warn: told about a mask that looks inverted; None issues a Python warning.

    Raises:
        UserError: if nothing is marked, if several labels are and none is named, or if it is a colour picture.
    """
    share = _named(image, label, name) if label is not None else _share(_values(image, name), image.format, name)
    mask = (share * 255).round().astype(np.uint8)
    if not mask.any():
        raise UserError(f"{name} is black or transparent everywhere; mark the subject white.")
    if _looks_inverted(mask):
        message = f"{name} looks inverted: it marks the border and not the middle; make the subject white."
        warn(message) if warn else warnings.warn(message, stacklevel=1)
    return Image.fromarray(mask)


def hides(alpha: Image.Image) -> bool:
    """Whether an alpha channel makes anything transparent."""
    darkest: Any = alpha.getextrema()[0]
    return darkest < 128


def _values(image: Image.Image, name: str) -> NDArray[Any]:
    """The image as (H, W) numbers."""
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if has_alpha and hides(alpha := image.convert("RGBA").getchannel("A")):
        return np.asarray(alpha, dtype=np.float64)
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise UserError(f"{name} holds values that are not finite; write it as an 8-bit image.")
        return values
    colours = np.asarray(image.convert("RGB"), dtype=np.float64)
    if image.mode == "P" and _counts_by_index(indices := np.asarray(image), colours):
        return indices.astype(np.float64)
    brightest = colours.reshape(-1, 3)[colours.sum(-1).argmax()]
    along = colours @ brightest / max(1.0, brightest @ brightest)
    if (np.abs(colours - along[..., None] * brightest).max(-1) > 64).mean() > 0.005:
        raise UserError(f"{name} has several colours; mark the subject alone, or name its colour in mask_labels.")
    return along * brightest.max()


def _counts_by_index(indices: NDArray[Any], colours: NDArray[Any]) -> bool:
    """Whether the colours of a palette do not tell its labels apart, or not which one is the background."""
    found = np.unique(indices)
    different = len(np.unique(colours @ (65536, 256, 1)))
    return different < len(found) or (len(found) == 2 and found[0] == 0 and bool(colours.any(-1).all()))


def _share(values: NDArray[Any], form: str | None, name: str) -> NDArray[Any]:
    """(H, W) in [0, 1]: how much of each pixel is the subject."""
    found = np.unique(values)
    if len(found) == 1:
        return np.full(values.shape, float(found[0] != 0))
    areas = found if len(found) == 2 else _areas((values / 17).round() * 17 if form in LOSSY else values)
    if len(areas) == 2:
        return ((values - areas[0]) / (areas[1] - areas[0])).clip(0, 1)
    if len(areas) > 2 and len(found) <= MANY:
        labels = ", ".join(f"{value:g}" for value in areas[:6])
        raise UserError(f"{name} has the labels {labels}; name the one of the subject in mask_labels.")
    top = found[-1]
    return (values / (255 if 128 <= top <= 255 else top)).clip(0, 1)


def _areas(values: NDArray[Any]) -> NDArray[Any]:
    """The values that fill areas, and do not only occur along edges."""
    if min(values.shape) < 3:
        return np.unique(values)
    inner = values[1:-1, 1:-1]
    around = np.lib.stride_tricks.sliding_window_view(values, (3, 3))
    solid, counts = np.unique(inner[(around == inner[..., None, None]).all((-1, -2))], return_counts=True)
    return solid[counts >= AREA * values.size]


def _named(image: Image.Image, label: int | str, name: str) -> NDArray[Any]:
    if isinstance(label, int):
        share = np.asarray(image if image.mode in ("P", "L", "I", "I;16", "F") else image.convert("L")) == label
    else:
        try:
            colour = ImageColor.getrgb(label)[:3]
        except ValueError:
            raise UserError(f"{name}: label '{label}' is neither a number nor a colour such as '#ff0000'.") from None
        share = (np.asarray(image.convert("RGB")) == colour).all(-1)
    if not share.any():
        raise UserError(f"{name} has no pixel with the label {label}; see the values in it.")
    return share.astype(np.float64)


def _looks_inverted(mask: NDArray[Any]) -> bool:
    height, width = mask.shape
    if min(height, width) < 8:
        return False
    subject = mask >= 128
    frame = np.concatenate([subject[0], subject[-1], subject[:, 0], subject[:, -1]])
    middle = subject[height // 4 : -(height // 4), width // 4 : -(width // 4)]
    return bool(frame.mean() > 0.75 and middle.mean() < 0.25)
