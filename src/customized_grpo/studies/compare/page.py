"""The report of a comparison: the question and the answer first, then everything that they rest on."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from customized_grpo import page
from customized_grpo.page.formats import duration, percent, words
from customized_grpo.page.plots import running_mean
from customized_grpo.store.scores import Estimate, finite_mean
from customized_grpo.studies.compare import plots
from customized_grpo.studies.compare.analysis import Analysis, Balance
from customized_grpo.studies.compare.findings import findings, headline
from customized_grpo.studies.compare.grid import base_config, budget
from customized_grpo.studies.compare.methods import BASE, find_method
from customized_grpo.studies.compare.pictures import pictures
from customized_grpo.studies.compare.plots import Bar, Curve, Point, Style
from customized_grpo.studies.compare.results import Comparison, read_comparison

CONFLICT = {"share": "conflict", "both_positive": "both better", "both_negative": "both worse"}
PAPER_CONFLICT = (0.502, 0.268, 0.230)
"""Customized-GRPO, section on conflict: shares of samples in conflict, both positive, both negative."""


def write_report(folder: Path, *, trust_code: bool = False) -> Path:
    """Write FOLDER/report.html, self-contained, the same as report.md, its plots as SVG and PNG into FOLDER/plots.

    Works on a grid that is not finished: the page says which cells it leaves out.

    Args:
        folder: what `cgrpo compare` wrote.
        trust_code: run the step plans that the folder names, to count gradient steps.

    Raises:
        UserError: if the folder is no comparison, nothing is finished, or it holds runs that do not compare.
    """
    comparison = read_comparison(Path(folder), trust_code=trust_code)
    with page.writing(comparison.folder):
        return page.publish(contents(comparison), comparison.folder)


def contents(comparison: Comparison) -> page.Page:
    """The page of a comparison. Writes the plots."""
    analysis = Analysis(comparison)
    styles = choose_styles(analysis)
    found = headline(analysis)
    sections = [
        page.Section("The trade-off", front_blocks(analysis, styles), name="Trade-off"),
        page.Section("Images", image_blocks(analysis)),
        page.Section("Paired differences", difference_blocks(analysis, styles), name="Differences"),
        page.Section("Over training", [page.Figures(curves(analysis, styles))], name="Curves"),
        page.Section("Untrained metrics", [other_metrics(analysis), page.Text(OTHERS, "note")]),
        page.Section("Conflict between the rewards", conflict_blocks(analysis, styles), name="Conflict"),
        *probe_section(comparison),
        page.Section("The runs", run_blocks(analysis)),
    ]
    return page.Page(
        kind="Comparison",
        title=comparison.folder.resolve().name,
        badges=[progress(comparison)],
        question=found.question,
        headline=f"{found.verdict}.",
        lead=found.text,
        summary=[
            page.Findings(findings(analysis)),
            page.Text(explanation(analysis), "note"),
            page.Remarks(remarks(analysis)),
        ],
        sections=sections,
        footer="Plots are beside this page in plots/ as SVG and PNG. docs/compare.md explains every number.",
    )


OTHERS = (
    "Change since the base policy, whose level is in the first row. Hacking gap: the gain of a reward minus the "
    "gain of its held-out proxy, in standard deviations; above zero, the reward rose more than its proxy."
)


def explanation(analysis: Analysis) -> str:
    """What the numbers of the page mean."""
    tasks, seeds = len(analysis.comparison.base.tasks), analysis.num_seeds
    return (
        f"A gain is the change since the base policy, on {tasks} held-out tasks of {analysis.num_subjects} subjects "
        "with the same noise for all. Where two metrics are combined, a gain is in standard deviations of the "
        "metric over the base policy's tasks. The worst-reward gain is the smaller of the two gains: what a "
        f"balanced method raises. In brackets 95 % intervals, bootstrapped over {seeds} seed{'s' * (seeds != 1)} "
        "and over subjects. “Yes” and “no” are said only of intervals that exclude zero."
    )


def front_blocks(analysis: Analysis, styles: dict[str, Style]) -> list[page.Block]:
    """The plane of the rewards, and every method in a row."""
    line = [analysis.comparison.title(m) for m in analysis.line or ()]
    blocks: list[page.Block] = []
    if drawn := planes(analysis, styles):
        text = (
            "Up and to the right is better; the lines are the paths there from the base policy, the bars 95 % "
            "intervals of the gain. Dotted: the Pareto front."
        )
        text += f" Slanted dashes: the line through {line[0]} and {line[1]}." if line else ""
        blocks += [page.Text(text), page.Figures(drawn)]
    note = (
        "Rewards: gain in their own units. Worst-reward gain in standard deviations. Hypervolume: the area above "
        "the base policy that the evaluations over training dominate, in squared standard deviations. On the front: "
        "share of resamples in which no other method is better in both; ● the methods on the front as measured."
    )
    if line:
        note += (
            f" Beyond the line: distance from the straight line through {line[0]} and {line[1]}, which differ in "
            "constant weights alone, towards more of both, in standard deviations. On it, a method does what other "
            "weights would have done."
        )
    return [*blocks, summary(analysis), page.Text(note, "note")]


def image_blocks(analysis: Analysis) -> list[page.Block]:
    shown, rule = pictures(analysis)
    if not shown.rows:
        return [page.Text("No images that all methods share.", "soft")]
    note = "Under an image: what share the held-out proxies find right. ✓ all, ◐ in part, ✗ none."
    return [page.Text(rule), shown, page.Text(note, "note")]


def difference_blocks(analysis: Analysis, styles: dict[str, Style]) -> list[page.Block]:
    note = (
        "Seed by seed and task by task. P(better): the probability that a random seed of the method beats a random "
        "seed of the other on a random task. Seeds in favour: seeds with the larger worst-reward gain in the "
        "rewards."
    )
    tables = [table for m in analysis.references if (table := differences(analysis, m)).rows]
    drawn = forests(analysis, styles)
    return [*([page.Figures(drawn)] if drawn else []), *tables, page.Text(note, "note")]


def conflict_blocks(analysis: Analysis, styles: dict[str, Style]) -> list[page.Block]:
    table = conflict(analysis)
    if not table.rows:
        return [page.Text("Conflict needs two rewards and a logged iteration.", "soft")]
    return [page.Figures(conflict_plots(analysis, styles)), table]


def run_blocks(analysis: Analysis) -> list[page.Block]:
    comparison = analysis.comparison
    methods = [
        (comparison.title(m), f"{find_method(m, comparison.grid.own_methods).about} ({m})") for m in comparison.methods
    ]
    grid = (comparison.folder / "compare.yaml").read_text(encoding="utf-8")
    return [
        page.Facts(facts(analysis)),
        page.Text("Methods:"),
        page.Facts(methods),
        page.Details("Command lines", [page.Code(commands(comparison))]),
        page.Details("Grid (compare.yaml, can be run again)", [page.Code(grid)]),
        page.Details("Versions", [page.Facts(versions(comparison))]),
    ]


def progress(comparison: Comparison) -> str:
    done = sum(state.status == "finished" for state in comparison.states.values())
    return f"{done} of {len(comparison.states)} runs finished"


def choose_styles(analysis: Analysis) -> dict[str, Style]:
    """Colour for the candidate, the baseline, the other naive weights and the best of the rest; grey for the others."""
    named = (analysis.grid.candidate, analysis.grid.baseline, "naive_1to1.5")
    found = {m: s for m, s in zip(named, plots.HIGHLIGHTS, strict=False) if m in analysis.methods}
    rest = [m for m in analysis.methods if m not in found]
    if analysis.balances and rest:
        lesser = {m: np.nan_to_num(analysis.lesser_gain(m, analysis.balances[0]).value, nan=-np.inf) for m in rest}
        found[max(rest, key=lambda m: lesser[m])] = plots.HIGHLIGHTS[-1]
    grey = [m for m in analysis.methods if m not in found]
    return found | {m: plots.OTHERS[n % len(plots.OTHERS)] for n, m in enumerate(grey)}


# ---- plots


def planes(analysis: Analysis, styles: dict[str, Style]) -> list[page.Figure]:
    """Where the methods end in the plane of the rewards, and in that of their held-out proxies."""
    title, found = analysis.comparison.title, []
    line = [title(m) for m in analysis.line or ()]
    for balance in analysis.balances:
        up, across = balance.metrics
        points = []
        for m in analysis.methods:
            x, y = (analysis.level(m, metric) for metric in (across, up))
            path = [[analysis.level(m, k, i).value for k in (across, up)] for i in analysis.iterations]
            if np.isfinite([x.value, y.value]).all():
                points.append(Point(title(m), x, y, np.array(path), styles[m]))
        base = (analysis.base_level(across).value, analysis.base_level(up).value)
        if not points or not np.isfinite(base).all():
            continue
        figure = plots.plane(points, base, line, xlabel=words(across), ylabel=words(up))
        name = "Trained rewards" if balance.name == "rewards" else "Not trained on"
        found.append(page.embed_plot(figure, analysis.comparison.folder, f"plane-{balance.name}", title=name))
    return found


def curves(analysis: Analysis, styles: dict[str, Style]) -> list[page.Figure]:
    """Every metric over training, for every method."""
    title, found = analysis.comparison.title, []
    for metric in analysis.metrics:
        lines = [
            Curve(title(m), [analysis.level(m, metric, i) for i in analysis.iterations], styles[m])
            for m in analysis.methods
        ]
        figure = plots.curves(analysis.iterations, lines, ylabel=words(metric))
        name = words(metric) + ("" if metric in analysis.comparison.rewards else " (not trained on)")
        found.append(page.embed_plot(figure, analysis.comparison.folder, f"curve-{metric}", title=name))
    return found


def forests(analysis: Analysis, styles: dict[str, Style]) -> list[page.Figure]:
    """The worst-reward gain of every method minus that of the baseline."""
    title, found = analysis.comparison.title, []
    for reference in analysis.references:
        others = [m for m in analysis.methods if m != reference]
        for balance in analysis.balances if others else []:
            bars = [Bar(title(m), analysis.lesser_gain_difference(m, reference, balance), styles[m]) for m in others]
            bars = [bar for bar in bars if np.isfinite(bar.estimate.value)]
            if not bars:
                continue
            of = "rewards" if balance.name == "rewards" else "held-out proxies"
            figure = plots.forest(
                bars, xlabel=f"worst-reward gain minus that of {title(reference)}, in standard deviations"
            )
            name = f"Worst-reward gain in the {of}, against {title(reference)}"
            found.append(
                page.embed_plot(figure, analysis.comparison.folder, f"worst-{balance.name}-{reference}", title=name)
            )
    return found


def conflict_plots(analysis: Analysis, styles: dict[str, Style]) -> list[page.Figure]:
    """Shares of samples in conflict for every method, and the correlation of the rewards over training."""
    title, folder, found = analysis.comparison.title, analysis.comparison.folder, []
    shares: list[tuple[str, float, float, float]] = []
    for m in analysis.methods:
        conflict, positive, negative = (analysis.conflict(m, key).value for key in CONFLICT)
        shares.append((title(m), conflict, positive, negative))
    if any(np.isfinite(row[1]) for row in shares):
        figure = plots.conflict_bars([*shares, ("the paper", *PAPER_CONFLICT)])
        found.append(page.embed_plot(figure, folder, "conflict", title="Do the rewards agree on a sample?"))
    lines, length = [], 0
    for m in analysis.methods:
        series = [run.series("conflict/correlation") for run in analysis.comparison.runs[m].values()]
        length = min(map(len, series)) if not length else min(length, *map(len, series))
        lines.append((m, series))
    if length and any(np.isfinite(s).any() for _, series in lines for s in series):
        window = max(1, length // 8)
        drawn = []
        for m, series in lines:
            smooth = running_mean(finite_mean(np.stack([s[:length] for s in series]), axis=0), window)
            drawn.append(Curve(title(m), [Estimate(float(v), np.nan, np.nan) for v in smooth], styles[m]))
        figure = plots.curves(range(1, length + 1), drawn, ylabel="correlation within groups")
        found.append(page.embed_plot(figure, folder, "conflict-correlation", title="Correlation of the rewards"))
    return found


def probe_section(comparison: Comparison) -> list[page.Section]:
    """What the probe that the grid names found, with its plots; nothing where it names none."""
    if comparison.grid.probe is None:
        return []
    from customized_grpo.studies.probe.record import ProbeFolder
    from customized_grpo.studies.probe.report import analyse, conflict_plots, weights_plot, when_plots

    folder = ProbeFolder.existing(comparison.grid.probe)
    found, target = analyse(folder), comparison.folder
    text = f"Measured on the base policy, before any of these runs: {found.verdict.answer}. {found.verdict.sentence}"
    drawn = [*when_plots(target, found), *conflict_plots(target, found), weights_plot(target, found)]
    return [page.Section("When is each reward decided?", [page.Text(text), page.Figures(drawn)], name="Probe")]


# ---- tables


def summary(analysis: Analysis) -> page.Table:
    """Every method in a row: its gains, the smaller of them, what its trade-off is worth; seeds where they differ."""
    rewards = analysis.comparison.rewards
    counts = {m: len(seeds) for m, seeds in analysis.comparison.runs.items()}
    unequal = len(set(counts.values())) > 1
    columns = ["seeds"] * unequal + [words(reward) for reward in rewards]
    fronts = {balance.name: analysis.front(balance) for balance in analysis.balances}
    for balance in analysis.balances:
        of = "" if balance.name == "rewards" else " (proxies)"
        columns += [f"worst-reward gain{of}", f"hypervolume{of}", f"on the front{of}"]
        columns += [f"beyond the line{of}"] * bool(analysis.line)
    rows = []
    for m in analysis.methods:
        cells: list[Any] = [str(counts[m])] * unequal + [analysis.gain(m, reward) for reward in rewards]
        for balance in analysis.balances:
            cells += [analysis.lesser_gain(m, balance), _plain(analysis.hypervolume(m, balance))]
            cells.append(f"{percent(fronts[balance.name][1][m])}{' ●' if m in fronts[balance.name][0] else ''}")
            cells += [analysis.beyond(m, balance)] * bool(analysis.line)
        rows.append(_row(analysis, m, cells))
    return page.Table(columns, rows)


def differences(analysis: Analysis, reference: str) -> page.Table:
    """Every method less `reference`, seed by seed and task by task."""
    metrics = [*analysis.comparison.rewards]
    for balance in analysis.balances[1:]:
        metrics += balance.metrics
    columns = [words(metric) for metric in metrics]
    columns += ["worst-reward gain", "worst-reward gain (proxies)"][: len(analysis.balances)]
    if analysis.line:
        columns += ["beyond", "beyond (proxies)"][: len(analysis.balances)]
    columns += [f"P({words(reward)} better)" for reward in analysis.comparison.rewards]
    if analysis.balances:
        columns.append("seeds in favour")
    rows = []
    for m in (m for m in analysis.methods if m != reference):
        cells: list[Any] = [analysis.difference(m, reference, metric) for metric in metrics]
        cells += [analysis.lesser_gain_difference(m, reference, balance) for balance in analysis.balances]
        if analysis.line:
            cells += [analysis.beyond(m, balance, reference) for balance in analysis.balances]
        for reward in analysis.comparison.rewards:
            cells.append(_share(analysis.probability_of_improvement(m, reference, reward)))
        if analysis.balances:
            cells.append("{} of {}".format(*analysis.seeds_in_favour(m, reference, analysis.balances[0])))
        rows.append(_row(analysis, m, cells))
    title = f"Each method minus {analysis.comparison.title(reference)}, on the same seeds, tasks and noise"
    return page.Table(columns, rows, title=title)


def other_metrics(analysis: Analysis) -> page.Table:
    """Everything that was measured and not trained on, as change since the base; and the hacking gaps."""
    others = [metric for metric in analysis.metrics if metric not in analysis.comparison.rewards]
    twins = [r for r in analysis.comparison.rewards if analysis.grid.checks.get(r, "") in analysis.metrics]
    less = analysis.grid.lower_is_better
    columns = [f"{words(metric)}{' (less is better)' if metric in less else ''}" for metric in others]
    columns += [f"hacking gap, {words(reward)}" for reward in twins]
    rows = [page.Row("base (level)", (*(analysis.base_level(k).value for k in others), *("" for _ in twins)))]
    for m in analysis.methods:
        cells = [
            analysis.gain(m, metric) if metric not in less else page.Flipped(*analysis.gain(m, metric))
            for metric in others
        ]
        cells += [page.Flipped(*analysis.hacking_gap(m, reward)) for reward in twins]
        rows.append(_row(analysis, m, cells))
    return page.Table(columns, rows)


def conflict(analysis: Analysis) -> page.Table:
    """Conflict over training, mean over iterations and seeds."""
    keys = {**CONFLICT, "correlation": "correlation"}
    rows = [
        _row(analysis, m, [_plain(analysis.conflict(m, key)) for key in keys])
        for m in analysis.methods
        if np.isfinite(analysis.conflict(m, "share").value)
    ]
    if rows:
        rows.append(page.Row("the paper", (*PAPER_CONFLICT, "")))
    return page.Table(tuple(keys.values()), rows)


def _plain(estimate: Estimate) -> page.Plain:
    return page.Plain(*estimate)


def _share(estimate: Estimate) -> str:
    """A probability and its interval."""
    if not np.isfinite(estimate.value):
        return "\N{EN DASH}"
    value, low, high = map(percent, estimate)
    return value if not np.isfinite(estimate.low) else f"{value} ({low.removesuffix(' %')} to {high})"


def _row(analysis: Analysis, method: str, cells: Sequence[Any]) -> page.Row:
    strong = method in (analysis.grid.candidate, analysis.grid.baseline)
    return page.Row(analysis.comparison.title(method), cells, strong)


# ---- what to know before trusting it


def remarks(analysis: Analysis) -> list[page.Remark]:
    """Everything worth a sentence, serious or not."""
    comparison, found = analysis.comparison, []
    if analysis.num_seeds < 2:
        found.append(
            page.Remark(
                "Only one seed: the intervals cover other subjects, not another training run, which can differ.", True
            )
        )
    elif analysis.num_seeds < 5:
        found.append(
            page.Remark(
                f"Only {analysis.num_seeds} seeds: intervals are widened for it, so only large differences are clear."
            )
        )
    if analysis.num_subjects < 10:
        found.append(page.Remark(f"Only {analysis.num_subjects} held-out subjects: intervals over so few are rough."))
    found += [page.Remark(problem, "not pair" in problem) for problem in comparison.problems]
    for method, metric, missing, total in analysis.unscored():
        name = "the base policy" if method == BASE else comparison.title(method)
        text = f"{words(metric)} could not score {missing:,} of {total:,} held-out images of {name}; "
        text += "nothing is left of it." if missing == total else "they are left out."
        found.append(page.Remark(text, metric in comparison.rewards))
    for m, runs in comparison.runs.items():
        absent = [seed for seed in comparison.grid.seeds if seed not in runs]
        if absent:
            found.append(
                page.Remark(
                    f"{comparison.title(m)} lacks seed {', '.join(map(str, absent))}; its mean is over the rest.", True
                )
            )
    return found


def facts(analysis: Analysis) -> list[tuple[str, str]]:
    """The comparison in a few lines."""
    comparison = analysis.comparison
    runs = [run for seeds in comparison.runs.values() for run in seeds.values()]
    config = base_config(comparison.grid, comparison.folder)
    spent = budget(config)
    seconds = [float(sum(np.nansum(run.series(key)) for key in _timed(run))) for run in runs]
    return [
        ("model", str(runs[0].summary.get("model", config.policy.use))),
        ("rewards", ", ".join(comparison.rewards)),
        ("budget of every run", f"{spent.samples:,} images, {spent.gradient_steps:,} gradient steps"),
        ("seeds", ", ".join(map(str, comparison.grid.seeds))),
        (
            "held-out",
            f"{len(comparison.base.tasks)} tasks of {analysis.num_subjects} subjects, "
            f"{len(comparison.base.values)} fixed noises each, deterministic sampling",
        ),
        ("time", f"{duration(float(np.mean(seconds)))} a run, {duration(sum(seconds))} in all"),
        ("hardware", ", ".join(sorted({str(run.info.get("hardware", "?")) for run in runs}))),
    ]


def _timed(run: Any) -> list[str]:
    return sorted({key for row in run.rows for key in row if key.startswith("seconds/")})


def commands(comparison: Comparison) -> str:
    """How the comparison and its runs were made."""
    info = comparison.folder / "compare.json"
    own = json.loads(info.read_text(encoding="utf-8")).get("command", []) if info.is_file() else []
    every = [own, *(run.info.get("command") or [] for runs in comparison.runs.values() for run in runs.values())]
    return "\n".join(shlex.join(["cgrpo", *map(str, words[1:])]) for words in every if words)


def versions(comparison: Comparison) -> list[tuple[str, str]]:
    """Package versions, all that occurred."""
    found: dict[str, list[str]] = {}
    for runs in comparison.runs.values():
        for run in runs.values():
            for name, version in dict(run.info.get("versions") or {}).items():
                if str(version) not in found.setdefault(str(name), []):
                    found[str(name)].append(str(version))
    return [(name, " and ".join(seen)) for name, seen in found.items()]


__all__ = ["Balance", "contents", "write_report"]
