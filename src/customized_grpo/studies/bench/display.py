"""What `cgrpo bench` shows in the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from customized_grpo.errors import printable
from customized_grpo.page import Page, show
from customized_grpo.studies.bench.protocols import PROTOCOLS
from customized_grpo.studies.bench.record import Bench


class BenchDisplay:
    """A bar for what is being done; a line when it is done where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console, self.tasks = console, dict[str, TaskID]()
        self.progress = Progress(
            TextColumn("{task.description:<24}", markup=False), BarColumn(bar_width=30), MofNCompleteColumn(),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
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
    console.print("cgrpo bench PROTOCOL data=FOLDER --config CONFIG.yaml, or --run RUN", highlight=False)


def show_rules(console: Console, name: str, rules: Sequence[str], departures: Sequence[str]) -> None:
    """What will be done, before it is."""
    console.print(name, style="bold", highlight=False)
    for rule in rules:
        console.print(Padding(rule, (0, 0, 0, 2)), highlight=False)
    for text in departures:
        console.print(Padding(Text.assemble(("departs:", "yellow"), " ", printable(text)), (0, 0, 0, 2)))


def show_bench(console: Console, bench: Bench, table: Path, shown: Page, report: Path) -> None:
    """The scores, the differences, the kinds, the alarms, and where everything is."""
    show(console, shown)
    note = "" if table.suffix == ".parquet" else "   (pip install -e '.[bench]' for parquet)"
    console.print(
        f"report    {report}\nscores    {table}{note}\nimages    {bench.folder.images}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
