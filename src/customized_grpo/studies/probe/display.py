"""What `cgrpo probe` shows in the terminal."""

from pathlib import Path

from rich.console import Console

from customized_grpo.page import show_block
from customized_grpo.studies.probe.findings import Findings
from customized_grpo.studies.probe.measure import Branches
from customized_grpo.studies.probe.report import table


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
    show_block(console, table(found))
    console.print(f'"{first} is decided early, {second} late": {found.verdict.answer}', style="bold", markup=False)
    console.print(found.verdict.sentence, highlight=False, markup=False)
    console.print(
        f"report    {folder / 'probe.html'}\nweights   {folder / 'time_weights.json'}\n"
        f"next      cgrpo train 'method.time_weights={{use: from_file, path: {folder / 'time_weights.json'}}}'",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
