"""The report of a bench: the numbers and how sure they are, beside the oracle line and what others published."""

import base64
import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from customized_grpo.bench import analysis
from customized_grpo.bench.protocols import Metric
from customized_grpo.bench.record import Bench, read_bench
from customized_grpo.grids import grid
from customized_grpo.images import png
from customized_grpo.report import page
from customized_grpo.report.intervals import Estimate
from customized_grpo.report.page import Remark
from customized_grpo.report.tables import Cell, Flipped, PictureRow, Plain, Row, Table
from customized_grpo.store import write

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
    try:
        bench.folder.remember(other.folder.path for other in others)
        return page.write(bench.folder.path / "report.html", page.render("bench.html", **contents(bench, others)))
    except OSError as error:
        raise page.cannot_write(bench.folder.path, error) from error


def contents(bench: Bench, others: Sequence[Bench] = ()) -> dict[str, Any]:
    """What `templates/bench.html` shows. Writes the pictures."""
    info = bench.info
    headers, rows, rule = pictures(bench, others)
    return {
        "title": bench.label,
        "protocol": bench.protocol,
        "about": info["about"],
        "source": info["source"],
        "headline": headline(bench),
        "remarks": remarks(bench),
        "size": f"{bench.values.shape[0]} prompts x {bench.values.shape[1]} images",
        "scores": scores(bench, others),
        "published": publications(bench),
        "differences": [(other.label, differences(bench, other)) for other in others],
        "breakdown": breakdown(bench),
        "rules": info["rules"],
        "departures": info["departures"],
        "sources": list(dict.fromkeys((row.source, row.about) for row in analysis.published_beside(bench))),
        "picture_headers": headers,
        "picture_rows": rows,
        "picture_rule": rule,
        "num_subjects": len(set(bench.subjects)),
        "facts": facts(bench),
        "command": shlex.join(map(str, info.get("command", []))),
        "versions": list(dict(info.get("versions") or {}).items()),
    }


def headline(bench: Bench) -> str:
    """The means in a line."""
    found = analysis.levels(bench)
    told = {name: metric.title for name, metric in bench.metrics.items() if metric.role != "copy"}
    return ", ".join(f"{title} {page.number(found[name].value)}" for name, title in told.items())


def measured(bench: Bench) -> dict[str, Metric]:
    """The metrics to show: a background that nothing told from its subject has no column."""

    def seen(name: str) -> bool:
        return bool(np.isfinite(bench.values[:, :, bench.column(name)]).any())

    return {name: metric for name, metric in bench.metrics.items() if metric.role != "copy" or seen(name)}


def columns(bench: Bench) -> list[str]:
    """The titles of the metrics, with what is better where it falls."""
    shown = measured(bench).values()
    return [metric.title + (" \N{DOWNWARDS ARROW}" if metric.role == "copy" else "") for metric in shown]


def scores(bench: Bench, others: Sequence[Bench]) -> Table:
    """This bench, others and the oracle line, all measured here."""

    def row(title: str, found: Mapping[str, Estimate], strong: bool = False) -> Row:
        return Row(title, strong, tuple(_plain(found.get(name, ABSENT)) for name in measured(bench)))

    rows = [row(bench.label, analysis.levels(bench), strong=True)]
    rows += [row(other.label, analysis.levels(other)) for other in others]
    line = {name: level for name, level in analysis.oracle_levels(bench).items() if np.isfinite(level.value)}
    if line:
        rows.append(row("oracle line (true pictures)", line))
    return Table(tuple(columns(bench)), rows)


def publications(bench: Bench) -> Table:
    """What others measured, who did, and under which protocol: in a table of its own, for it is not ours."""
    rows = [
        Row(
            entry.method,
            False,
            (
                entry.protocol,
                entry.by,
                analysis.comparability(bench, entry),
                *(entry.scores.get(name, ABSENT) for name in measured(bench)),
            ),
        )
        for entry in analysis.published_beside(bench)
    ]
    return Table(("measured under", "by", "comparable?", *columns(bench)), rows)


def differences(bench: Bench, other: Bench) -> Table:
    """This bench less another, task by task."""
    found = analysis.paired(bench, other)
    cells = [
        _toned(found[name], metric.role == "copy") if name in found else ABSENT
        for name, metric in measured(bench).items()
    ]
    return Table(tuple(columns(bench)), [Row(f"{bench.label} less {other.label}", True, tuple(cells))])


def breakdown(bench: Bench) -> Table:
    """By kind of subject and of prompt."""
    rows = [
        Row(group.title, False, (str(group.tasks), *(_plain(group.levels[name]) for name in measured(bench))))
        for group in analysis.breakdown(bench)
    ]
    return Table(("prompts", *columns(bench)), rows)


def remarks(bench: Bench) -> list[Remark]:
    """What to know before trusting the numbers: alarms, departures, pictures that could not be scored."""
    found = [Remark(alarm.text, alarm.serious) for alarm in analysis.alarms(bench)]
    found += [Remark(f"departs from the protocol: {text}", True) for text in bench.info["departures"]]
    for name, count in analysis.unscored(bench).items():
        total = bench.values.shape[0] * bench.values.shape[1]
        serious = bench.metrics[name].role != "copy"  # which has nothing to say of a place that was to stay
        if count < total or serious:
            text = f"{bench.metrics[name].title} could score {total - count:,} of {total:,} pictures."
            found.append(Remark(text, serious))
    if len(set(bench.subjects)) < 10:
        found.append(Remark(f"Only {len(set(bench.subjects))} subjects: intervals over so few are rough."))
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


def pictures(bench: Bench, others: Sequence[Bench] = ()) -> tuple[list[str], list[PictureRow], str]:
    """Headers, rows and the rule they were chosen by: evenly spaced in the ranking of the first metric."""
    first = next(iter(bench.metrics))
    values = bench.per_task()[:, 0]
    order = [int(n) for n in np.argsort(values) if np.isfinite(values[n])]
    count = min(int(bench.info.get("grid_rows", 12)), len(order))
    places = sorted({round(i) for i in np.linspace(0, len(order) - 1, count)}) if count else []
    rows, sheet, captions, shown, most = [], [], [], 0, bench.values.shape[1]
    for place in places:
        t = order[place]
        task = bench.tasks[t]
        references = [p for n in range(8) if (p := bench.folder.reference(task.subject, n)).is_file()]
        shown = max(shown, len(references))
        generated = [(b, n) for b in (bench, *others) for n in range(most if b is bench and not others else 1)]
        cells = [Cell(_thumbnail(p), task.prompt) for p in references]
        for b, n in generated:
            cells.append(Cell(_thumbnail(b.folder.image((task, n))), task.prompt, _marks(b, t, n)))
        rows.append(PictureRow(task.prompt, f"{task.subject}, rank {place + 1} of {len(order)}", cells))
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
    return headers, rows, rule if rows else ""


def _marks(bench: Bench, task: int, n: int) -> tuple[str, ...]:
    """The scores of one picture."""
    values = [(metric.title, float(bench.values[task, n, k])) for k, metric in enumerate(bench.metrics.values())]
    return tuple(f"{title} {page.number(value)}" for title, value in values if np.isfinite(value))


def _thumbnail(path: Path) -> str:
    """A picture of at most 320 pixels as a data URI."""
    with Image.open(path) as opened:
        small = opened.convert("RGB")
    small.thumbnail((320, 320))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _plain(cell: Any) -> Any:
    return Plain(*cell) if isinstance(cell, Estimate) else cell


def _toned(estimate: Estimate, lower_is_better: bool) -> Estimate:
    return Flipped(*estimate) if lower_is_better else estimate
