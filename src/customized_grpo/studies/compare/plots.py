"""Drawings of a comparison. Every function takes numbers and gives a figure; none knows what a grid is."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from customized_grpo.page import Estimate
from customized_grpo.page.plots import (
    BLUE,
    FAINT,
    GREEN,
    GRID,
    INK,
    VERMILLION,
    canvas,
    iteration_axis,
    legend,
    whiskers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Style:
    """How a method looks in every plot."""

    colour: str = "#9A9A9A"
    marker: str = "o"
    strong: bool = False
    """Drawn in front, with its interval as a band in curves."""


@dataclass(frozen=True)
class Point:
    """A method in the plane of two metrics."""

    label: str
    x: Estimate
    y: Estimate
    path: np.ndarray
    """(evaluations, 2), the last being the point."""
    style: Style


def plane(
    points: Sequence[Point], base: tuple[float, float], line: Sequence[str] = (), *, xlabel: str, ylabel: str
) -> Figure:
    """Where each method ends in the plane of two metrics, with intervals, its way there, and the Pareto front.

    Intervals of few seeds can be many times as long as the methods lie apart: such bars run out of the picture.

    Args:
        points: one for each method.
        base: where all of them begin.
        line: labels of the two points to draw a straight line through, if any.
    """
    figure, axes = canvas(6.4, max(4.2, 0.24 * sum(map(_height, points)) + 0.8))
    axes.axvline(base[0], color=FAINT, lw=1, ls=(0, (4, 3)))
    axes.axhline(base[1], color=FAINT, lw=1, ls=(0, (4, 3)))
    for point in sorted(points, key=lambda p: p.style.strong):
        colour, order = point.style.colour, 4 if point.style.strong else 3
        axes.plot(point.path[:, 0], point.path[:, 1], "-", color=colour, lw=1.2, alpha=0.6, zorder=order - 1)
        axes.errorbar(
            [point.x.value], [point.y.value], xerr=whiskers([point.x]), yerr=whiskers([point.y]), fmt="none",
            ecolor=colour, elinewidth=1.5 if point.style.strong else 0.8, capsize=2.5, zorder=order,
        )  # fmt: skip
        axes.plot(
            [point.x.value], [point.y.value], point.style.marker, color=colour, ms=8 if point.style.strong else 5.5,
            mec="white", mew=0.8, zorder=order + 1,
        )  # fmt: skip
    axes.plot([base[0]], [base[1]], "s", ms=8, color=INK, zorder=6)
    axes.annotate("base", base, (-7, -7), textcoords="offset points", ha="right", va="top", color=INK)
    _front(axes, points)
    ends = [(p.x.value, p.y.value) for p in points if p.label in line]
    if len(set(ends)) == 2:
        axes.axline(*ends, color=INK, lw=0.8, ls=(0, (8, 4)), alpha=0.6, zorder=1)
    _labels(axes, points)
    axes.set_xlabel(f"{xlabel}  \N{RIGHTWARDS ARROW} better")
    axes.set_ylabel(f"{ylabel}  \N{RIGHTWARDS ARROW} better")
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.set_xlim(_limits([p.x for p in points], [base[0], *(x for p in points for x in p.path[:, 0])]))
    axes.set_ylim(_limits([p.y for p in points], [base[1], *(y for p in points for y in p.path[:, 1])]))
    return figure


def _limits(ends: Sequence[Estimate], passed: Sequence[float]) -> tuple[float, float]:
    """An axis with all that is passed, and with the intervals as far as they leave that readable."""
    low, high = float(np.nanmin(passed)), float(np.nanmax(passed))
    room = max(high - low, 1e-3) / 2
    bounds = [bound for end in ends for bound in (end.low, end.high) if np.isfinite(bound)]
    low, high = max(min([low, *bounds]), low - room), min(max([high, *bounds]), high + room)
    margin = 0.08 * max(high - low, 1e-3)
    return low - margin, high + margin


def _front(axes: Axes, points: Sequence[Point]) -> None:
    """The stairs that no method is beyond."""
    corners: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (-p.x.value, -p.y.value)):
        if not corners or point.y.value > corners[-1][1]:
            corners.append((point.x.value, point.y.value))
    if len(corners) > 1:
        axes.step(*zip(*corners, strict=True), where="post", color=INK, lw=0.9, ls=":", zorder=2)


def _name(point: Point) -> str:
    return textwrap.fill(point.label, 17)


def _height(point: Point) -> float:
    """Of a point's name, with the room between two, in lines."""
    return 0.3 + 0.7 * (1 + _name(point).count("\n"))


def _labels(axes: Axes, points: Sequence[Point]) -> None:
    """Names in a column beside the plot, each tied to its point, so that none covers another."""
    ordered = sorted(points, key=lambda p: p.y.value)
    heights = np.array([_height(point) for point in ordered])
    places = (np.cumsum(heights) - heights / 2) / heights.sum()
    for point, place in zip(ordered, places, strict=True):
        axes.annotate(
            _name(point), (point.x.value, point.y.value), (1.04, place),
            xycoords="data", textcoords="axes fraction", va="center", fontsize=10,
            fontweight="bold" if point.style.strong else "normal",
            color=point.style.colour if point.style.strong else INK, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": point.style.colour, "lw": 0.7, "shrinkB": 3, "alpha": 0.7},
        )  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """A method's metric over training."""

    label: str
    levels: Sequence[Estimate]
    style: Style


def curves(iterations: Sequence[int], lines: Sequence[Curve], *, ylabel: str) -> Figure:
    """A metric over training, mean over seeds; bands around the strong ones.

    Args:
        iterations: those evaluated, for all lines.
        lines: one for each method.
    """
    figure, axes = canvas(5.0, 3.4)
    if lines and np.isfinite(lines[0].levels[0].value):
        axes.axhline(lines[0].levels[0].value, color=FAINT, lw=1, ls=(0, (4, 3)))
    at = np.asarray(iterations, dtype=float)
    for line in sorted(lines, key=lambda c: c.style.strong):
        low, middle, high = (np.array([getattr(e, k) for e in line.levels]) for k in ("low", "value", "high"))
        strong = line.style.strong
        axes.plot(
            at, middle, "-", marker=line.style.marker if strong else None, ms=5, mec="white", mew=0.6,
            color=line.style.colour, lw=2 if strong else 0.9, zorder=4 if strong else 2,
            label=f"{' ' * line.label.startswith('_')}{line.label}" if strong else None,  # a legend hides "_name"
        )  # fmt: skip
        if strong:
            axes.fill_between(at, low, high, color=line.style.colour, alpha=0.15, lw=0, zorder=1)
    if any(not line.style.strong for line in lines):
        axes.plot([], [], color=Style().colour, lw=0.9, label="the others")
    axes.set_ylabel(ylabel)
    iteration_axis(axes, [int(i) for i in iterations])
    legend(axes, loc="best")
    return figure


@dataclass(frozen=True)
class Bar:
    """One interval of a forest plot."""

    label: str
    estimate: Estimate
    style: Style


def forest(bars: Sequence[Bar], *, xlabel: str) -> Figure:
    """Differences with their intervals, largest at the top; filled where the interval is clear of zero."""
    figure, axes = canvas(5.6, 0.32 * len(bars) + 1.1)
    colours = {"rose": BLUE, "fell": VERMILLION, "unclear": FAINT}
    for row, bar in enumerate(sorted(bars, key=lambda b: b.estimate.value)):
        colour = colours[bar.estimate.verdict]
        axes.errorbar(
            [bar.estimate.value], [row], xerr=whiskers([bar.estimate]), fmt="none", ecolor=colour, capsize=3, lw=1.6
        )
        clear = bar.estimate.verdict != "unclear"
        axes.plot([bar.estimate.value], [row], "o", ms=6.5, color=colour, mfc=colour if clear else "white", mew=1.5)
    axes.axvline(0, color="black", lw=1)
    axes.set_yticks(range(len(bars)), [bar.label for bar in sorted(bars, key=lambda b: b.estimate.value)])
    axes.set_ylim(-0.7, len(bars) - 0.3)
    axes.set_xlabel(xlabel)
    axes.grid(visible=False)
    axes.grid(axis="x", color=GRID, lw=0.8)
    return figure


def conflict_bars(rows: Sequence[tuple[str, float, float, float]]) -> Figure:
    """Shares of training samples in conflict, both better and both worse than their group, a bar for each method.

    Args:
        rows: (label, conflict, both better, both worse), from the top.
    """
    figure, axes = canvas(5.6, 0.32 * len(rows) + 1.3)
    names, colours = ("conflict", "both better", "both worse"), (VERMILLION, GREEN, "#B5B5B5")
    for row, (_, *shares) in enumerate(reversed(rows)):
        left = 0.0
        for name, share, colour in zip(names, shares, colours, strict=True):
            width = share if np.isfinite(share) else 0.0
            axes.barh([row], [width], left=left, color=colour, height=0.72, label=name if row == 0 else None)
            if width > 0.08:
                axes.text(left + width / 2, row, f"{width:.0%}", ha="center", va="center", fontsize=9.5, color="black")
            left += width
    axes.axvline(0.5, color="black", lw=1.1, ls=(0, (4, 3)))
    axes.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)])
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("share of training samples; dashed: unrelated rewards")
    axes.grid(visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=10, borderaxespad=0.2)
    return figure


HIGHLIGHTS = (
    Style(BLUE, "D", True),
    Style(VERMILLION, "o", True),
    Style("#E69F00", "s", True),
    Style(GREEN, "^", True),
)
"""The candidate, the baseline, the other naive weights, and the best of the rest."""
OTHERS = tuple(Style(marker=marker) for marker in "ovP<X>p*h")
