"""Drawings of a probe: numbers over progress, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from customized_grpo.functional.statistics import Interval
from customized_grpo.page import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "D", "^", "v", "P")
COLOURS = plots.SERIES


@dataclass(frozen=True)
class Line:
    """One curve. Without bounds it is drawn thin and dashed: a line to compare with."""

    name: str
    value: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    colour: str = plots.BLUE
    marker: str = "o"

    @classmethod
    def of(cls, name: str, interval: Interval, colour: str, marker: str) -> Line:
        return cls(name, *(bound.double().numpy() for bound in interval), colour=colour, marker=marker)


def over_progress(
    progress: Sequence[float],
    lines: Sequence[Line],
    *,
    ylabel: str,
    centres: Sequence[tuple[float, float, float]] = (),
    zero: bool = False,
    limits: tuple[float, float] | None = None,
    percent: bool = False,
) -> Figure:
    """Curves over the denoising trajectory, with bands.

    Args:
        progress: shape (S,), 0 at noise, 1 at the image.
        lines: of shape (S,) each.
        ylabel: of the axis.
        centres: (value, low, high) in progress for the first lines, drawn above the curves.
        zero: draw the line at 0.
        limits: of the axis.
        percent: label the axis in percent.
    """
    figure, axes = plots.canvas(5.0, 3.4)
    x = np.asarray(progress)
    if zero:
        axes.axhline(0, color="black", lw=1)
    for line in lines:
        if line.low is None or line.high is None:
            axes.plot(x, line.value, color=plots.FAINT, lw=1.1, ls=(0, (4, 3)), label=line.name)
            continue
        axes.fill_between(x, line.low, line.high, color=line.colour, alpha=0.16, lw=0)
        axes.plot(x, line.value, color=line.colour, marker=line.marker, ms=5, lw=1.8, label=line.name)
    if limits:
        axes.set_ylim(*limits)
    if centres:
        _draw_centres(axes, centres, lines)
    axes.set_xlabel("progress: 0 is noise, 1 is the image")
    axes.set_ylabel(ylabel)
    axes.set_xlim(-0.03, max(1.0, float(x.max())) + 0.03)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    plots.legend(axes)
    return figure


def _draw_centres(axes: plots.Axes, centres: Sequence[tuple[float, float, float]], lines: Sequence[Line]) -> None:
    """Each centre with its interval as a horizontal bar in the colour and marker of its line, over the curves."""
    bottom, top = axes.get_ylim()
    gap = 0.07 * (top - bottom)
    for row, ((value, low, high), line) in enumerate(zip(centres, lines, strict=False)):
        height = top + gap * (len(centres) - row)
        if np.isfinite(low) and np.isfinite(high):
            axes.plot([low, high], [height, height], color=line.colour, lw=2.2, solid_capstyle="butt")
        axes.plot([value], [height], line.marker, color=line.colour, ms=7, mec="white")
    axes.axhline(top + 0.3 * gap, color=plots.GRID, lw=1)
    axes.text(
        1.0, top + gap * (len(centres) + 1) / 2, "centre", transform=axes.get_yaxis_transform(), ha="right",
        va="center", color=plots.FAINT, fontsize=10,
    )  # fmt: skip
    axes.set_ylim(bottom, top + gap * (len(centres) + 1))
