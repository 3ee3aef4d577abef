"""What `cgrpo probe` shows in the terminal."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from customized_grpo.probe.findings import Findings
from customized_grpo.probe.measure import Branches
from customized_grpo.probe.report import header, table
from customized_grpo.report.page import words


class Progress:
    """A line for each finished measurement."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total, self.done = console, total, done
        if done:
            console.print(f"{done} of {total} measurements are finished already", highlight=False)

    def __call__(self, branches: Branches) -> None:
        self.done += 1
        what = f"step {branches.steps[0]}" if len(branches.steps) == 1 else "all steps together"
        self.console.print(f"{self.done:>3} of {self.total}  {what}  {branches.seconds:.1f} s", highlight=False)


def show_findings(console: Console, found: Findings, folder: Path) -> None:
    """The answer, the numbers it rests on, and where everything is."""
    first, second = found.rewards[:2]
    colour = {"supports": "green", "does not support": "red"}.get(found.verdict.answer, "yellow")
    title = "What each step decides; in brackets 95 % intervals of the shares"
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    left_out = {"progress", "across subjects"}
    if len(found.rewards) == 2:
        left_out.add(f"{words(second)} weight")  # what the first leaves
    columns = [(i, name) for i, name in enumerate(header(found)) if name not in left_out]
    for _, name in columns:
        grid.add_column(name, justify="right", no_wrap=True)
    for row in table(found):
        grid.add_row(*(row[i] if name.endswith("share") else row[i].split(" [")[0] for i, name in columns))
    console.print(grid)
    console.print(f'"{first} is decided early, {second} late": [bold {colour}]{found.verdict.answer}[/]')
    console.print(found.verdict.sentence, highlight=False)
    console.print(
        f"report    {folder / 'probe.html'}\nweights   {folder / 'time_weights.json'}\n"
        f"next      cgrpo train 'method.time_weights={{use: from_file, path: {folder / 'time_weights.json'}}}'",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip
