"""The report of a bench: the scores with their intervals, beside real images and published numbers."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from customized_grpo import page
from customized_grpo.data.images import png
from customized_grpo.page import Estimate
from customized_grpo.page.formats import number
from customized_grpo.store import write
from customized_grpo.studies.bench import analysis
from customized_grpo.studies.bench.protocols import Metric
from customized_grpo.studies.bench.record import Bench, read_bench
from customized_grpo.train.grids import grid

ABSENT = "\N{EN DASH}"


def write_report(folder: Path, against: Sequence[Path] | None = None) -> Path:
    """Write FOLDER/report.html, self-contained, and its pictures into FOLDER/plots.

    Args:
        folder: of a finished bench.
        against: finished benches of the same protocol to compare with; None takes those of the last report.

    Raises:
        UserError: if a bench is not finished, or they do not pair.
    """
    bench = read_bench(folder)
    others = [read_bench(path) for path in (against if against is not None else bench.folder.against())]
    return report(bench, others)[1]


def report(bench: Bench, others: Sequence[Bench]) -> tuple[page.Page, Path]:
    """The page of a bench, and where it was written.

    Raises:
        UserError: if the folder cannot be written.
    """
    with page.writing(bench.folder.path):
        bench.folder.remember(other.folder.path for other in others)
        shown = contents(bench, others)
        return shown, page.publish(shown, bench.folder.path)


def contents(bench: Bench, others: Sequence[Bench] = ()) -> page.Page:
    """The page of a bench. Writes the image grid."""
    info = bench.info
    kinds = breakdown(bench)
    departures = [page.Text("Departures:"), page.Bullets(info["departures"])] if info["departures"] else []
    return page.Page(
        kind="Benchmark",
        title=bench.label,
        badges=[bench.protocol, f"{len(bench.tasks)} prompts × {bench.images} images"],
        headline=headline(bench),
        lead=f"{info['about']} {info['source']}",
        summary=[page.Remarks(remarks(bench))],
        sections=[
            page.Section("Scores", score_blocks(bench, others), brief=True),
            page.Section(
                "Kinds of subject and prompt",
                [kinds] if kinds.rows else [page.Text("All tasks are of one kind.", "soft")],
                name="Kinds",
                brief=bool(kinds.rows),
            ),
            page.Section("Images", image_blocks(bench, others)),
            page.Section("The rules", [
                page.Bullets(info["rules"]), *departures, *([] if departures else [page.Text(NOTHING_DEPARTS)]),
            ], name="Rules"),
            page.Section("The bench", [
                page.Facts(facts(bench)),
                page.Details("Command line", [page.Code(shlex.join(map(str, info.get("command", []))))]),
                page.Details("Versions", [page.Facts(list(dict(info.get("versions") or {}).items()))]),
            ]),
        ],
        footer="Images are in images/, scores in scores.parquet or scores.csv. docs/bench.md explains every number.",
    )  # fmt: skip


NOTHING_DEPARTS = "Nothing departs from the protocol."


def score_blocks(bench: Bench, others: Sequence[Bench]) -> list[page.Block]:
    """The scores, the differences to other benches, and what others have published."""
    subjects = len(set(bench.scores.subjects))
    note = (
        f"Below each mean its 95 % interval, bootstrapped over {subjects} subjects. Real images of a subject are "
        "scored against the others of that subject: identity above theirs means that more than the subject was "
        "copied."
    )
    blocks: list[page.Block] = [scores(bench, others), page.Text(note, "note")]
    blocks += [differences(bench, other) for other in others]
    if others:
        text = "Same tasks and noise on both sides; ▲ and ▼ where the interval excludes zero."
        blocks.append(page.Text(text, "note"))
    if (theirs := publications(bench)).rows:
        entries = analysis.published_beside(bench)
        pairs = dict.fromkeys((entry.source, entry.about) for entry in entries)
        sources = "; ".join(f"{source} ({about})" for source, about in pairs)
        note = (
            "Measured under the protocol that the row names, or the nearest of ours to it, with their authors' "
            "encoders, crops and noise. Rows of one protocol and source compare with each other; with this bench "
            "only where the row says so, and then a difference of a few hundredths means little. "
        )
        blocks += [theirs, page.Text(f"{note}Sources: {sources}.", "note")]
    return blocks


def image_blocks(bench: Bench, others: Sequence[Bench]) -> list[page.Block]:
    shown, rule = images(bench, others)
    return [page.Text(rule), shown] if shown.rows else [page.Text("No images to show.", "soft")]


def headline(bench: Bench) -> str:
    """The means in a line."""
    found = analysis.levels(bench)
    told = {name: metric.title for name, metric in bench.metrics.items() if metric.role != "copy"}
    return ", ".join(f"{title} {number(found[name].value)}" for name, title in told.items())


def measured(bench: Bench) -> dict[str, Metric]:
    """The metrics to show: a background that nothing told from its subject has no column."""

    def seen(name: str) -> bool:
        return bool(np.isfinite(bench.scores.column(name)).any())

    return {name: metric for name, metric in bench.metrics.items() if metric.role != "copy" or seen(name)}


def columns(bench: Bench) -> list[str]:
    """The titles of the metrics, with what is better where it falls."""
    shown = measured(bench).values()
    return [metric.title + (" \N{DOWNWARDS ARROW}" if metric.role == "copy" else "") for metric in shown]


def scores(bench: Bench, others: Sequence[Bench]) -> page.Table:
    """This bench, others and the real images, all measured here."""

    def row(title: str, found: Mapping[str, Estimate], strong: bool = False) -> page.Row:
        return page.Row(title, [_plain(found.get(name, ABSENT)) for name in measured(bench)], strong)

    rows = [row(bench.label, analysis.levels(bench), strong=True)]
    rows += [row(other.label, analysis.levels(other)) for other in others]
    line = {name: level for name, level in analysis.oracle_levels(bench).items() if np.isfinite(level.value)}
    if line:
        rows.append(row("real images", line))
    return page.Table(columns(bench), rows, first="model")


def publications(bench: Bench) -> page.Table:
    """What others measured, who did, and under which protocol: in a table of its own, for it is not ours."""
    rows = [
        page.Row(
            entry.method,
            (
                entry.protocol,
                entry.by,
                analysis.comparability(bench, entry),
                *(entry.scores.get(name, ABSENT) for name in measured(bench)),
            ),
        )
        for entry in analysis.published_beside(bench)
    ]
    titles = ("measured under", "by", "comparable?", *columns(bench))
    return page.Table(titles, rows, title="Published, measured by others")


def differences(bench: Bench, other: Bench) -> page.Table:
    """This bench less another, task by task."""
    found = analysis.paired(bench, other)
    cells = [
        _toned(found[name], metric.role == "copy") if name in found else ABSENT
        for name, metric in measured(bench).items()
    ]
    row = page.Row(f"{bench.label} minus {other.label}", cells, strong=True)
    return page.Table(columns(bench), [row], "difference", f"Minus {other.label}, task by task")


def breakdown(bench: Bench) -> page.Table:
    """By kind of subject and of prompt."""
    rows = [
        page.Row(group.title, (str(group.tasks), *(_plain(group.levels[name]) for name in measured(bench))))
        for group in analysis.breakdown(bench)
    ]
    return page.Table(("prompts", *columns(bench)), rows, first="kind")


def remarks(bench: Bench) -> list[page.Remark]:
    """What to know before trusting the numbers: alarms, departures, pictures that could not be scored."""
    found = [page.Remark(alarm.text, alarm.serious) for alarm in analysis.alarms(bench)]
    found += [page.Remark(f"departs from the protocol: {text}", True) for text in bench.info["departures"]]
    total = len(bench.tasks) * bench.images
    for name, metric in bench.metrics.items():
        count, serious = bench.scores.unscored(name), metric.role != "copy"  # which says nothing of a new place
        if count and (count < total or serious):
            text = f"{metric.title} could score {total - count:,} of {total:,} images."
            found.append(page.Remark(text, serious))
    if len(set(bench.scores.subjects)) < 10:
        found.append(page.Remark(f"Only {len(set(bench.scores.subjects))} subjects: intervals over so few are rough."))
    return found


def facts(bench: Bench) -> list[tuple[str, str]]:
    """The bench in a few lines."""
    identity = bench.info["identity"]
    return [
        ("policy", str(identity["policy"])),
        ("weights", bench.label),
        ("data", str(bench.info.get("data") or "drawn")),
        ("hardware", str(bench.info.get("hardware", "?"))),
        ("started", str(bench.info.get("started", "?"))),
    ]


def images(bench: Bench, others: Sequence[Bench] = ()) -> tuple[page.ImageGrid, str]:
    """The images and the rule they were chosen by: evenly spaced in the ranking of the first metric."""
    first = next(iter(bench.metrics))
    values = bench.scores.per_task(first)
    order = [int(n) for n in np.argsort(values) if np.isfinite(values[n])]
    count = min(int(bench.info.get("grid_rows", 12)), len(order))
    places = sorted({round(i) for i in np.linspace(0, len(order) - 1, count)}) if count else []
    rows, sheet, captions, shown, most = [], [], [], 0, bench.images
    for place in places:
        t = order[place]
        task = bench.tasks[t]
        references = [p for n in range(8) if (p := bench.folder.reference(task.subject, n)).is_file()]
        shown = max(shown, len(references))
        generated = [(b, n) for b in (bench, *others) for n in range(most if b is bench and not others else 1)]
        cells = [page.ImageCell(page.thumbnail(p), task.prompt) for p in references]
        for b, n in generated:
            cells.append(page.ImageCell(page.thumbnail(b.folder.image((task, n))), task.prompt, _marks(b, t, n)))
        rows.append(page.ImageRow(task.prompt, f"{task.subject}, rank {place + 1} of {len(order)}", cells))
        sheet.append([Image.open(p).convert("RGB") for p in references])
        sheet[-1] += [Image.open(b.folder.image((task, n))).convert("RGB") for b, n in generated]
        captions.append(task.prompt)
    headers = ["reference"] * shown + ([b.label for b in (bench, *others)] if others else ["generations"])
    if rows:
        write(bench.folder.path / "plots" / "pictures.png", png(grid(sheet, headers, captions)))
    rule = (
        f"All prompts are ranked by the mean {bench.metrics[first].title} of their images, and shown at even steps "
        f"from the worst to the best{', the first image of each' if others and most > 1 else ''}."
    )
    return page.ImageGrid(headers, rows, "plots/pictures.png" if rows else ""), rule


def _marks(bench: Bench, task: int, n: int) -> tuple[str, ...]:
    """The scores of one picture."""
    values = [(metric.title, float(bench.scores.column(name)[n, task])) for name, metric in bench.metrics.items()]
    return tuple(f"{title} {number(value)}" for title, value in values if np.isfinite(value))


def _plain(cell: Any) -> Any:
    return page.Plain(*cell) if isinstance(cell, Estimate) else cell


def _toned(estimate: Estimate, lower_is_better: bool) -> Estimate:
    return page.Flipped(*estimate) if lower_is_better else estimate
