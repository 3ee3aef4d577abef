"""The report of a bench: scores with intervals, real images, other benches, and published numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from customized_grpo import page
from customized_grpo.page import Cell, Shown
from customized_grpo.page.formats import DASH, listed, number, with_interval
from customized_grpo.studies.bench.findings import (
    Published,
    compared,
    kinds,
    levels,
    paired,
    published,
    real_levels,
    remarks,
)
from customized_grpo.studies.bench.record import Bench, read_bench

REAL = (
    "Below each mean its 95 % interval, bootstrapped over {} subjects. Real images of a subject are scored against the "
    "others of that subject: identity above theirs means that more than the subject was copied."
)
PAIRED = "Same tasks and noise on both sides; ▲ and ▼ where the interval excludes zero."
PUBLISHED = (
    "Measured under the protocol that the row names, or the closest of ours, with their authors' encoders, crops and "
    "noise. Rows of one protocol and source compare with each other; with this bench only where the row says so, and "
    "then a difference of a few hundredths means little. Sources: {}."
)
DREAMBENCH = ("dreambooth", "uno", "customized-grpo")
RANKED = "All prompts are ranked by the mean {} of their images, and shown at even steps from the worst to the best{}."


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html, self-contained, the same as report.md, and its images into FOLDER/plots.

    Raises:
        UserError: if the bench, or one that it was last compared with, is not finished, or they do not pair.
    """
    bench = read_bench(folder)
    return page.publish(contents(bench, [read_bench(path) for path in bench.folder.against()]), folder)


def contents(bench: Bench, others: Sequence[Bench] = ()) -> page.Page:
    """The page of a bench beside others. Writes the image grid."""
    info, departures = bench.info, bench.info["departures"]
    groups, shown = breakdown(bench), images(bench, others)
    departed = [page.Text("Departures:"), page.Bullets(departures)] if departures else []
    return page.Page(
        kind="Benchmark",
        title=bench.label,
        badges=[info["protocol"], f"{len(bench.tasks)} prompts × {bench.images} images"],
        headline=headline(bench, others),
        lead=f"{info['about']} {info['source']}",
        sections=[
            page.Section("Scores", score_blocks(bench, others), brief=True),
            page.Section(
                "Kinds of subject and prompt",
                [groups] if groups.rows else [page.Text("All tasks are of one kind.", "soft")],
                name="Kinds", brief=bool(groups.rows),
            ),
            page.Section("Images", shown or [page.Text("No images to show.", "soft")]),
            page.Section("The rules", [
                page.Bullets(info["rules"]), *(departed or [page.Text("There are no departures from the protocol.")]),
            ], name="Rules"),
            page.Section("The bench", page.origin(info, [
                ("policy", info["policy"]), ("weights", bench.label), ("data", info.get("data") or "rendered"),
            ])),
        ],
        footer="Images are in images/, scores in scores.parquet or scores.csv. docs/bench.md explains every number.",
    )  # fmt: skip


def headline(bench: Bench, others: Sequence[Bench] = ()) -> str:
    """Whether it is better than the first of the others, or than the real images; the means where neither is known."""
    found, verdict = levels(bench), compared(bench, others[0] if others else None)
    told = {name: f"{metric.title} {number(found[name].value)}" for name, metric in bench.metrics.items()}
    if not verdict.changes:
        return ", ".join(text for name, text in told.items() if bench.metrics[name].role != "copy")
    against = others[0].label if others else "real images"
    clear = [f"{told[name]} ({with_interval(c)})" for name, c in verdict.changes.items() if c.verdict != "unclear"]
    unclear = [told[name] for name, c in verdict.changes.items() if c.verdict == "unclear"]
    evidence = [*clear, f"no clear difference in {listed(unclear)}"] if unclear else clear
    beside = "than" if verdict.answer != "undecided" else "against"
    return f"{verdict.answer.capitalize()} {beside} {against}: {'; '.join(evidence)}."


# ---- tables


def score_blocks(bench: Bench, others: Sequence[Bench]) -> list[page.Block]:
    """The scores, the differences to other benches, warnings, and published numbers."""
    note = page.Text(REAL.format(len(set(bench.scores.subjects))), "note")
    blocks: list[page.Block] = [scores(bench, others), note, *(differences(bench, other) for other in others)]
    blocks += [page.Text(PAIRED, "note")] if others else []
    blocks += [page.Remarks(remarks(bench))]
    if (theirs := publications(bench)).rows:
        sources = dict.fromkeys(f"{entry.source} ({entry.about})" for entry in known(bench))
        blocks += [theirs, page.Text(PUBLISHED.format("; ".join(sources)), "note")]
    return blocks


def columns(bench: Bench) -> dict[str, str]:
    """The headings of the metrics. Backgrounds that were not measured have no column."""
    titles = {name: metric.title + " ↓" * (metric.role == "copy") for name, metric in bench.metrics.items()}
    scored = {name: bool(np.isfinite(bench.scores.column(name)).any()) for name in titles}
    return {name: title for name, title in titles.items() if scored[name] or bench.metrics[name].role != "copy"}


def cells(bench: Bench, found: Mapping[str, Any]) -> dict[str, Cell]:
    """Numbers by metric as a row of the bench's tables; a dash where there is none."""
    return {title: found.get(name, DASH) for name, title in columns(bench).items()}


def scores(bench: Bench, others: Sequence[Bench]) -> page.Table:
    """This bench, others and the real images, all measured here."""
    rows = [(some.label, cells(bench, levels(some))) for some in (bench, *others)]
    real = {name: level for name, level in real_levels(bench).items() if np.isfinite(level.value)}
    return page.table([*rows, *([("real images", cells(bench, real))] if real else [])], first="model", strong=1)


def differences(bench: Bench, other: Bench) -> page.Table:
    """This bench less another, task by task: of all tasks, and by kind of subject and of prompt."""
    parts = [("all", [True] * len(bench.tasks)), *kinds(bench)]
    rows = [(title, {"prompts": str(sum(of)), **cells(bench, paired(bench, other, of))}) for title, of in parts]
    return page.table(rows, first="kind", title=f"Minus {other.label}, task by task", strong=1)


def breakdown(bench: Bench) -> page.Table:
    """By kind of subject and of prompt."""
    rows = [(title, {"prompts": str(sum(of)), **cells(bench, levels(bench, of))}) for title, of in kinds(bench)]
    return page.table(rows, first="kind")


def known(bench: Bench) -> list[Published]:
    """The published numbers on the same data, which are of one subject where the data is DreamBench."""
    own = bench.info["protocol"]
    return published(bench.metrics, DREAMBENCH if own in DREAMBENCH else (own,))


def publications(bench: Bench) -> page.Table:
    """Published numbers, with who measured them and under which protocol, in a table of its own."""
    rows: list[tuple[str, dict[str, Any]]] = [
        (entry.method, {
            "measured under": entry.protocol, "by": entry.by, "comparable?": entry.comparability(bench),
            **cells(bench, entry.scores),
        })
        for entry in known(bench)
    ]  # fmt: skip
    return page.table(rows, title="Published, measured by others")


# ---- images


def images(bench: Bench, others: Sequence[Bench]) -> list[page.Block]:
    """Images at even steps in the ranking of the first metric, and this rule; nothing if there are none to show."""
    first, metric = next(iter(bench.metrics.items()))
    values = bench.scores.per_task(first)
    order = [int(t) for t in np.argsort(values) if np.isfinite(values[t])]
    drawn = [(b, n) for b in (bench, *others) for n in range(1 if others else bench.images)]
    most, rows = 0, []
    for place in page.evenly(len(order), int(bench.info.get("grid_rows", 12))):
        t = order[place]
        task = bench.tasks[t]
        references = [p for n in range(8) if (p := bench.folder.reference(task.subject, n)).is_file()]
        most = max(most, len(references))
        files = [(path, ()) for path in references] + [(b.folder.image((task, n)), _marks(b, t, n)) for b, n in drawn]
        rows.append(Shown(task.prompt, f"{task.subject}, rank {place + 1} of {len(order)}", files))
    if not rows:
        return []
    headers = ["reference"] * most + [b.label if others else f"image {n + 1}" for b, n in drawn]
    rule = RANKED.format(metric.title, ", the first image of each" if others and bench.images > 1 else "")
    return [page.Text(rule), page.image_grid(headers, rows, bench.folder.path)]


def _marks(bench: Bench, task: int, n: int) -> tuple[str, ...]:
    """The scores of one image."""
    values = {m.title: float(bench.scores.column(name)[n, task]) for name, m in bench.metrics.items()}
    return tuple(f"{title} {number(value)}" for title, value in values.items() if np.isfinite(value))
