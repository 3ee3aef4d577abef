"""Numbers and lists as text, the same on every page."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from customized_grpo.page.blocks import Estimate, Share, Shift
from customized_grpo.store.scores import Scores, is_yes_or_no

ORACLE = {"oracle_prompt": "prompt shown", "oracle_subject": "subject kept", "oracle_right": "fully right"}
"""The metrics of the toy world's oracle as docs/metrics.md calls them."""
NO_SPREAD = "no spread"
"""In place of an interval without width, which a bootstrap of equal numbers makes."""
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def number(value: float) -> str:
    """Three digits after the point for ordinary sizes, else as short as it is clear; a dash for NaN."""
    if not math.isfinite(value):
        return DASH
    size = abs(value)
    if size == 0:
        text = "0"
    elif size < 0.001:
        text = f"{value:.1e}".replace("e-0", "e-")
    else:
        text = f"{value:.3f}" if size < 10 else f"{value:.2f}" if size < 100 else f"{value:,.0f}"
    return text.replace("-", MINUS)


def signed(value: float) -> str:
    """`number` with its sign."""
    return ("+" if value > 0 else "") + number(value)


def percent(value: float) -> str:
    if not math.isfinite(value):
        return DASH
    return f"{100 * value:.0f} %" if value > 0.0995 else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """Such as 0.42 s, 7.3 s, 5 min 12 s, 3 h 04 min."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(value: Any) -> str:
    """Such as 960, 2,354,176 or 11.9 billion."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return DASH
    return f"{value / 1e9:.1f} billion" if value >= 1e9 else f"{value:,.0f}"


def words(name: str) -> str:
    """A metric's name as words."""
    return ORACLE.get(name, name.replace("_", " ").replace("/", " "))


def summary(scores: Scores, kind: str | None = None) -> str:
    """The means in one line, or those of a kind of prompt, each with the number of images that were not scored.

    Where every image scores 0 or 1, images are counted.
    """
    part, told = scores if kind is None else scores.of_kind(kind), []
    for name, value in part.means().items():
        column = part.column(name)
        missing, scored = part.unscored(name), int(np.isfinite(column).sum())
        level = f"{(column == 1).sum()} of {scored}" if is_yes_or_no([scores], name) else f"{value:.3f}"
        told.append(f"{words(name)} {level}" + (f" ({missing} of {column.size} unscored)" if missing else ""))
    return "  ".join(told)


def listed(names: Sequence[str]) -> str:
    """Such as "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def parts(cell: Any) -> tuple[str, str]:
    """A table cell as its value and its interval, each as text; the interval may be empty."""
    if isinstance(cell, str):
        return cell, ""
    if isinstance(cell, Shift):
        return cell.levels, with_interval(cell.change)
    if not isinstance(cell, Estimate):
        return number(cell), ""
    if not math.isfinite(cell.value):
        return DASH, ""
    write = percent if isinstance(cell, Share) else number if cell.plain else signed
    if not math.isfinite(cell.low):
        return write(cell.value), ""
    if cell.high - cell.low <= 1e-6 * abs(cell.value):  # all are alike, which does not make it certain
        return write(cell.value), NO_SPREAD
    return write(cell.value), f"{write(cell.low)} to {write(cell.high)}"


def with_interval(estimate: Estimate) -> str:
    """A value with its interval in brackets, such as "+0.100 [+0.050, +0.150]"."""
    value, interval = parts(estimate)
    return f"{value} [{interval.replace(' to ', ', ')}]" if interval else value
