"""Progress of work that takes minutes to days."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """A bar for each kind of work. Without a terminal, a line whenever another tenth of it is done."""

    def __init__(self, console: Console) -> None:
        self.console, self.tasks, self.tenths = console, dict[str, TaskID](), dict[str, int]()
        self.bars = Bars(
            TextColumn("{task.description:<24}", markup=False), BarColumn(bar_width=30), MofNCompleteColumn(),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say what is being done, how much of it is done, and how much there is (0 if that is not known)."""
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total or None)
        tenth = 10 * done // total if total else 0
        if not self.console.is_terminal and total and tenth > self.tenths.get(what, -1):
            self.tenths[what] = tenth
            self.console.print(f"{what}: {done} of {total}", highlight=False, markup=False)
        self.bars.update(self.tasks[what], completed=done)
