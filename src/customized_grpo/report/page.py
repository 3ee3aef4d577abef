"""Templates to HTML, and everything a page embeds. Serves any report; knows no run."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customized_grpo import store
from customized_grpo.errors import UserError
from customized_grpo.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDEST_IMAGE = 2000
"""Pixels; wider images are scaled down inside the page, the file beside it stays as it is."""
HEAVIEST_IMAGE = 1_500_000
"""Bytes; heavier images are embedded as JPEG."""


@dataclass(frozen=True)
class Picture:
    """An image inside the page."""

    source: str
    """A data URI."""
    alt: str
    width: int
    """CSS pixels."""
    title: str = ""
    caption: str = ""
    link: str = ""
    """The file it was made from, relative to the page."""


@dataclass(frozen=True)
class Remark:
    """A sentence the reader should see before trusting the page."""

    text: str
    serious: bool = False


def plot(figure: Figure, folder: Path, name: str, *, title: str, caption: str = "", alt: str = "") -> Picture:
    """Write a figure as SVG and PNG into `folder`/plots and embed it."""
    path = plots.save(figure, folder / "plots", name)
    width = round(figure.get_figwidth() * 100)
    source = _data_uri("image/svg+xml", path.read_bytes())
    return Picture(source, alt or title, width, title, caption, f"plots/{path.name}")


def image(path: Path, *, base: Path, alt: str, title: str = "", caption: str = "") -> Picture:
    """Embed an image file, scaled down or recompressed where it would make the page heavy.

    Raises:
        OSError: if it cannot be read as an image.
    """
    from PIL import Image

    content, kind = path.read_bytes(), "image/png"
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        natural = opened.width
        if natural > WIDEST_IMAGE or len(content) > HEAVIEST_IMAGE or opened.format != "PNG":
            small = opened.convert("RGB")
            small.thumbnail((WIDEST_IMAGE, 100 * WIDEST_IMAGE))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=90)
            content, kind = buffer.getvalue(), "image/jpeg"
    zoom = max(1, min(4, 320 // max(natural, 1)))
    link = path.relative_to(base).as_posix()
    return Picture(_data_uri(kind, content), alt, natural * zoom, title, caption, link)


def render(template: str, **content: Any) -> str:
    """A page of `templates/` as HTML; every string from outside is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("customized_grpo.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    return environment.get_template(template).render(**content)


def write(path: Path, html: str) -> Path:
    """Write a page, whole or not at all."""
    return store.write(path, html)


def cannot_write(folder: Path, error: OSError) -> UserError:
    """One sentence for a folder that takes no report."""
    return UserError(
        f"The report cannot be written into {folder} ({error.strerror or error}); free space or permit it."
    )


def number(value: float) -> str:
    """Three digits after the point for ordinary sizes, else as short as it is clear; a dash for NaN."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    size = abs(value)
    if size == 0:
        text = "0"
    elif size < 0.001:
        text = f"{value:.1e}".replace("e-0", "e-")
    else:
        text = f"{value:.3f}" if size < 10 else f"{value:.2f}" if size < 100 else f"{value:,.0f}"
    return text.replace("-", "\N{MINUS SIGN}")


def signed(value: float) -> str:
    """`number` with its sign."""
    return ("+" if value > 0 else "") + number(value)


def percent(value: float) -> str:
    return (
        "\N{EN DASH}"
        if not math.isfinite(value)
        else f"{100 * value:.0f} %"
        if value > 0.0995
        else f"{100 * value:.1f} %"
    )


def duration(seconds: float) -> str:
    """Such as 0.42 s, 7.3 s, 5 min 12 s, 3 h 04 min."""
    if not math.isfinite(seconds):
        return "\N{EN DASH}"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(value: Any) -> str:
    """Such as 960, 2,354,176 or 11.9 billion."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "\N{EN DASH}"
    return f"{value / 1e9:.1f} billion" if value >= 1e9 else f"{value:,.0f}"


def words(name: str) -> str:
    """A metric's name as words."""
    return name.replace("_", " ").replace("/", " ")


def listed(names: Sequence[str]) -> str:
    """Such as "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


FILTERS: Mapping[str, Callable[..., str]] = {
    "number": number,
    "signed": signed,
    "percent": percent,
    "duration": duration,
    "count": count,
    "words": words,
}


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
