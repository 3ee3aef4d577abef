"""Plots and image files as data URIs, so that a page is one file."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

from customized_grpo.page.blocks import Figure

if TYPE_CHECKING:
    import matplotlib.figure

WIDEST = 2000
"""Pixels; wider images are scaled down inside the page, the file beside it stays as it is."""
HEAVIEST = 1_500_000
"""Bytes; heavier images are embedded as JPEG."""


def embed_plot(
    figure: matplotlib.figure.Figure, folder: Path, name: str, *, title: str, caption: str = "", alt: str = ""
) -> Figure:
    """Write a plot as SVG and PNG into `folder`/plots and embed it."""
    from customized_grpo.page.plots import save

    path = save(figure, folder / "plots", name)
    width = round(figure.get_figwidth() * 100)
    return Figure(_uri("image/svg+xml", path.read_bytes()), title, alt or title, width, caption, f"plots/{path.name}")


def embed(path: Path, *, base: Path, alt: str, title: str = "", caption: str = "") -> Figure:
    """Embed an image file, scaled down or recompressed where it would make the page heavy.

    Raises:
        OSError: if it cannot be read as an image.
    """
    from PIL import Image

    content, kind = path.read_bytes(), "image/png"
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        natural = opened.width
        if natural > WIDEST or len(content) > HEAVIEST or opened.format != "PNG":
            content, kind = _jpeg(opened, (WIDEST, 100 * WIDEST), 90), "image/jpeg"
    zoom = max(1, min(4, 320 // max(natural, 1)))
    return Figure(_uri(kind, content), title, alt, natural * zoom, caption, path.relative_to(base).as_posix())


def thumbnail(path: Path, size: int = 320) -> str:
    """An image file of at most `size` pixels as a data URI."""
    from PIL import Image

    with Image.open(path) as opened:
        return _uri("image/jpeg", _jpeg(opened, (size, size), 88))


def _jpeg(image: object, size: tuple[int, int], quality: int) -> bytes:
    from PIL import Image

    assert isinstance(image, Image.Image)
    small = image.convert("RGB")
    small.thumbnail(size)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
