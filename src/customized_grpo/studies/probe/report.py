"""Write findings.json, time_weights.json and a page from a finished probe folder."""

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from customized_grpo import page
from customized_grpo.errors import UserError
from customized_grpo.functional.statistics import Interval
from customized_grpo.functional.time_weights import sigmoid_crossover
from customized_grpo.page import Plain, plots
from customized_grpo.page.formats import count, duration, listed, words
from customized_grpo.page.plots import Line
from customized_grpo.shell import command
from customized_grpo.store.scores import Estimate, estimates
from customized_grpo.studies.probe.findings import Findings, conclude, to_dict
from customized_grpo.studies.probe.record import ProbeFolder
from customized_grpo.train.fitted import save_time_weights

PROVENANCE = ("checkpoint", "weights", "command", "versions", "hardware", "started")
RULE = (
    "The rule, fixed beforehand: supports if the whole interval of the difference of the two means is above 0; "
    "does not support if it is below 0, or contains 0 and excludes a difference of one step; undecided otherwise, "
    "and if weighting the examples equally and by their variance do not give the same answer."
)
METHOD = (
    "Every example runs without noise up to a step, branches there with fresh noise, and continues without noise. The "
    "variance among its branches is what the noise of that step decides."
)
WEIGHTS = (
    "The weight of a reward at a step is the share of it that the step decides (every example counts equally), "
    "relative to the shares of the other rewards, and at least 0.2. Train with them:"
)


def analyse(folder: ProbeFolder) -> Findings:
    """Findings of a finished probe, written to findings.json, and its fitted weights to time_weights.json.

    Raises:
        UserError: if steps are missing or damaged, or a reward did not move.
    """
    wanted = {"steps": list, "examples": list, "rewards": list, "settings": dict, "num_inference_steps": int}
    info, finished = folder.read_facts(**wanted), folder.finished()
    wanted = [*((step,) for step in info["steps"]), tuple(info["steps"])]
    if missing := sum(key not in finished for key in wanted):
        raise UserError(
            f"The probe in '{folder.path}' is not finished, {missing} of {len(wanted)} measurements are missing; "
            f"resume it with: {command('probe', '--resume', folder.path)}"
        )
    subjects = [example["subject"] for example in info["examples"]]
    found = conclude([finished[key] for key in wanted], info["rewards"], subjects, info["num_inference_steps"])
    folder.write("findings.json", json.dumps(to_dict(found), indent=1))
    counts = {"examples": len(subjects), "subjects": found.subjects}
    source = {"made_by": "cgrpo probe", "verdict": found.verdict.answer, **info["settings"], **counts}
    source |= {name: info.get(name) for name in PROVENANCE}
    save_time_weights(folder.time_weights, found.progress, found.weights.estimate.tolist(), found.rewards, source)
    return found


def write_report(folder: Path) -> Path:
    """Write PROBE/probe.html, self-contained, the same as probe.md, and its plots as SVG and PNG into PROBE/plots.

    Raises:
        UserError: as `analyse`, or if the folder cannot be written.
    """
    probe = ProbeFolder.existing(folder)
    return page.publish(contents(probe, analyse(probe)), probe.path, "probe")


def show(folder: ProbeFolder, found: Findings, console: Console) -> Path:
    """Write the page of findings, and show it in the terminal."""
    weights = f"method.time_weights={{use: from_file, path: {folder.time_weights}}}"
    return page.present(console, contents(folder, found), folder.path, "probe", next=command("train", weights))


def contents(folder: ProbeFolder, found: Findings) -> page.Page:
    """The page of a probe. Writes the plots."""
    info = folder.read_facts()
    first, second = map(words, found.rewards[:2])
    answer = "Undecided:" if found.verdict.answer == "undecided" else f"The probe {found.verdict.answer}"
    sentence, path, branches = found.verdict.sentence, folder.path, info["settings"]["branches"]
    config = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
    note = (
        f"{RULE} Intervals are 95 %, bootstrapped over {found.subjects} subjects. They hold for this policy, these "
        f"examples and this schedule."
    )
    return page.Page(
        kind="Probe",
        title=path.name,
        badges=[f"{len(info['examples'])} examples × {branches} branches × {len(found.steps)} steps"],
        headline=f"{answer} “{first} is decided early, {second} late”.",
        lead=sentence[:1].upper() + sentence[1:],
        summary=[centre_cards(found), page.Text(note, "note"), page.Remarks(remarks(found))],
        sections=[
            page.Section("When is each reward decided?", [
                page.Text(METHOD), page.Figures(when_plots(path, found)),
            ], name="When"),
            page.Section("Where do they compete?", [page.Figures(conflict_plots(path, found))], name="Conflict"),
            page.Section("Time weights fitted to it", [
                page.Figures([weights_plot(path, found)]), page.Text(WEIGHTS),
                page.Code(f"method:\n  time_weights:\n    use: from_file\n    path: {folder.time_weights}"),
            ], name="Fitted weights"),
            page.Section("Numbers", [table(found)], brief=True),
            page.Section("The probe", page.origin(info, facts(info, found), config)),
        ],
        footer="Plots are beside this page in plots/ as SVG and PNG. docs/probe.md explains every number.",
    )  # fmt: skip


def centre_cards(found: Findings) -> page.Cards:
    """The mean progress at which each reward is decided."""
    levels, caption = estimates(found.centre_each), "mean progress of its decision"
    return page.Cards([
        page.Card(words(name), level.value, change=Plain(*level), caption=caption, colour=colour)
        for name, level, (colour, _) in zip(found.rewards, levels, cycle(plots.STYLES), strict=False)
    ])  # fmt: skip


def remarks(found: Findings) -> list[page.Remark]:
    """What the reader should know before trusting the page."""
    said = page.few_subjects(found.subjects)
    if found.unscored:
        said.append(page.Remark(f"{found.unscored} of {found.images} images could not be scored and are left out."))
    sums = found.explained.estimate.sum(dim=0)
    if bool((sums < 0.6).any() | (sums > 1.6).any()):
        shares = listed([f"{s:.0%} ({name})" for s, name in zip(sums.tolist(), found.rewards, strict=True)])
        said.append(page.Remark(
            f"The steps one by one add up to {shares} of the variance of all together: they interact, or chance is "
            f"large, so single steps tell only part of the story."
        ))  # fmt: skip
    return said


def facts(info: dict[str, Any], found: Findings) -> list[tuple[str, Any]]:
    """The probe in a few lines."""
    settings, checkpoint = info["settings"], info.get("checkpoint")
    return [
        ("model", info.get("model")),
        ("weights", f"{checkpoint['run']}, iteration {checkpoint['iteration']}" if checkpoint else "as configured"),
        ("rewards", ", ".join(found.rewards)),
        ("examples", f"{len(info['examples'])} of {found.subjects} subjects, from the training data"),
        ("branches", f"{settings['branches']} at each of {len(found.steps)} of {found.num_inference_steps} steps"),
        ("images", count(found.images)),
        ("seed", settings["seed"]),
        ("time", duration(info["seconds"]) if info.get("seconds") else None),
    ]


def table(found: Findings) -> page.Table:
    """A row for each step: shares of the variance, conflict, and the fitted weights."""
    numbers: dict[str, list[Any]] = {"progress": [f"{progress:.2f}" for progress in found.progress]}
    numbers |= {f"{name} share": levels for name, levels in _columns(found, found.shares_each).items()}
    conflicts = {"correlation": found.correlation, "cosine": found.cosine, "across subjects": found.cosine_across}
    numbers |= {name: estimates(interval) for name, interval in conflicts.items() if interval is not None}
    numbers |= {f"{name} weight": levels for name, levels in _columns(found, found.weights).items()}
    rows = [(str(step), {name: column[s] for name, column in numbers.items()}) for s, step in enumerate(found.steps)]
    return page.table(rows, first="step", title="What each step decides; 95 % intervals below")


# ---- plots


def when_plots(folder: Path, found: Findings) -> list[page.Figure]:
    """Shares of each reward's variance with both weightings, and relative to noise in all steps."""
    tops = [x.high.nan_to_num(0).maximum(x.estimate).max() for x in (found.shares, found.shares_each)]
    axes: dict[str, Any] = {"percent": True, "limits": (0, 1.05 * float(max(tops)))}
    return [
        _plot(
            folder, found, "shares", "Share of each reward decided at each step", _lines(found, found.shares_each),
            "Every example has equal weight, as in training. Each curve adds up to 100 %. Above: the mean progress of "
            "each reward, with its interval.",
            centres=estimates(found.centre_each), ylabel="share of the reward's variance", **axes,
        ),
        _plot(
            folder, found, "shares-by-variance", "The same, examples weighted by their variance",
            _lines(found, found.shares),
            "These shares are of the variance of the mean reward. One example with a high variance can dominate them.",
            centres=estimates(found.centre), ylabel="share of the reward's variance", **axes,
        ),
        _plot(
            folder, found, "explained", "Variance of one step against all together", _lines(found, found.explained),
            "Each step's noise alone, relative to noise in all steps. The sum shows whether steps add up.",
            ylabel="of the variance with all steps noisy", percent=True,
        ),
    ]  # fmt: skip


def conflict_plots(folder: Path, found: Findings) -> list[page.Figure]:
    """Correlation of the two rewards among branches, and of their gradients."""
    line = Line(" and ".join(found.rewards[:2]), estimates(found.correlation), *plots.STYLES[0])
    drawn = [
        _plot(
            folder, found, "correlation", "Do the rewards agree on what a step decides?", [line],
            "Below 0 they compete: noise that raises one lowers the other.",
            ylabel="correlation within groups", zero=True, limits=(-1, 1),
        )
    ]  # fmt: skip
    if found.cosine is not None and found.cosine_across is not None:
        seen = int(found.cosine_across.estimate.isfinite().sum())
        lines = [Line("these samples", estimates(found.cosine), *plots.STYLES[0])]
        lines.append(Line("across subjects", estimates(found.cosine_across), *plots.STYLES[1]))
        caption = (
            f"These samples: the gradients of one update, which share their noise. Across subjects, where that noise "
            f"drops out, the cosine could be estimated at {seen} of {len(found.steps)} steps."
        )
        drawn.append(_plot(
            folder, found, "cosine", "Do their gradients pull together?", lines, caption,
            ylabel="cosine of the gradients", zero=True, limits=(-1.05, 1.05),
        ))  # fmt: skip
    return drawn


def weights_plot(folder: Path, found: Findings) -> page.Figure:
    """The fitted weights, beside the paper's where there are two rewards."""
    lines = _lines(found, found.weights)
    if len(found.rewards) == 2:
        paper = sigmoid_crossover(torch.tensor(found.progress, dtype=torch.float64))[:, 0]
        lines.append(Line(f"{words(found.rewards[0])} in the paper", [Estimate(x, x, x) for x in paper.tolist()]))
    caption = "Smoothed shares of variance, one reward against the other, at least 0.2 each."
    return _plot(folder, found, "weights", "Fitted weights", lines, caption, ylabel="weight", limits=(0, 1))


def _plot(
    folder: Path, found: Findings, name: str, title: str, lines: list[Line], caption: str, *,
    centres: list[Estimate] | None = None, **axes: Any,
) -> page.Figure:  # fmt: skip
    figure = plots.lines(found.progress, lines, xlabel="progress: 0 is noise, 1 is the image", **axes)
    figure.axes[0].set_xlim(-0.03, 1.03)
    if centres:
        plots.above(figure.axes[0], centres, lines, "centre")
    return page.embed_plot(figure, folder, f"probe-{name}", title=title, caption=caption)


def _lines(found: Findings, interval: Interval) -> list[Line]:
    """A line for each reward of (S, K)."""
    columns = _columns(found, interval).items()
    return [Line(name, levels, *style) for (name, levels), style in zip(columns, cycle(plots.STYLES), strict=False)]


def _columns(found: Findings, interval: Interval) -> dict[str, list[Estimate]]:
    """The levels of each reward of (S, K)."""
    columns = (estimates(bound[:, k] for bound in interval) for k in range(len(found.rewards)))
    return {words(name): [Plain(*x) for x in levels] for name, levels in zip(found.rewards, columns, strict=True)}
