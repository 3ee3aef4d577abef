"""The report of a comparison: the question and the answer first, then the evidence."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from customized_grpo import page
from customized_grpo.page.formats import duration, listed, percent, words
from customized_grpo.page.plots import BLUE, GREEN, ORANGE, VERMILLION, Line, Track
from customized_grpo.store.run import image_of, seconds
from customized_grpo.store.scores import Scores
from customized_grpo.studies.compare.analysis import Comparison
from customized_grpo.studies.compare.findings import findings, headline
from customized_grpo.studies.compare.grid import GridFolder
from customized_grpo.studies.compare.methods import BASE, find_method
from customized_grpo.studies.report.verdict import kind_name

OF = {"rewards": "", "checks": " (proxies)"}
"""What the name of a pair adds to a heading."""
CONFLICT = {"share": "conflict", "both_positive": "both better", "both_negative": "both worse"}
PAPER = {"conflict": 0.502, "both better": 0.268, "both worse": 0.230}
"""Customized-GRPO, section on conflict: shares of training samples."""
STRONG = ((BLUE, "D", True), (VERMILLION, "o", True), (ORANGE, "s", True), (GREEN, "^", True))
"""Colour and marker of the methods that stand out; the others are grey."""
WEAK = tuple(("#9A9A9A", marker, False) for marker in "ovP<X>p*h")


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html, self-contained, the same as report.md, its plots as SVG and PNG into FOLDER/plots.

    Works on a grid that is not finished: the page says which cells it leaves out.

    Raises:
        UserError: as `Comparison`, or if the folder cannot be written.
    """
    return page.publish(contents(Comparison(folder)), folder)


def contents(a: Comparison) -> page.Page:
    """The page of a comparison. Writes the plots."""
    styles, found = choose_styles(a), headline(a)
    done = sum(state.status == "finished" for state in a.states.values())
    return page.Page(
        kind="Comparison",
        title=a.folder.resolve().name,
        badges=[f"{done} of {len(a.states)} runs finished"],
        question=found.question,
        headline=f"{found.verdict}.",
        lead=found.text,
        summary=[page.Findings(findings(a)), page.Text(explanation(a), "note"), page.Remarks(list(remarks(a)))],
        sections=[
            page.Section("The trade-off", trade_off(a, styles), name="Trade-off"),
            page.Section("Images", images(a)),
            page.Section("Paired differences", differences(a), name="Differences"),
            *by_kind(a),
            page.Section(
                "Over training", [page.Figures([curve(a, metric, styles) for metric in a.metrics])], name="Curves"
            ),
            page.Section("Untrained metrics", untrained(a)),
            page.Section("Conflict between the rewards", conflict(a), name="Conflict"),
            *probe(a),
            page.Section("The runs", runs(a)),
        ],
        footer="Plots are beside this page in plots/ as SVG and PNG. docs/compare.md explains every number.",
    )


def explanation(a: Comparison) -> str:
    """What the numbers of the page mean."""
    seeds = f"{a.num_seeds} seed{'s' * (a.num_seeds != 1)}"
    return (
        f"A gain is the change since the base policy, on {len(a.base.tasks)} held-out tasks of {a.num_subjects} "
        "subjects with the same noise for all. Where two metrics are combined, a gain is in standard deviations of the "
        "metric over the base policy's tasks. The worst-reward gain is the smaller of the two gains: what a balanced "
        f"method raises. In brackets 95 % intervals, bootstrapped over {seeds} and over subjects. “Yes” and “no” are "
        "said only of intervals that exclude zero."
    )


def remarks(a: Comparison) -> Iterator[page.Remark]:
    """What the reader should know before trusting the page."""
    if a.num_seeds < 2:
        text = "Only one seed: the intervals cover other subjects, not another training run, which can differ."
        yield page.Remark(text, True)
    elif a.num_seeds < 5:
        text = f"Only {a.num_seeds} seeds: intervals are widened for it, so only large differences are clear."
        yield page.Remark(text)
    yield from page.few_subjects(a.num_subjects)
    yield from map(page.Remark, a.problems)
    for method, metric, missing, total in a.unscored():
        name = "the base policy" if method == BASE else a.title(method)
        left = "it has no scores" if missing == total else "they are left out"
        text = f"{words(metric)} could not score {missing:,} of {total:,} held-out images of {name}; {left}."
        yield page.Remark(text, metric in a.rewards)
    for method, finished in a.runs.items():
        if absent := [str(seed) for seed in a.grid.seeds if seed not in finished]:
            yield page.Remark(f"{a.title(method)} lacks seed {', '.join(absent)}; its mean is over the rest.", True)


def choose_styles(a: Comparison) -> dict[str, tuple[str, str, bool]]:
    """Colour, marker and whether it stands out: the candidate, the baseline, the rest of the line, the best other."""
    found = dict(zip(dict.fromkeys([*reversed(a.references), *a.line]), STRONG[:-1], strict=False))
    rest = [m for m in a.methods if m not in found]
    if a.pairs and rest:
        gains = {m: a.worst_gain(a.pairs["rewards"], m).value for m in rest}
        found[max(rest, key=lambda m: np.nan_to_num(gains[m], nan=-np.inf))] = STRONG[-1]
    grey = [m for m in a.methods if m not in found]
    return found | {m: WEAK[n % len(WEAK)] for n, m in enumerate(grey)}


def _table(
    a: Comparison, cells: Callable[[str], Mapping[str, page.Cell]], skip: str = "", title: str = ""
) -> page.Table:
    """A row for each method, of its cells by their heading."""
    rows = [(a.title(m), cells(m)) for m in a.methods if m != skip]
    return page.table(rows, bold=[a.title(m) for m in a.references], title=title)


def trade_off(a: Comparison, styles: Mapping[str, Any]) -> list[page.Block]:
    """The plane of the rewards and that of their proxies, and every method in a row."""
    line = listed([a.title(m) for m in a.line]) if a.line else ""
    text = (
        "Up and to the right is better; the lines are the paths there from the base policy, the bars 95 % intervals of "
        "the gain. Dotted: the Pareto front."
    )
    note = (
        "Rewards: gain in their own units. Worst-reward gain in standard deviations. Hypervolume: the area above the "
        "base policy that the evaluations over training dominate, in squared standard deviations. On the front: share "
        "of resamples in which no other method is better in both; ● the methods on the front as measured."
    )
    if line:
        text += f" Slanted dashes: the line through {line}."
        note += (
            f" Beyond the line: distance from the straight line through {line}, which differ in constant weights "
            "alone, towards more of both, in standard deviations. On it, a method does what other weights would have "
            "done."
        )
    drawn = list(planes(a, styles))
    return [*([page.Text(text), page.Figures(drawn)] if drawn else []), summary(a), page.Text(note, "note")]


def planes(a: Comparison, styles: Mapping[str, Any]) -> Iterator[page.Figure]:
    """Where the methods end in the plane of the rewards, and in that of their held-out proxies."""
    for name, pair in a.pairs.items():
        y, x = ({m: [a.level(k, m, i) for i in a.iterations] for m in a.methods} for k in pair)
        tracks = [Track(a.title(m), x[m], y[m], *styles[m]) for m in a.methods]
        tracks = [track for track in tracks if np.isfinite(track.end).all()]
        origin = (a.base_level[pair[1]], a.base_level[pair[0]])
        if tracks and np.isfinite(origin).all():
            figure = page.plots.plane(
                tracks, origin, xlabel=words(pair[1]), ylabel=words(pair[0]), line=[a.title(m) for m in a.line]
            )
            title = "Trained rewards" if name == "rewards" else "Not trained on"
            yield page.embed_plot(figure, a.folder, f"plane-{name}", title=title)


def summary(a: Comparison) -> page.Table:
    """Every method in a row: its gains, the smaller of them, and its place in the trade-off; seeds if they differ."""
    counts = {m: len(finished) for m, finished in a.runs.items()}
    fronts = {name: a.front(pair) for name, pair in a.pairs.items()}

    def cells(m: str) -> dict[str, page.Cell]:
        found: dict[str, page.Cell] = {"seeds": str(counts[m])} if len(set(counts.values())) > 1 else {}
        found |= {words(reward): a.gain(reward, m) for reward in a.rewards}
        for name, pair in a.pairs.items():
            on, share = fronts[name][m]
            found[f"worst-reward gain{OF[name]}"] = a.worst_gain(pair, m)
            found[f"hypervolume{OF[name]}"] = page.Plain(*a.hypervolume(pair, m))
            found[f"on the front{OF[name]}"] = f"{percent(share)}{' ●' * on}"
            if a.line:
                found[f"beyond the line{OF[name]}"] = a.beyond(pair, m)
        return found

    return _table(a, cells)


def images(a: Comparison) -> list[page.Block]:
    """The same tasks and noise drawn by every method, evenly spaced in the ranking of how much the candidate helped."""
    shown = [m for m in dict.fromkeys([a.grid.baseline, *a.line, a.grid.candidate]) if m in a.methods]
    seed = next((seed for seed in a.grid.seeds if shown and all(seed in a.runs[m] for m in shown)), None)
    last, sources = a.iterations[-1], [(a.folder / BASE / "cells", 0, a.base)]
    if seed is not None:
        sources += [(a.runs[m][seed].folder / "samples/cells", last, a.scores(m, seed, last)) for m in shown]

    def files(task: int) -> list[tuple[Path, list[str]]]:
        drawn = [(image_of(f, task, f"iteration-{i:06d}"), _marks(a, scores, task)) for f, i, scores in sources]
        return [(image_of(sources[0][0], task, "reference"), []), *drawn]

    pictured = [n for n in range(len(a.base.tasks)) if shown and all(path.is_file() for path, _ in files(n))]
    order, rule = _ranked(a, pictured)
    places = page.evenly(len(order), a.grid.pictures)
    rows = [page.Shown(a.base.prompts[order[n]], f"rank {n + 1} of {len(order)}", files(order[n])) for n in places]
    if not rows or seed is None:
        return [page.Text("No images that all methods share.", "soft")]
    note = "Under an image: what share the held-out proxies find right. ✓ all, ◐ in part, ✗ none."
    grid = page.image_grid(["reference", BASE, *map(a.title, shown)], rows, a.folder)
    return [page.Text(f"{rule} Images of training seed {seed}, first noise."), grid, page.Text(note, "note")]


def _ranked(a: Comparison, pictured: list[int]) -> tuple[list[int], str]:
    """The tasks from where the candidate helped least, compared with the baseline, to where it helped most."""
    if len(a.references) < 2 or not a.pairs:
        return pictured, "The first tasks of the held-out data."
    baseline, candidate = map(a.title, a.references)
    gains = a.standardized(a.references, a.pairs["rewards"]).mean(dim=-1)
    helped = (gains[..., 1] - gains[..., 0]).nanmean(dim=0).tolist()
    rule = (
        f"Chosen by rule, not by hand: all pictured tasks are ranked by how much better {candidate} scores than "
        f"{baseline} (mean of both rewards, in standard deviations, over seeds), and shown at even steps from the "
        "worst to the best."
    )
    return sorted((n for n in pictured if np.isfinite(helped[n])), key=helped.__getitem__), rule


def _marks(a: Comparison, scores: Scores, task: int) -> list[str]:
    """What the held-out proxies say of one image."""
    found = []
    for reward, proxy in a.proxies.items():
        value = float(scores.column(proxy)[0, task])
        sign = "✓" if value > 0.995 else "✗" if value < 0.005 else "◐" if value >= 0.005 else "–"
        found.append(f"{sign} {words(reward)} {percent(value)}")
    return found


def differences(a: Comparison) -> list[page.Block]:
    """Each method minus the baseline, and minus the candidate."""
    note = (
        "Seed by seed and task by task. P(better): the probability that a random seed of the method beats a random "
        "seed of the other on a random task. Seeds in favour: seeds with the larger worst-reward gain in the rewards."
    )
    drawn = [figure for m in a.references for figure in forests(a, m)]
    tables = [difference_table(a, m) for m in a.references if len(a.methods) > 1]
    return [page.Figures(drawn), *tables, page.Text(note, "note")]


def forests(a: Comparison, reference: str) -> Iterator[page.Figure]:
    """The worst-reward gain of every method minus that of the reference."""
    for name, pair in a.pairs.items():
        bars = [(a.title(m), a.worst_gain(pair, m, reference)) for m in a.methods if m != reference]
        bars = [(title, estimate) for title, estimate in bars if np.isfinite(estimate.value)]
        if bars:
            label = f"worst-reward gain minus that of {a.title(reference)}, in standard deviations"
            title = f"Worst-reward gain{OF[name]}, against {a.title(reference)}"
            figure = page.plots.forest(bars, xlabel=label)
            yield page.embed_plot(figure, a.folder, f"worst-{name}-{reference}", title=title)


def difference_table(a: Comparison, reference: str) -> page.Table:
    """Every method minus the reference, seed by seed and task by task."""

    def cells(m: str) -> dict[str, page.Cell]:
        found: dict[str, page.Cell] = {words(k): a.difference(k, m, reference) for k in a.judged}
        found |= {f"worst-reward gain{OF[name]}": a.worst_gain(pair, m, reference) for name, pair in a.pairs.items()}
        if a.line:
            found |= {f"beyond{OF[name]}": a.beyond(pair, m, reference) for name, pair in a.pairs.items()}
        for reward in a.rewards:
            found[f"P({words(reward)} better)"] = page.Share(*a.probability_of_improvement(reward, m, reference))
        if a.pairs:
            found["seeds in favour"] = "{} of {}".format(*a.seeds_in_favour(a.pairs["rewards"], m, reference))
        return found

    title = f"Each method minus {a.title(reference)}, on the same seeds, tasks and noise"
    return _table(a, cells, skip=reference, title=title)


def by_kind(a: Comparison) -> list[page.Section]:
    """The gain of every metric on each kind of prompt, if there are several."""
    if not (kinds := a.base.distinct_kinds()):
        return []
    counts = ", ".join(f"{kind_name(kind)} {len(set(a.base.of_kind(kind).subjects))}" for kind in kinds)
    text = f"Gain since the base policy. Held-out subjects: {counts}."

    def table(metric: str) -> page.Table:
        less = metric in a.grid.lower_is_better

        def cells(m: str) -> dict[str, page.Cell]:
            gains = {kind_name(kind): a.gain_of_kind(metric, m, kind) for kind in kinds}
            return {kind: page.Flipped(*gain) if less else gain for kind, gain in gains.items()}

        return _table(a, cells, title=words(metric) + " (not trained on)" * (metric not in a.rewards))

    return [page.Section("By kind of prompt", [page.Text(text), *map(table, a.metrics)], name="By kind")]


def curve(a: Comparison, metric: str, styles: Mapping[str, Any]) -> page.Figure:
    """A metric over training, for every method; those that do not stand out share one entry of the legend."""
    drawn = []
    for m, (colour, marker, strong) in sorted(styles.items(), key=lambda style: style[1][2]):
        name = a.title(m) if strong else "" if drawn else "the others"
        levels = [a.level(metric, m, i) for i in a.iterations]
        drawn.append(Line(name, levels, colour, marker) if strong else Line(name, levels))
    figure = page.plots.lines(a.iterations, drawn, xlabel="iteration", ylabel=words(metric))
    page.plots.iteration_axis(figure.axes[0], a.iterations)
    title = words(metric) + " (not trained on)" * (metric not in a.rewards)
    return page.embed_plot(figure, a.folder, f"curve-{metric}", title=title)


def untrained(a: Comparison) -> list[page.Block]:
    """Everything that was measured and not trained on, as change since the base policy; and the hacking gaps."""
    note = (
        "Change since the base policy, whose level is in the first row. Hacking gap: the gain of a reward minus the "
        "gain of its held-out proxy, in standard deviations; above zero, the reward rose more than its proxy."
    )
    less = a.grid.lower_is_better
    heading = {k: f"{words(k)}{' (less is better)' * (k in less)}" for k in a.metrics if k not in a.rewards}

    def cells(m: str) -> dict[str, page.Cell]:
        gains = {k: a.gain(k, m) for k in heading}
        found = {heading[k]: page.Flipped(*gain) if k in less else gain for k, gain in gains.items()}
        return found | {f"hacking gap, {words(r)}": page.Flipped(*a.hacking_gap(r, m)) for r in a.proxies}

    table = _table(a, cells)
    base = page.Row("base (level)", [*(a.base_level[k] for k in heading), *("" for _ in a.proxies)])
    return [replace(table, rows=[base, *table.rows]), page.Text(note, "note")]


def conflict(a: Comparison) -> list[page.Block]:
    """Shares of training samples on which the rewards agree, and their correlation."""

    def cells(m: str) -> dict[str, page.Cell]:
        shares = {heading: page.Share(*np.clip(a.conflict(key, m), 0, 1).tolist()) for key, heading in CONFLICT.items()}
        bar = page.Bar(float(np.nan_to_num(shares["conflict"].value)))
        return {**shares, "correlation": page.Plain(*a.conflict("correlation", m)), "": bar}

    logged = [(a.title(m), cells(m)) for m in a.methods if np.isfinite(a.conflict("share", m).value)]
    if not logged:
        return [page.Text("Conflict needs two rewards and a logged iteration.", "soft")]
    paper = {heading: page.Share(value, np.nan, np.nan) for heading, value in PAPER.items()}
    rows = [*logged, ("the paper", paper | {"": page.Bar(PAPER["conflict"])})]
    text = "Mean over training and seeds. Unrelated rewards are in conflict on half of the samples."
    return [page.Text(text), page.table(rows, bold=[a.title(m) for m in a.references])]


def probe(a: Comparison) -> list[page.Section]:
    """What the probe that the grid names found, with its plots; nothing if it names none."""
    if a.grid.probe is None:
        return []
    from customized_grpo.studies.probe.record import ProbeFolder
    from customized_grpo.studies.probe.report import analyse, conflict_plots, weights_plot, when_plots

    found = analyse(ProbeFolder.existing(a.grid.probe))
    text = f"Measured on the base policy, before any of these runs: {found.verdict.answer}. {found.verdict.sentence}"
    drawn = [*when_plots(a.folder, found), *conflict_plots(a.folder, found), weights_plot(a.folder, found)]
    return [page.Section("When is each reward decided?", [page.Text(text), page.Figures(drawn)], name="Probe")]


def runs(a: Comparison) -> list[page.Block]:
    """Where the numbers come from."""
    folder, finished = GridFolder(a.folder), [run for seeds in a.runs.values() for run in seeds.values()]
    spent = [seconds(run.rows) for run in finished]
    samples = finished[0].series("samples")
    held_out = f"{len(a.base.tasks)} tasks of {a.num_subjects} subjects, {len(a.base.values)} fixed noises each"
    facts = [
        ("model", finished[0].summary.get("model")),
        ("rewards", ", ".join(a.rewards)),
        ("budget of every run", folder.facts().get("budget", f"{samples[-1]:,.0f} images")),
        ("seeds", ", ".join(map(str, a.grid.seeds))),
        ("held-out", f"{held_out}, deterministic sampling"),
        ("time", f"{duration(float(np.mean(spent)))} a run, {duration(sum(spent))} in all"),
    ]
    infos = [run.info for run in finished]
    versions = [dict(info.get("versions") or {}) for info in infos]
    origin = {
        **folder.facts(),
        "hardware": _each_once(info.get("hardware", "?") for info in infos),
        "versions": {name: _each_once(v.get(name, "?") for v in versions) for some in versions for name in some},
    }
    methods = [(a.title(m), f"{find_method(m, a.grid.own_methods).about} ({m})") for m in a.methods]
    grid = (folder.path / folder.MARKER).read_text(encoding="utf-8")
    return [
        *page.origin(origin, facts), page.Text("Methods:"), page.Facts(methods),
        page.Details("Grid (compare.yaml, can be run again)", [page.Code(grid)]),
    ]  # fmt: skip


def _each_once(values: Iterable[Any]) -> str:
    return " and ".join(dict.fromkeys(map(str, values)))
