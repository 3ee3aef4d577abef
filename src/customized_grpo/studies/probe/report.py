"""From a finished probe folder to findings.json, time_weights.json, and one page that shows them."""

import json
import shlex
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from customized_grpo import page
from customized_grpo.errors import UserError
from customized_grpo.functional.statistics import Interval
from customized_grpo.functional.time_weights import sigmoid_crossover
from customized_grpo.page.formats import count, duration, listed, parts, words
from customized_grpo.studies.probe.findings import Findings, conclude, to_dict
from customized_grpo.studies.probe.plots import COLOURS, MARKERS, Line, over_progress
from customized_grpo.studies.probe.record import ProbeFolder
from customized_grpo.train.fitted import save_time_weights

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
    """Write the page of findings that are there already, as probe.html and probe.md."""
    with page.writing(folder.path):
        return page.publish(contents(folder, found), folder.path, "probe")


def contents(folder: ProbeFolder, found: Findings) -> page.Page:
    """The page of a probe. Writes the plots."""
    info = folder.described()
    first, second = map(words, found.rewards[:2])
    answer = "Undecided:" if found.verdict.answer == "undecided" else f"The probe {found.verdict.answer}"
    sentence = found.verdict.sentence
    examples, branches = len(info["examples"]), info["settings"]["branches"]
    note = (
        f"{RULE} Intervals are 95 %, bootstrapped over {found.subjects} subjects. They hold for this policy, these "
        f"examples and this schedule."
    )
    return page.Page(
        kind="Probe",
        title=folder.path.name,
        badges=[f"{examples} examples × {branches} branches × {len(found.steps)} steps"],
        headline=f"{answer} “{first} is decided early, {second} late”.",
        lead=sentence[:1].upper() + sentence[1:],
        summary=[centre_cards(found), page.Text(note, "note"), page.Remarks(remarks(found))],
        sections=[
            page.Section("When is each reward decided?", [
                page.Text(
                    "Every example runs without noise up to a step, branches there with fresh noise, and continues "
                    "without noise. The variance among its branches is what the noise of that step decides."
                ),
                page.Figures(when_plots(folder.path, found)),
            ], name="When"),
            page.Section("Where do they compete?", [page.Figures(conflict_plots(folder.path, found))], name="Conflict"),
            page.Section("Time weights fitted to it", weight_blocks(folder, found), name="Fitted weights"),
            page.Section("Numbers", [table(found)], brief=True),
            page.Section("The probe", run_blocks(folder, info, found)),
        ],
        footer="Plots are beside this page in plots/ as SVG and PNG. docs/probe.md explains every number.",
    )  # fmt: skip


RULE = (
    "The rule, fixed beforehand: supports if the whole interval of the difference of the two means is above 0; "
    "does not support if it is below 0, or contains 0 and excludes a difference of one step; undecided otherwise, "
    "and if weighting the examples equally and by their variance do not give the same answer."
)


def centre_cards(found: Findings) -> page.Cards:
    """The mean progress at which each reward is decided."""
    return page.Cards([
        page.Card(words(name), centre[0], change=page.Plain(*centre), caption="mean progress of its decision", colour=c)
        for name, centre, c in zip(found.rewards, _rows(found.centre_each), cycle(COLOURS), strict=False)
    ])  # fmt: skip


def weight_blocks(folder: ProbeFolder, found: Findings) -> list[page.Block]:
    explained = (
        "At each step the weight of a reward is the share that the step decides of it (every example counts equally), "
        "relative to what the step decides of the others. No weight is below 0.2, so no reward is ever dropped."
    )
    config = f"method:\n  time_weights:\n    use: from_file\n    path: {folder.time_weights}"
    return [
        page.Figures([weights_plot(folder.path, found)]),
        page.Text(explained),
        page.Text("Train with them:"),
        page.Code(config),
    ]


def run_blocks(folder: ProbeFolder, info: dict[str, Any], found: Findings) -> list[page.Block]:
    command = shlex.join(map(str, info.get("command") or []))
    config = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
    versions = list(dict(info.get("versions") or {}).items())
    blocks: list[page.Block] = [page.Facts(facts(info, found))]
    blocks += [page.Text("Command:"), page.Code(command)] if command else []
    blocks += [page.Details("Configuration (config.yaml, can be run again)", [page.Code(config)])] if config else []
    return blocks + ([page.Details("Versions", [page.Facts(versions)])] if versions else [])


def remarks(found: Findings) -> list[page.Remark]:
    """What the reader should know before trusting the page."""
    said = []
    if 1 < found.subjects < FEW_SUBJECTS:
        said.append(
            page.Remark(f"Only {found.subjects} subjects: intervals that resample so few are too narrow.", serious=True)
        )
    if found.unscored:
        said.append(page.Remark(f"{found.unscored} of {found.pictures} pictures could not be scored and are left out."))
    sums = found.explained.estimate.sum(dim=0)
    if bool((sums < 0.6).any() | (sums > 1.6).any()):
        shares = listed([f"{s:.0%} ({name})" for s, name in zip(sums.tolist(), found.rewards, strict=True)])
        said.append(
            page.Remark(
                f"The steps one by one add up to {shares} of the variance of all together: they interact, or chance "
                f"is large, so single steps tell only part of the story."
            )
        )
    return said


def when_plots(folder: Path, found: Findings) -> list[page.Figure]:
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
        page.embed_plot(
            each, folder, "probe-shares", title="Share of each reward decided at each step",
            caption="Every example weighs alike, as in training. Each curve adds up to 100 %. Above: the mean progress "
            "of each reward, with its interval.",
        ),
        page.embed_plot(
            pooled, folder, "probe-shares-by-variance", title="The same, examples weighed by their variance",
            caption="What moves the mean reward. One example that varies much can rule it.",
        ),
        page.embed_plot(
            explained, folder, "probe-explained", title="Variance of one step against all together",
            caption="Each step's noise alone, relative to noise in all steps. The sum shows whether steps add up.",
        ),
    ]  # fmt: skip


def conflict_plots(folder: Path, found: Findings) -> list[page.Figure]:
    """Correlation of the two rewards among branches, and of their gradients."""
    first, second = found.rewards[:2]
    line = Line.of(f"{first} and {second}", found.correlation, COLOURS[0], MARKERS[0])
    drawn = over_progress(found.progress, [line], ylabel="correlation within groups", zero=True, limits=(-1, 1))
    pictures = [
        page.embed_plot(
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
            page.embed_plot(drawn, folder, "probe-cosine", title="Do their gradients pull together?", caption=caption)
        )
    return pictures


def weights_plot(folder: Path, found: Findings) -> page.Figure:
    """The fitted weights, beside the paper's where there are two rewards."""
    lines = _lines(found, found.weights)
    if len(found.rewards) == 2:
        paper = sigmoid_crossover(torch.tensor(found.progress, dtype=torch.float64))
        lines.append(Line(f"{words(found.rewards[0])} in the paper", paper[:, 0].numpy()))
    drawn = over_progress(found.progress, lines, ylabel="weight", limits=(0, 1))
    caption = "Smoothed shares of variance, one reward against the other, at least 0.2 each."
    return page.embed_plot(drawn, folder, "probe-weights", title="Fitted weights", caption=caption)


def table(found: Findings) -> page.Table:
    """A row for each step: shares of the variance, conflict, and the fitted weights."""
    names = [words(name) for name in found.rewards]
    cosines = [(name, c) for name, c in (("cosine", found.cosine), ("across subjects", found.cosine_across)) if c]
    columns = ["progress", *(f"{name} share" for name in names), "correlation", *(name for name, _ in cosines)]
    columns += [f"{name} weight" for name in names]
    rows = []
    for s, step in enumerate(found.steps):
        cells: list[page.Estimate | str] = [f"{found.progress[s]:.2f}"]
        cells += [page.Plain(*_at(found.shares_each, s, k)) for k in range(len(names))]
        cells += [page.Estimate(*_at(interval, s)) for interval in (found.correlation, *(c for _, c in cosines))]
        cells += [page.Plain(*_at(found.weights, s, k)) for k in range(len(names))]
        rows.append(page.Row(str(step), cells))
    title = "What each step decides; 95 % intervals below"
    return page.Table(columns, rows, first="step", title=title)


def facts(info: dict[str, Any], found: Findings) -> list[tuple[str, str]]:
    """The probe in a few lines."""
    settings, checkpoint = info["settings"], info.get("checkpoint")
    listed = [
        ("model", info.get("model")),
        ("weights", f"{checkpoint['run']}, iteration {checkpoint['iteration']}" if checkpoint else "as configured"),
        ("rewards", ", ".join(found.rewards)),
        ("examples", f"{len(info['examples'])} of {found.subjects} subjects, from the training data"),
        ("branches", f"{settings['branches']} at each of {len(found.steps)} of {found.num_inference_steps} steps"),
        ("pictures", count(found.pictures)),
        ("difference, by variance", _cell(found.difference)),
        ("difference, examples alike", _cell(found.difference_each)),
        ("seed", settings["seed"]),
        ("time", duration(info["seconds"]) if info.get("seconds") else None),
        ("started", str(info.get("started") or "").replace("T", " ")[:19]),
        ("hardware", info.get("hardware")),
    ]
    return [(name, str(value)) for name, value in listed if value not in (None, "")]


def _lines(found: Findings, interval: Interval) -> list[Line]:
    """A line for each column of (S, K)."""
    return [
        Line.of(
            words(name),
            Interval(*(bound[:, k] for bound in interval)),
            COLOURS[k % len(COLOURS)],
            MARKERS[k % len(MARKERS)],
        )
        for k, name in enumerate(found.rewards)
    ]


def _rows(interval: Interval) -> list[tuple[float, float, float]]:
    """(value, low, high) of every element of a vector."""
    return [(float(v), float(low), float(high)) for v, low, high in zip(*interval, strict=True)]


def _at(interval: Interval, *place: int) -> tuple[float, float, float]:
    value, low, high = (float(bound[place]) for bound in interval)
    return value, low, high


def _cell(interval: Interval) -> str:
    value, bounds = parts(page.Estimate(*_at(interval)))
    return f"{value} [{bounds}]" if bounds else value
