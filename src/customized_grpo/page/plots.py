"""Plots. Every function takes arrays and returns a figure; none knows what a run is.

The colours of Okabe and Ito can be told apart with any colour vision, and nothing is shown by colour alone.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from customized_grpo.page.blocks import Estimate
from customized_grpo.store import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
SERIES = (BLUE, ORANGE, PURPLE, GREEN, SKY, VERMILLION)
STYLES = tuple(zip(SERIES, ("o", "s", "D", "^", "v", "P"), strict=True))
"""(colour, marker) of lines, in their order."""
DASHES = ("-", "--", ":", "-.")
INK, FAINT, GRID = "#222222", "#767676", "#E4E4E4"

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 11.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "customized-grpo",
    "axes.unicode_minus": True,
    "text.parse_math": False,
}


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write NAME.svg and NAME.png into `folder`; returns the path of the SVG.

    Text is drawn as it is: a `$` in the name of a reward does not begin a formula. Characters of NAME that a file name
    cannot hold everywhere are replaced, with a checksum so that different names stay different.
    """
    import matplotlib
    from matplotlib.text import Text

    stem = re.sub(r"[^\w.-]+", "-", name)[:80]
    path = folder / f"{stem if stem == name else f'{stem}-{crc32(name.encode()):08x}'}.svg"
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # pyright: ignore[reportAttributeAccessIssue]
    with matplotlib.rc_context(_STYLE), replacing(path) as svg, replacing(path.with_suffix(".png")) as png:
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.set_layout_engine("none")
        figure.savefig(png, format="png", dpi=150)
    return path


def training_curve(
    iterations: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
    evaluated: Sequence[int],
    levels: Sequence[Estimate],
    *,
    colour: str = BLUE,
    ylabel: str = "",
) -> Figure:
    """A reward over training: what the policy's own samples got, and the held-out evaluations.

    Args:
        iterations, mean, std: shape (rows,); the standard deviation is drawn as a band of mean +- std.
        evaluated, levels: iterations and intervals of the evaluations, of one length; the first level is the base line.
    """
    figure, axes = canvas(5.0, 3.2)
    shown = np.isfinite(mean)
    if shown.any():
        axes.fill_between(iterations, mean - std, mean + std, where=shown, color=colour, alpha=0.13, lw=0)
        marker = "o" if shown.sum() == 1 else None
        axes.plot(iterations, mean, color=colour, alpha=0.55, lw=1.1, marker=marker, ms=3, label="training samples")
    if len(levels) > 1 and np.isfinite(levels[0].value):
        axes.axhline(levels[0].value, color=FAINT, lw=1, ls=(0, (4, 3)))
    _draw_levels(axes, evaluated, levels, colour)
    axes.set_ylabel(ylabel)
    iteration_axis(axes, [*iterations, *evaluated])
    legend(axes)
    return figure


def by_kind(evaluated: Sequence[int], lines: Mapping[str, Sequence[Estimate]], *, ylabel: str) -> Figure:
    """Held-out levels of one metric over training, a line for each kind of prompt, with intervals at its end."""
    figure, axes = canvas(5.0, 3.4)
    for n, (kind, levels) in enumerate(lines.items()):
        (colour, marker), dash = STYLES[n % len(STYLES)], DASHES[n // len(STYLES) % len(DASHES)]
        values = np.array([level.value for level in levels])
        axes.plot(evaluated, values, ls=dash, marker=marker, ms=4, color=colour, lw=1.8, label=kind)
        axes.errorbar(
            evaluated[-1:], values[-1:], yerr=whiskers(levels[-1:]), fmt="none", color=colour, capsize=3, lw=1.2
        )
    axes.set_ylabel(ylabel)
    iteration_axis(axes, evaluated)
    axes.margins(y=0.1)
    legend(axes, ncols=2 if len(lines) > 6 else 1)
    return figure


@dataclass(frozen=True)
class Track:
    """Where training went in the plane of two metrics: an estimate of each at every evaluation."""

    name: str
    x: Sequence[Estimate]
    y: Sequence[Estimate]
    colour: str = BLUE
    marker: str = "o"
    strong: bool = True
    """Drawn in front, with its name in bold."""

    @property
    def end(self) -> tuple[float, float]:
        return self.x[-1].value, self.y[-1].value


def plane(
    tracks: Sequence[Track],
    origin: tuple[float, float],
    *,
    xlabel: str,
    ylabel: str,
    start: str = "base",
    line: Sequence[str] = (),
) -> Figure:
    """Where training ends in the plane of two metrics, with intervals, the path there, and the Pareto front.

    Above and to the right of the dashed lines both are better than at the start. Intervals of few seeds can be many
    times as long as the distance between methods: such bars run out of the plot.

    Args:
        tracks: one for each method.
        origin: where all of them start.
        xlabel, ylabel: of the axes.
        start: name of the origin.
        line: names of the two tracks to draw a straight line through the ends of, if any.
    """
    figure, axes = canvas(6.4, max(4.2, 0.24 * sum(map(_height, tracks)) + 0.8))
    axes.axvline(origin[0], color=FAINT, lw=1, ls=(0, (4, 3)))
    axes.axhline(origin[1], color=FAINT, lw=1, ls=(0, (4, 3)))
    for track in sorted(tracks, key=lambda t: t.strong):
        order, x, y = 4 if track.strong else 3, track.x[-1], track.y[-1]
        path = ([e.value for e in track.x], [e.value for e in track.y])
        axes.plot(*path, ".-", ms=3, color=track.colour, lw=1.2, alpha=0.6, zorder=order - 1)
        axes.errorbar(
            [x.value], [y.value], xerr=whiskers([x]), yerr=whiskers([y]), fmt="none", ecolor=track.colour,
            elinewidth=1.5 if track.strong else 0.8, capsize=2.5, zorder=order,
        )  # fmt: skip
        axes.plot(
            [x.value], [y.value], track.marker, color=track.colour, ms=8 if track.strong else 5.5, mec="white", mew=0.8,
            zorder=order + 1,
        )  # fmt: skip
    axes.plot([origin[0]], [origin[1]], "s", ms=8, color=INK, zorder=6)
    axes.annotate(start, origin, (-7, -7), textcoords="offset points", ha="right", va="top", color=INK)
    _front(axes, tracks)
    ends = [track.end for track in tracks if track.name in line]
    if len(set(ends)) == 2:
        axes.axline(*ends, color=INK, lw=0.8, ls=(0, (8, 4)), alpha=0.6, zorder=1)
    _name_ends(axes, tracks)
    axes.set_xlabel(f"{xlabel}  \N{RIGHTWARDS ARROW} better")
    axes.set_ylabel(f"{ylabel}  \N{RIGHTWARDS ARROW} better")
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.set_xlim(_limits([t.x for t in tracks], origin[0]))
    axes.set_ylim(_limits([t.y for t in tracks], origin[1]))
    return figure


def _limits(paths: Sequence[Sequence[Estimate]], origin: float) -> tuple[float, float]:
    """An axis with all that is passed, and with the intervals at the ends as far as they leave that readable."""
    passed = [origin, *(estimate.value for path in paths for estimate in path)]
    low, high = float(np.nanmin(passed)), float(np.nanmax(passed))
    room = max(high - low, 1e-3) / 2
    bounds = [bound for path in paths for bound in (path[-1].low, path[-1].high) if np.isfinite(bound)]
    low, high = max(min([low, *bounds]), low - room), min(max([high, *bounds]), high + room)
    margin = 0.08 * max(high - low, 1e-3)
    return low - margin, high + margin


def _front(axes: Axes, tracks: Sequence[Track]) -> None:
    """The stairs that no track ends beyond."""
    corners: list[tuple[float, float]] = []
    for x, y in sorted((track.end for track in tracks), reverse=True):
        if not corners or y > corners[-1][1]:
            corners.append((x, y))
    if len(corners) > 1:
        axes.step(*zip(*corners, strict=True), where="post", color=INK, lw=0.9, ls=":", zorder=2)


def _height(track: Track) -> float:
    """Of a name, with the room between two, in lines."""
    return 0.3 + 0.7 * len(textwrap.wrap(track.name, 17) or [""])


def _name_ends(axes: Axes, tracks: Sequence[Track]) -> None:
    """Names in a column beside the plot, each tied to the end of its track, so that none covers another."""
    ordered = sorted(tracks, key=lambda t: t.end[1])
    heights = np.array([_height(track) for track in ordered])
    places = (np.cumsum(heights) - heights / 2) / heights.sum()
    for track, place in zip(ordered, places, strict=True):
        axes.annotate(
            textwrap.fill(track.name, 17), track.end, (1.04, place), xycoords="data", textcoords="axes fraction",
            va="center", fontsize=10, fontweight="bold" if track.strong else "normal",
            color=track.colour if track.strong else INK, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": track.colour, "lw": 0.7, "shrinkB": 3, "alpha": 0.7},
        )  # fmt: skip


def forest(bars: Sequence[tuple[str, Estimate]], *, xlabel: str) -> Figure:
    """Named differences with their intervals, largest at the top; filled where the interval is clear of zero."""
    figure, axes = canvas(5.6, 0.32 * len(bars) + 1.1)
    ordered = sorted(bars, key=lambda bar: bar[1].value)
    for row, (_, found) in enumerate(ordered):
        colour = {"rose": BLUE, "fell": VERMILLION, "unclear": FAINT}[found.verdict]
        filled = "white" if found.verdict == "unclear" else colour
        axes.errorbar([found.value], [row], xerr=whiskers([found]), fmt="none", ecolor=colour, capsize=3, lw=1.6)
        axes.plot([found.value], [row], "o", ms=6.5, color=colour, mfc=filled, mew=1.5)
    axes.axvline(0, color="black", lw=1)
    axes.set_yticks(range(len(bars)), [name for name, _ in ordered])
    axes.set_ylim(-0.7, len(bars) - 0.3)
    axes.set_xlabel(xlabel)
    axes.grid(visible=False)
    axes.grid(axis="x", color=GRID, lw=0.8)
    return figure


def conflict_shares(iterations: np.ndarray, shares: dict[str, np.ndarray], *, window: int = 1) -> Figure:
    """Stacked shares of samples over training, the first at the bottom, with the line that chance would give.

    Args:
        iterations: shape (rows,).
        shares: name to (rows,) in [0, 1]; at most three.
        window: iterations of the running mean.
    """
    figure, axes = canvas(5.0, 3.2)
    colours = (VERMILLION, GREEN, "#B5B5B5")
    base = np.zeros(len(iterations))
    for (name, share), colour in zip(shares.items(), colours, strict=False):
        top = base + running_mean(share, window)
        if len(iterations) > 1:
            axes.fill_between(iterations, base, top, color=colour, alpha=0.8, lw=0)
        else:
            axes.bar(iterations, top - base, bottom=base, width=0.6, color=colour, alpha=0.8)
        drawn = np.flatnonzero(np.isfinite(top))
        if len(drawn) and (average := float(np.nanmean(share))) > 0.06:
            middle = drawn[len(drawn) // 2]
            axes.text(
                float(iterations[middle]), float((base[middle] + top[middle]) / 2), f"{name}  {average:.0%}",
                ha="center", va="center", color="black", fontsize=11, fontweight="bold",
            )  # fmt: skip
        base = top
    axes.axhline(0.5, color="black", lw=1.1, ls=(0, (4, 3)))
    axes.annotate(
        "chance", (1, 0.5), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
        va="center", fontsize=10, annotation_clip=False,
    )  # fmt: skip
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of samples")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(visible=False)
    iteration_axis(axes, iterations)
    if len(iterations) > 1:
        axes.set_xlim(iterations[0], iterations[-1])
    return figure


def correlation(iterations: np.ndarray, values: np.ndarray, *, window: int = 1) -> Figure:
    """Correlation over training between -1 and 1, raw and as a running mean. Shapes (rows,)."""
    figure, axes = canvas(5.0, 3.2)
    axes.axhline(0, color="black", lw=1)
    axes.plot(iterations, values, color=BLUE, alpha=0.35, lw=1, marker="o", ms=2.5, label="each iteration")
    if window > 1:
        axes.plot(iterations, running_mean(values, window), color=BLUE, lw=2, label=f"mean of {window}")
    axes.set_ylim(-1, 1)
    axes.set_yticks([-1, -0.5, 0, 0.5, 1])
    axes.set_ylabel("correlation within groups")
    for height, word, va in ((0.97, "rewards agree", "top"), (-0.97, "rewards compete", "bottom")):
        axes.text(0.01, height, word, transform=axes.get_yaxis_transform(), va=va, color=FAINT, fontsize=10)
    iteration_axis(axes, iterations)
    if window > 1:
        legend(axes, loc="upper right")
    return figure


def vital_sign(
    iterations: np.ndarray, values: np.ndarray, *, band: tuple[float, float] | None = None, logarithmic: bool = False
) -> Figure:
    """A small curve of one diagnostic, its healthy band in green; points outside it are marked. Shapes (rows,)."""
    figure, axes = canvas(3.4, 2.1)
    marker = "o" if np.isfinite(values).sum() <= 2 else None
    axes.plot(iterations, values, color=BLUE, lw=1.3, marker=marker, ms=3)
    positive = values[values > 0]
    if logarithmic and len(positive) and positive.max() > 30 * positive.min():
        axes.set_yscale("log")
    if band is not None:
        outside = (values < band[0]) | (values > band[1])
        axes.plot(iterations[outside], values[outside], "x", color=VERMILLION, ms=6, mew=1.8)
        low, high = axes.get_ylim()
        margin = 0.1 * (high - low)
        low, high = min(low, band[1] - margin), max(high, band[0] + margin)  # some of the band is always seen
        axes.axhspan(max(low, band[0]), min(high, band[1]), color=GREEN, alpha=0.12, lw=0, zorder=0)
        axes.set_ylim(low, high)
    iteration_axis(axes, iterations)
    axes.set_xlabel("")
    return figure


@dataclass(frozen=True)
class Line:
    """A curve with its intervals as a band. Without a marker it is thin and dashed: a line to compare with."""

    name: str
    levels: Sequence[Estimate]
    colour: str = FAINT
    marker: str = ""


def lines(
    x: Sequence[float],
    drawn: Sequence[Line],
    *,
    xlabel: str,
    ylabel: str,
    zero: bool = False,
    limits: tuple[float, float] | None = None,
    percent: bool = False,
) -> Figure:
    """Curves over x, with bands.

    Args:
        x: shape (S,).
        drawn: curves of S levels each; those without a finite value are left out.
        xlabel, ylabel: of the axes.
        zero: draw the line at 0.
        limits: of the y axis.
        percent: label the y axis in percent.
    """
    figure, axes = canvas(5.0, 3.4)
    if zero:
        axes.axhline(0, color="black", lw=1)
    for line in drawn:
        value, low, high = np.array(line.levels, dtype=float).T
        if not np.isfinite(value).any():
            continue
        label = re.sub("^_", " _", line.name)  # a legend hides "_name"
        if not line.marker:
            axes.plot(x, value, color=line.colour, lw=1.1, ls=(0, (4, 3)), label=label)
            continue
        axes.fill_between(x, low, high, color=line.colour, alpha=0.16, lw=0)
        axes.plot(x, value, color=line.colour, marker=line.marker, ms=5, lw=1.8, label=label)
    if limits:
        axes.set_ylim(*limits)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    legend(axes)
    return figure


def above(axes: Axes, levels: Sequence[Estimate], drawn: Sequence[Line], name: str) -> None:
    """Above the curves, a level in x for each line: a horizontal bar in the line's colour, with its marker."""
    bottom, top = axes.get_ylim()
    gap = 0.07 * (top - bottom)
    for row, (level, line) in enumerate(zip(levels, drawn, strict=False)):
        height = top + gap * (len(levels) - row)
        axes.plot([level.low, level.high], [height, height], color=line.colour, lw=2.2, solid_capstyle="butt")
        axes.plot([level.value], [height], line.marker, color=line.colour, ms=7, mec="white")
    axes.axhline(top + 0.3 * gap, color=GRID, lw=1)
    axes.text(
        1.0, top + gap * (len(levels) + 1) / 2, name, transform=axes.get_yaxis_transform(), ha="right", va="center",
        color=FAINT, fontsize=10,
    )  # fmt: skip
    axes.set_ylim(bottom, top + gap * (len(levels) + 1))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over the finite values among `window` neighbours; shape kept."""
    if window <= 1 or not len(values):
        return values
    kernel = np.ones(window)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="full")
    count = np.convolve(finite.astype(float), kernel, mode="full")
    start = (window - 1) // 2
    kept = slice(start, start + len(values))
    return np.where(count[kept] > 0, total[kept] / np.maximum(count[kept], 1), np.nan)


def _draw_levels(axes: Axes, evaluated: Sequence[int], levels: Sequence[Estimate], colour: str) -> None:
    known = list(zip(evaluated, levels, strict=True))
    known = [(iteration, interval) for iteration, interval in known if np.isfinite(interval.value)]
    if not known:
        return
    intervals = [interval for _, interval in known]
    axes.errorbar(
        [iteration for iteration, _ in known], [interval.value for interval in intervals], yerr=whiskers(intervals),
        fmt="-o", color=colour, ms=5.5, mec="white", mew=0.8, lw=2, elinewidth=1.4, capsize=3, zorder=4,
        label="held-out evaluation",
    )  # fmt: skip


def whiskers(intervals: Sequence[Estimate]) -> np.ndarray:
    """(2, n) distances below and above; NaN, which is not drawn, where there is no interval."""
    below = [interval.value - interval.low for interval in intervals]
    above = [interval.high - interval.value for interval in intervals]
    return np.array([below, above]).clip(min=0)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of width x height inches without pyplot, so nothing is global."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=3)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def iteration_axis(axes: Axes, iterations: Sequence[int] | np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(set(map(int, iterations))) == 1:
        axes.set_xlim(int(iterations[0]) - 1, int(iterations[0]) + 1)


def legend(axes: Axes, **where: Any) -> None:
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=10, **where)
