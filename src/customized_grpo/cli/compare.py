"""The command `cgrpo compare`: run a grid, resume it, show its progress."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from customized_grpo.cli.terminal import TrustCode, new_console, quiet_libraries, show_trusted, split_settings
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.shell import command

if TYPE_CHECKING:
    from customized_grpo.studies.compare.cells import State

console = new_console()
SIGNS = {"waiting": "·", "running": "▶", "stopped": "‖", "failed": "✗", "damaged": "✗", "finished": "✓"}


def compare(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[GRID.yaml] [seeds=[0] ...]", help="A grid and overrides.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; default: comparisons/NAME, with the name of the grid.")
    ] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Resume the comparison in this folder.")] = None,
    status: Annotated[Path | None, typer.Option("--status", help="Only show the progress of this comparison.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Concurrent runs; default: one per GPU, or core.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per run; default: cores / workers.")] = None,
    trust_code: TrustCode = False,
) -> None:
    """Train methods x seeds and compare them on held-out subjects. Re-run to resume."""
    from customized_grpo import page, trust
    from customized_grpo.cli.display import duration
    from customized_grpo.studies.compare.cells import last_line, open_folder, run_cells, state
    from customized_grpo.studies.compare.grid import GridFolder, cells, load_grid, open_grid, trust_needed

    quiet_libraries()
    if status is not None:
        show_status(status)
        return
    file, overrides = split_settings(settings)
    if resume is not None:
        if file is not None or output is not None:
            raise UserError("--resume reads the grid from the folder; remove the file and --output.")
        grid, root = open_grid(resume, overrides), resume
    elif file is None:
        raise UserError("Name a grid, such as toyworld/compare-quick, or --resume FOLDER.")
    else:
        grid, root = load_grid(file, overrides), output or Path("comparisons") / file.stem
    needed = trust_needed(cells(grid, root))
    if resume is None:
        show_trusted(console, frozenset().union(*needed))
    for found in needed:
        trust.require(root / GridFolder.MARKER, found, trust_code=trust_code or resume is None)
    base, *made = open_folder(grid, root)
    done = sum(state(cell).status == "finished" for cell in made)
    runs = f"{len(made)} runs of {len(grid.methods)} methods, {done} finished; seeds {', '.join(map(str, grid.seeds))}"
    facts = [("comparison", str(root)), ("grid", runs), ("each run", GridFolder(root).facts()["budget"])]
    page.show_block(console, page.Facts(facts))
    started = time.monotonic()

    def say(text: str) -> None:
        console.print(f"{duration(time.monotonic() - started):>6}", style="dim", end="  ")
        console.print(text, soft_wrap=True)

    try:
        run_cells([base], threads=threads, say=say)
        if state(base).status != "finished":
            raise UserError(f"The base policy could not be evaluated ({last_line(base.log)}); the log is {base.log}.")
        ended = run_cells(made, workers=workers, threads=threads, say=say)
    except KeyboardInterrupt:
        console.print("Stopped; everything is saved. Resume with:", end=" ")
        console.print(command("compare", "--resume", root), style="bold", soft_wrap=True)
        raise
    _finish(root, ended)


def show_status(folder: Path) -> None:
    """Print the progress of a comparison: a mark for every cell, what failed, and about how much time remains."""
    from customized_grpo import page
    from customized_grpo.cli.display import duration
    from customized_grpo.studies.compare.cells import last_line, state
    from customized_grpo.studies.compare.grid import cells, open_grid
    from customized_grpo.studies.compare.methods import find_method

    grid = open_grid(folder)
    base, *made = cells(grid, folder)
    found = {cell.name: state(cell) for cell in made}
    marks: dict[str, list[str]] = {}
    for cell in made:
        where = found[cell.name]
        share = f" {where.iteration}/{cell.config.training.iterations}" * (where.status in ("running", "stopped"))
        marks.setdefault(cell.method, []).append(f"{SIGNS[where.status]}{share}")
    rows = [page.Row(find_method(method, grid.own_methods).title, some) for method, some in marks.items()]
    page.show_block(console, page.Table([f"seed {seed}" for seed in grid.seeds], rows, title=str(folder)))
    counts = {status: sum(s.status == status for s in found.values()) for status in SIGNS}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    console.print(f"base {state(base).status}; {told}")
    for cell in made:
        if (where := found[cell.name]).status in ("failed", "damaged"):
            why = where.note or last_line(cell.log)
            console.print(f"{cell.name}: {where.status}, {why}", soft_wrap=True)
    done = sum(s.iteration for s in found.values())
    left = sum(cell.config.training.iterations for cell in made) - done
    if done and left:
        seconds = left * sum(s.seconds for s in found.values()) / done
        console.print(f"about {duration(seconds)} of one worker left")


def _finish(root: Path, ended: "dict[str, State]") -> None:
    from customized_grpo import page
    from customized_grpo.studies.compare.analysis import Comparison
    from customized_grpo.studies.compare.page import contents

    lost = [name for name, found in ended.items() if found.status != "finished"]
    if len(lost) < len(ended):
        page.present(console, contents(Comparison(root)), root)
    if lost:
        names = ", ".join(lost[:4]) + (", ..." if len(lost) > 4 else "")
        raise TrainingError(
            f"{len(lost)} of {len(ended)} runs did not finish ({names}); `{command('compare', '--status', root)}` "
            f"shows why. Once fixed, resume with: {command('compare', '--resume', root)}"
        )
