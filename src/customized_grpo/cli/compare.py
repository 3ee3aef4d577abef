"""What `cgrpo compare` does: run a grid, go on with it, say where it stands."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from customized_grpo import trust
from customized_grpo.cli.display import duration
from customized_grpo.cli.terminal import show_trusted
from customized_grpo.errors import TrainingError, UserError, printable
from customized_grpo.studies.compare.cells import (
    State,
    last_line,
    measure_base,
    open_folder,
    run_cells,
    run_cells_on_ray,
    state,
)
from customized_grpo.studies.compare.findings import Finding, headline
from customized_grpo.studies.compare.grid import (
    Cell,
    Grid,
    base_evaluation,
    budget,
    cells,
    load_grid,
    open_grid,
    trust_needed,
)
from customized_grpo.studies.compare.methods import find_method

SIGNS = {"waiting": "·", "running": "▶", "stopped": "‖", "failed": "✗", "damaged": "✗", "finished": "✓"}


def run_grid(
    console: Console,
    file: Path | None,
    overrides: Sequence[str] = (),
    *,
    output: Path | None = None,
    resume: Path | None = None,
    workers: int | None = None,
    threads: int | None = None,
    ray: bool = False,
    trust_code: bool = False,
) -> Path:
    """Run every cell that is not finished, then write the report.

    Args:
        file: the grid's YAML; its folder is comparisons/NAME unless `output` says otherwise.
        overrides: `seeds=[0]`, `config.training.iterations=5` and the like.
        resume: go on with the grid in this folder instead.
        workers, threads: see `run_cells`.
        ray: hand the cells to Ray.
        trust_code: run whatever the folder to go on with names.

    Returns:
        The folder of the comparison.

    Raises:
        UserError: if the grid is wrong, or the folder holds something else.
        TrainingError: if a cell failed; the others are finished.
    """
    if resume is not None:
        if file is not None or output is not None:
            raise UserError("--resume takes the grid from the folder; leave the file and --output out.")
        grid, root = open_grid(resume, overrides, run=True, trust_code=trust_code), resume
    elif file is None:
        raise UserError("Name a grid, such as recipes/toyworld/compare-quick.yaml, or --resume FOLDER.")
    else:
        grid, root = load_grid(file, overrides), output or Path("comparisons") / file.stem
        needed = trust_needed(grid, root)
        show_trusted(console, frozenset().union(*needed))
        for found in needed:
            trust.remember(found)
    made = open_folder(grid, root)
    show_plan(console, grid, root, made)
    started = time.monotonic()

    def say(text: str) -> None:
        console.print(f"{duration(time.monotonic() - started):>6}", style="dim", highlight=False, end="  ")
        console.print(text, highlight=False, soft_wrap=True)

    try:
        measure_base(grid, root, say)
        if ray:
            ended = run_cells_on_ray(made, threads=threads or 1, gpus=_gpus_per_cell(), say=say)
        else:
            ended = run_cells(made, workers=workers, threads=threads, say=say)
    except KeyboardInterrupt:
        console.print("Stopped; everything is saved. Go on with:", end=" ")
        console.print(f"cgrpo compare --resume {root}", style="bold", highlight=False, soft_wrap=True)
        raise
    _finish(console, root, ended)
    return root


def show_plan(console: Console, grid: Grid, root: Path, made: Sequence[Cell]) -> None:
    """What is about to run, and how much of it is done."""
    spent = budget(made[0].config) if made else None
    done = sum(state(cell).status == "finished" for cell in made)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_row("comparison", str(root))
    table.add_row(
        "grid",
        f"{len(made)} runs of {len(grid.methods)} methods, {done} finished; seeds {', '.join(map(str, grid.seeds))}",
    )
    if spent is not None:
        table.add_row("each run", f"{spent.samples:,} pictures, {spent.gradient_steps:,} gradient steps")
    console.print(table)


def show_status(console: Console, folder: Path, *, trust_code: bool = False) -> dict[str, State]:
    """Where a comparison stands: a mark for every cell, what failed, and about how long it will take."""
    grid = open_grid(folder, trust_code=trust_code)
    made = cells(grid, folder)
    found = {cell.name: state(cell) for cell in made}
    table = Table(title=str(folder), title_justify="left")
    table.add_column("method")
    for seed in grid.seeds:
        table.add_column(f"seed {seed}", justify="center")
    for method in dict.fromkeys(cell.method for cell in made):
        marks = [_mark(cell, found[cell.name]) for cell in made if cell.method == method]
        table.add_row(find_method(method, grid.own_methods).title, *marks)
    console.print(table)
    base = "evaluated" if base_evaluation(folder).is_file() else "not yet evaluated"
    counts = [f"{sum(s.status == status for s in found.values())} {status}" for status in SIGNS]
    console.print(f"base {base}; {', '.join(c for c in counts if not c.startswith('0 '))}", highlight=False)
    for cell in made:
        if found[cell.name].status in ("failed", "damaged"):
            why = found[cell.name].note or last_line(cell.log)
            console.print(f"{cell.name}: {found[cell.name].status}, {why}", highlight=False, soft_wrap=True)
    if left := _seconds_left(made, found):
        console.print(f"about {duration(left)} of one worker left", highlight=False)
    return found


def _mark(cell: Cell, found: State) -> str:
    share = f" {found.iteration}/{cell.config.training.iterations}" if found.status in ("running", "stopped") else ""
    return f"{SIGNS[found.status]}{share}"


def _seconds_left(made: Sequence[Cell], found: dict[str, State]) -> float:
    """Iterations to go times the mean seconds of those done; 0 where nothing is known."""
    done = sum(s.iteration for s in found.values())
    planned = sum(cell.config.training.iterations for cell in made)
    return (planned - done) * sum(s.seconds for s in found.values()) / done if done else 0.0


def _finish(console: Console, root: Path, ended: dict[str, State]) -> None:
    from customized_grpo.studies.compare.analysis import Analysis
    from customized_grpo.studies.compare.page import write_report
    from customized_grpo.studies.compare.results import read_comparison

    lost = [name for name, found in ended.items() if found.status != "finished"]
    if len(lost) < len(ended):
        _show(console, headline(Analysis(read_comparison(root))))
        console.print(f"report  {write_report(root)}", highlight=False, soft_wrap=True)
    if lost:
        names = ", ".join(lost[:4]) + (", ..." if len(lost) > 4 else "")
        raise TrainingError(
            f"{len(lost)} of {len(ended)} runs did not finish ({names}); `cgrpo compare --status {root}` says why, "
            f"`cgrpo compare --resume {root}` tries again."
        )


def _show(console: Console, found: Finding) -> None:
    console.print(Text.assemble(printable(found.question), (f" {found.verdict}. ", "bold"), printable(found.text)))


def _gpus_per_cell() -> float:
    import torch

    return 1.0 if torch.cuda.is_available() else 0.0
