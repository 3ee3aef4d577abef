"""From a finished probe folder to findings.json, time_weights.json, and one page that shows them."""

import json
import shlex
from pathlib import Path
from typing import Any

import torch

from customized_grpo.errors import UserError
from customized_grpo.fitted import save_time_weights
from customized_grpo.functional.statistics import Interval
from customized_grpo.functional.time_weights import sigmoid_crossover
from customized_grpo.probe.findings import Findings, conclude, to_dict
from customized_grpo.probe.plots import COLOURS, MARKERS, Line, over_progress
from customized_grpo.probe.record import ProbeFolder
from customized_grpo.report import page
from customized_grpo.report.page import Picture, Remark

FEW_SUBJECTS = 10


def analyse(folder: ProbeFolder) -> Findings:
    """Findings of a finished probe, written to findings.json, and its fitted weights to time_weights.json.

    Raises:
        UserError: if steps are missing or damaged, or a reward did not move.
    """
    info, finished = folder.described(), folder.finished()
    steps = tuple(info["steps"])
    wanted = [*((step,) for step in steps), steps]
    missing = sum(key not in finished for key in wanted)
    if missing:
        raise UserError(
            f"The probe in '{folder.path}' is not finished, {missing} of {len(wanted)} measurements are missing; "
            f"go on with: cgrpo probe --resume {folder.path}"
        )
    subjects = [example["subject"] for example in info["examples"]]
    found = conclude([finished[key] for key in wanted], info["rewards"], subjects, info["num_inference_steps"])
    folder.write(folder.findings.name, json.dumps(to_dict(found), indent=1))
    source = {
        "made_by": "cgrpo probe",
        "verdict": found.verdict.answer,
        "examples": len(subjects),
        "subjects": found.subjects,
        **info["settings"],
        **{name: info.get(name) for name in ("checkpoint", "weights", "command", "versions", "hardware", "started")},
    }
    save_time_weights(
        folder.time_weights, found.progress, found.weights.estimate.tolist(), found.rewards, source
    )  # fmt: skip
    return found


def write_report(folder: Path) -> Path:
    """Write PROBE/probe.html, self-contained, and its plots as SVG and PNG into PROBE/plots.

    Raises:
        UserError: as `analyse`, or if the folder cannot be written.
    """
    probe = ProbeFolder.existing(folder)
    return write_page(probe, analyse(probe))


def write_page(folder: ProbeFolder, found: Findings) -> Path:
    """Write the page of findings that are there already."""
    try:
        return page.write(folder.path / "probe.html", page.render("probe.html", **contents(folder, found)))
    except OSError as error:
        raise page.cannot_write(folder.path, error) from error


def contents(folder: ProbeFolder, found: Findings) -> dict[str, Any]:
    """What `templates/probe.html` shows. Writes the plots."""
    info = folder.described()
    return {
        "title": folder.path.name,
        "examples": len(info["examples"]),
        "branches": info["settings"]["branches"],
        "steps": len(found.steps),
        "first": found.rewards[0],
        "second": found.rewards[1],
        "answer": found.verdict.answer,
        "sentence": found.verdict.sentence,
        "rule": RULE,
        "subjects": found.subjects,
        "cards": [
            {"name": name, "colour": COLOURS[k % len(COLOURS)], "value": value, "low": low, "high": high}
            for k, (name, (value, low, high)) in enumerate(zip(found.rewards, _rows(found.centre_each), strict=True))
        ],
        "remarks": remarks(found),
        "when": when_plots(folder.path, found),
        "conflict": conflict_plots(folder.path, found),
        "weights": weights_plot(folder.path, found),
        "weights_file": folder.time_weights,
        "header": header(found),
        "table": table(found),
        "facts": facts(info, found),
        "command": shlex.join(map(str, info.get("command") or [])),
        "config": folder.config.read_text(encoding="utf-8") if folder.config.is_file() else "",
        "versions": info.get("versions") or {},
    }


RULE = (
    "The rule, fixed beforehand: supports if the whole interval of the difference of the two means lies above 0; "
    "does not support if it lies below 0, or holds 0 and excludes a difference of one step; undecided otherwise, "
    "and if weighing the examples alike and by their variance do not give the same answer."
)


def remarks(found: Findings) -> list[Remark]:
    """What the reader should know before trusting the page."""
    said = []
    if 1 < found.subjects < FEW_SUBJECTS:
        said.append(
            Remark(f"Only {found.subjects} subjects: intervals that resample so few are too narrow.", serious=True)
        )
    if found.unscored:
        said.append(Remark(f"{found.unscored} of {found.pictures} pictures could not be scored and are left out."))
    sums = found.explained.estimate.sum(dim=0)
    if bool((sums < 0.6).any() | (sums > 1.6).any()):
        listed = page.listed([f"{s:.0%} ({name})" for s, name in zip(sums.tolist(), found.rewards, strict=True)])
        said.append(
            Remark(
                f"The steps one by one add up to {listed} of the variance of all together: they interact, or chance "
                f"is large, so single steps tell only part of the story."
            )
        )
    return said


def when_plots(folder: Path, found: Findings) -> list[Picture]:
    """Shares of each reward's variance, weighed both ways, and relative to noise in all steps."""
    tops = [
        interval.high.nan_to_num(0).maximum(interval.estimate).max() for interval in (found.shares, found.shares_each)
    ]
    each, pooled = (
        over_progress(
            found.progress,
            _lines(found, shares),
            ylabel="share of the reward's variance",
            centres=_rows(centre),
            limits=(0, float(max(tops)) * 1.05),
            percent=True,
        )
        for shares, centre in ((found.shares_each, found.centre_each), (found.shares, found.centre))
    )
    explained = over_progress(
        found.progress, _lines(found, found.explained), ylabel="of the variance with all steps noisy", percent=True
    )
    return [
        page.plot(
            each, folder, "probe-shares", title="Share of each reward decided at each step",
            caption="Every example weighs alike, as in training. Each curve adds up to 100 %. Above: the mean progress "
            "of each reward, with its interval.",
        ),
        page.plot(
            pooled, folder, "probe-shares-by-variance", title="The same, examples weighed by their variance",
            caption="What moves the mean reward. One example that varies much can rule it.",
        ),
        page.plot(
            explained, folder, "probe-explained", title="Variance of one step against all together",
            caption="Each step's noise alone, relative to noise in all steps. The sum shows whether steps add up.",
        ),
    ]  # fmt: skip


def conflict_plots(folder: Path, found: Findings) -> list[Picture]:
    """Correlation of the two rewards among branches, and of their gradients."""
    first, second = found.rewards[:2]
    line = Line.of(f"{first} and {second}", found.correlation, COLOURS[0], MARKERS[0])
    drawn = over_progress(found.progress, [line], ylabel="correlation within groups", zero=True, limits=(-1, 1))
    pictures = [
        page.plot(
            drawn, folder, "probe-correlation", title="Do the rewards agree on what a step decides?",
            caption="Below 0 they compete: noise that raises one lowers the other.",
        )
    ]  # fmt: skip
    if found.cosine is not None and found.cosine_across is not None:
        lines = [Line.of("these samples", found.cosine, COLOURS[0], MARKERS[0])]
        seen = int(found.cosine_across.estimate.isfinite().sum())
        if seen:
            lines.append(Line.of("across subjects", found.cosine_across, COLOURS[1], MARKERS[1]))
        drawn = over_progress(found.progress, lines, ylabel="cosine of the gradients", zero=True, limits=(-1.05, 1.05))
        caption = (
            "These samples: what one update would see. It holds noise that both gradients share. Across subjects, "
            f"where it drops out, what is left could be told from 0 at {seen} of {len(found.steps)} steps."
        )
        pictures.append(
            page.plot(drawn, folder, "probe-cosine", title="Do their gradients pull together?", caption=caption)
        )
    return pictures


def weights_plot(folder: Path, found: Findings) -> Picture:
    """The fitted weights, beside the paper's where there are two rewards."""
    lines = _lines(found, found.weights)
    if len(found.rewards) == 2:
        paper = sigmoid_crossover(torch.tensor(found.progress, dtype=torch.float64))
        lines.append(Line(f"{page.words(found.rewards[0])} in the paper", paper[:, 0].numpy()))
    drawn = over_progress(found.progress, lines, ylabel="weight", limits=(0, 1))
    caption = "Smoothed shares of variance, one reward against the other, at least 0.2 each."
    return page.plot(drawn, folder, "probe-weights", title="Fitted weights", caption=caption)


def header(found: Findings) -> list[str]:
    """Of `table`."""
    cosines = ["cosine", "across subjects"] if found.cosine is not None else []
    return [
        "step", "progress", *(f"{page.words(name)} share" for name in found.rewards), "correlation", *cosines,
        *(f"{page.words(name)} weight" for name in found.rewards),
    ]  # fmt: skip


def table(found: Findings) -> list[list[str]]:
    """A row for each step, as text: a value, and its interval in brackets."""
    rows = []
    for s, step in enumerate(found.steps):
        row = [str(step), f"{found.progress[s]:.2f}"]
        row += [_cell(found.shares_each, s, k, form="{:.0%}") for k in range(len(found.rewards))]
        row.append(_cell(found.correlation, s))
        row += [_cell(cosine, s) for cosine in (found.cosine, found.cosine_across) if cosine is not None]
        row += [_cell(found.weights, s, k, form="{:.2f}") for k in range(len(found.rewards))]
        rows.append(row)
    return rows


def facts(info: dict[str, Any], found: Findings) -> list[tuple[str, str]]:
    """The probe in a few lines."""
    settings, checkpoint = info["settings"], info.get("checkpoint")
    listed = [
        ("model", info.get("model")),
        ("weights", f"{checkpoint['run']}, iteration {checkpoint['iteration']}" if checkpoint else "as configured"),
        ("rewards", ", ".join(found.rewards)),
        ("examples", f"{len(info['examples'])} of {found.subjects} subjects, from the training data"),
        ("branches", f"{settings['branches']} at each of {len(found.steps)} of {found.num_inference_steps} steps"),
        ("pictures", page.count(found.pictures)),
        ("difference, by variance", _cell(found.difference, form="{:+.3f}")),
        ("difference, examples alike", _cell(found.difference_each, form="{:+.3f}")),
        ("seed", settings["seed"]),
        ("time", page.duration(info["seconds"]) if info.get("seconds") else None),
        ("started", str(info.get("started") or "").replace("T", " ")[:19]),
        ("hardware", info.get("hardware")),
    ]
    return [(name, str(value)) for name, value in listed if value not in (None, "")]


def _lines(found: Findings, interval: Interval) -> list[Line]:
    """A line for each column of (S, K)."""
    return [
        Line.of(
            page.words(name),
            Interval(*(bound[:, k] for bound in interval)),
            COLOURS[k % len(COLOURS)],
            MARKERS[k % len(MARKERS)],
        )
        for k, name in enumerate(found.rewards)
    ]


def _rows(interval: Interval) -> list[tuple[float, float, float]]:
    """(value, low, high) of every element of a vector."""
    return [(float(v), float(low), float(high)) for v, low, high in zip(*interval, strict=True)]


def _cell(interval: Interval, *place: int, form: str = "{:+.2f}") -> str:
    value, low, high = (float(bound[place]) for bound in interval)
    if value != value:
        return "\N{EN DASH}"
    bounds = f" [{form.format(low)}, {form.format(high)}]" if low == low and high == high else ""
    return (form.format(value) + bounds).replace("-", "\N{MINUS SIGN}")
