"""Plots and image files as data URIs, so that a page is one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from customized_grpo.page.blocks import Figure, ImageCell, ImageGrid, ImageRow
from customized_grpo.page.plots import save
from customized_grpo.page.sheets import grid
from customized_grpo.store import replacing

if TYPE_CHECKING:
    import matplotlib.figure

WIDEST = 2000
"""Pixels. Wider images are scaled down inside the page; the file beside it is unchanged."""
HEAVIEST = 1_500_000
"""Bytes; heavier images are embedded as JPEG."""


def embed_plot(
    figure: matplotlib.figure.Figure, folder: Path, name: str, *, title: str, caption: str = "", alt: str = ""
) -> Figure:
    """Write a plot as SVG and PNG into `folder`/plots and embed it."""
    path = save(figure, folder / "plots", name)
    width = round(figure.get_figwidth() * 100)
    return Figure(_uri("image/svg+xml", path.read_bytes()), title, alt or title, width, caption, f"plots/{path.name}")


def embed(path: Path, *, base: Path, alt: str) -> Figure:
    """Embed an image file, scaled down or recompressed where it would make the page heavy.

    Raises:
        OSError: if it cannot be read as an image.
    """
    content, kind = path.read_bytes(), "image/png"
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        natural = opened.width
        if natural > WIDEST or len(content) > HEAVIEST or opened.format != "PNG":
            content, kind = jpeg(opened, (WIDEST, 100 * WIDEST), 90), "image/jpeg"
    zoom = max(1, min(4, 320 // max(natural, 1)))
    return Figure(_uri(kind, content), "", alt, natural * zoom, link=path.relative_to(base).as_posix())


def thumbnail(path: Path, size: int = 320) -> str:
    """An image file of at most `size` pixels as a data URI."""
    with Image.open(path) as opened:
        return _uri("image/jpeg", jpeg(opened, (size, size), 88))


class Shown(NamedTuple):
    """One row of `image_grid`."""

    prompt: str
    rank: str
    """Why this row is shown."""
    files: Sequence[tuple[Path, Sequence[str]]]
    """Image files, each with what the metrics say of it."""


def image_grid(headers: Sequence[str], rows: Sequence[Shown], folder: Path, name: str = "images") -> ImageGrid:
    """Images in rows, embedded small, and the same as one file FOLDER/plots/NAME.png; empty without rows.

    Args:
        headers: of the columns.
        rows: of as many images as there are headers, or fewer.
        folder: of the page.
        name: of the file.
    """
    if not rows:
        return ImageGrid([], [])
    found, sheet = [], []
    for row in rows:
        cells = [
            ImageCell(thumbnail(path), f"{header}: {row.prompt}", marks)
            for header, (path, marks) in zip(headers, row.files, strict=False)
        ]
        found.append(ImageRow(row.prompt, row.rank, cells))
        sheet.append([Image.open(path).convert("RGB") for path, _ in row.files])
    with replacing(folder / "plots" / f"{name}.png") as draft:
        grid(sheet, list(headers), [row.prompt for row in rows]).save(draft, "PNG")
    return ImageGrid(headers, found, f"plots/{name}.png")


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the indices below `count`, at even steps from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most)).tolist()})


def jpeg(image: Image.Image, size: tuple[int, int] = (256, 256), quality: int = 88) -> bytes:
    """An image of at most `size` pixels as a JPEG file."""
    small = image.convert("RGB")
    small.thumbnail(size)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
