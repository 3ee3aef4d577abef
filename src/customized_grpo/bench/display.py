"""What `cgrpo bench` shows in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from customized_grpo.bench.protocols import PROTOCOLS
from customized_grpo.bench.record import Bench
from customized_grpo.bench.report import breakdown, differences, publications, remarks, scores
from customized_grpo.report.intervals import Estimate


class BenchDisplay:
    """A bar for what is being done; a line when it is done where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console, self.tasks = console, dict[str, TaskID]()
        self.progress = Progress(
            TextColumn("{task.description:<24}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> "BenchDisplay":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total or None)
            if not self.console.is_terminal and total:
                there = f" and {done} are there" if done else ""
                self.console.print(f"{what}: {total - done} to do{there}", highlight=False)
        self.progress.update(self.tasks[what], completed=done)


def show_protocols(console: Console) -> None:
    """All protocols, a line or two each."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("protocol", "what it is", "measured"):
        table.add_column(column)
    for protocol in PROTOCOLS.values():
        table.add_row(protocol.name, protocol.about, ", ".join(metric.title for metric in protocol.metrics.values()))
    console.print(table)
    console.print("cgrpo bench PROTOCOL data=FOLDER --config CONFIG.yaml, or --run RUN", highlight=False, markup=False)


def show_rules(console: Console, name: str, rules: Sequence[str], departures: Sequence[str]) -> None:
    """What will be done, before it is."""
    console.print(f"[bold]{escape(name)}[/bold]")
    for rule in rules:
        console.print(Padding(Text(rule), (0, 0, 0, 2)))
    for text in departures:
        console.print(Padding(f"[yellow]departs:[/yellow] {escape(text)}", (0, 0, 0, 2)), highlight=False)


def show_bench(console: Console, bench: Bench, others: Sequence[Bench], table: Path, report: Path) -> None:
    """The scores, the differences, the kinds, the alarms, and where everything is."""
    _show(console, scores(bench, others), f"{bench.protocol}, here; under each mean its 95 % interval over subjects")
    if (theirs := publications(bench)).rows:
        _show(console, theirs, "published, measured by others")
    for other in others:
        _show(console, differences(bench, other), f"less {other.label}, task by task")
    if (kinds := breakdown(bench)).rows:
        _show(console, kinds, "by kind")
    for remark in remarks(bench):
        console.print(f"[{'bold red' if remark.serious else 'yellow'}]![/] {escape(remark.text)}", highlight=False)
    note = "" if table.suffix == ".parquet" else "   (pip install customized-grpo[bench] for parquet)"
    console.print(
        f"report    {report}\nscores    {table}{note}\nimages    {bench.folder.images}",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip


def _show(console: Console, content: Any, title: str) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in content.columns:
        table.add_column(column, justify="right")
    for row in content.rows:
        title = f"[bold]{escape(row.title)}[/]" if row.strong else escape(row.title)
        table.add_row(title, *(_cell(cell) for cell in row.cells))
    console.print(table)


def _cell(cell: Any) -> str:
    if isinstance(cell, str):
        return escape(cell)
    if not isinstance(cell, Estimate):
        return f"{cell:.3f}"
    if not np.isfinite(cell.value):
        return "\N{EN DASH}"
    shape = "{:.3f}" if cell.plain else "{:+.3f}"
    text = shape.format(cell.value)
    if np.isfinite(cell.low):
        text += f"\n[dim]{shape.format(cell.low)} to {shape.format(cell.high)}[/]"
    colour = {"rose": "green", "fell": "red"}.get("" if cell.plain else cell.tone)
    return f"[{colour}]{text}[/]" if colour else text
