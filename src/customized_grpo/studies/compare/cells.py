"""The cells of a grid on disk: their state, and how they are run. A cell is an ordinary `cgrpo train`."""

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any, Literal

from customized_grpo.config import load_config
from customized_grpo.settings.identity import overrides
from customized_grpo.settings.parse import to_yaml
from customized_grpo.store import now, write
from customized_grpo.store.run import seconds
from customized_grpo.store.scores import read_scores
from customized_grpo.studies.compare.grid import Cell, Grid, GridFolder, budget, cells, check_runnable, check_same
from customized_grpo.studies.compare.methods import BASE
from customized_grpo.studies.probe.record import ProbeFolder
from customized_grpo.train.trackers import provenance

Status = Literal["waiting", "running", "stopped", "failed", "damaged", "finished"]
Say = Callable[[str], None]

PROGRAM = (sys.executable, "-m", "customized_grpo")
POLL = 0.2
"""Seconds between two looks at a running cell."""


@dataclass(frozen=True)
class State:
    """The state of a cell."""

    status: Status
    """waiting: not started. stopped: resumes from its checkpoint. damaged: the folder has no complete run."""
    iteration: int = 0
    seconds: float = 0.0
    """Seconds of the finished iterations."""
    note: str = ""

    @property
    def reason(self) -> str:
        """The note or the iteration in brackets, to follow the status."""
        text = self.note or f"after iteration {self.iteration}" * (self.iteration > 0)
        return f" ({text})" if text else ""


# ---- the state of a cell


def state(cell: Cell) -> State:
    """The state of a cell, according to its folder and its locks.

    Raises:
        UserError: if the folder holds a run of another configuration.
    """
    found = _state_on_disk(cell)
    if not cell.run.is_locked() and not _is_locked(cell.log):
        return found
    return State("running", found.iteration, found.seconds)


def _state_on_disk(cell: Cell) -> State:
    """The state of a cell if no process runs it."""
    run = cell.run
    if run.is_empty():
        return State("waiting")
    if not run.config.is_file():
        return State("damaged", note="it has no config.yaml")
    check_same(cell)
    rows = run.records()
    done = int(rows[-1]["iteration"]) if rows else 0
    status = "finished" if cell.method == BASE else run.facts().get("status")  # none if run.json is damaged
    if status != "finished":
        return State("failed" if status == "failed" else "stopped", done, seconds(rows))
    try:
        read_scores(cell.evaluation)
    except (OSError, ValueError):
        note = f"{cell.evaluation.relative_to(run.path)} is missing or damaged"
        return State("damaged", done, seconds(rows), note)
    return State("finished", done, seconds(rows))


@contextmanager
def _locked(log: Path) -> Iterator[IO[bytes] | None]:
    """The log of a cell, locked, or None if another process holds the lock.

    A process whose output goes there shares the lock, and so keeps it if the grid that started it is killed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks on this system; run folders have their own
            pass
        except OSError:
            yield None
            return
        yield file


def _is_locked(log: Path) -> bool:
    if not log.exists():
        return False
    with _locked(log) as file:
        return file is None


# ---- the folder of a grid


def open_folder(grid: Grid, root: Path) -> list[Cell]:
    """Create or reopen the folder of a comparison and write its grid. Methods and seeds may be added to an old one.

    Raises:
        UserError: if the folder holds something else, or runs of another configuration.
    """
    folder, made = GridFolder(root), cells(grid, root)
    if not (root / folder.MARKER).is_file():
        folder.check_free()
    if grid.probe is not None:
        ProbeFolder.existing(grid.probe)
    check_runnable(made)
    for cell in made:
        state(cell)
    folder.write(folder.MARKER, to_yaml(grid))
    folder.describe(**{**provenance(), **folder.facts(), "budget": budget(made[0].config)})
    return made


def set_aside(cell: Cell) -> Path:
    """Rename the folder of a damaged run, to keep it."""
    path = cell.run.path
    taken = (path.with_name(f".{path.name}-damaged-{n}") for n in range(1, 10**6))
    return path.rename(next(path for path in taken if not path.exists()))


# ---- running


def run_cells(
    todo: Sequence[Cell], *, workers: int | None = None, threads: int | None = None, say: Say = lambda text: None
) -> dict[str, State]:
    """Run every cell that is not finished, several at a time, each in a process of its own.

    A failed cell does not stop the others. SIGINT and SIGTERM stop all cells after a checkpoint. Cells that another
    process runs are waited for.

    Args:
        todo: the cells; finished ones are not run again.
        workers: processes at once; None takes one for each GPU, or else for each core.
        threads: CPU threads of each; None divides the cores.
        say: called with one line about every cell that starts or ends.

    Returns:
        The final state of every cell, by name.
    """
    ended = {cell.name: state(cell) for cell in todo}
    waiting: SimpleQueue[Cell] = SimpleQueue()
    for cell in (cell for cell in todo if ended[cell.name].status != "finished"):
        waiting.put(cell)
    stop = threading.Event()

    def work(environment: dict[str, str]) -> None:
        with suppress(Empty):
            while not stop.is_set():
                cell = waiting.get_nowait()
                if found := _run(cell, environment, stop, say):
                    ended[cell.name] = found
                else:
                    waiting.put(cell)
                    stop.wait(POLL)

    slots = _slots(len(todo), workers, threads)
    with _interrupted_by_sigterm(), ThreadPoolExecutor(len(slots)) as pool:
        try:
            list(pool.map(work, slots))
        finally:
            stop.set()  # after an interrupt; otherwise there is nothing left to stop
    return ended


def _run(cell: Cell, environment: dict[str, str], stop: threading.Event, say: Say) -> State | None:
    """Run a cell to its end, or until `stop`; None if another process runs it."""
    with _locked(cell.log) as log:
        if log is None or cell.run.is_locked():
            return None
        found = _state_on_disk(cell)
        if found.status == "finished":
            return found
        if found.status == "damaged":
            say(f"{cell.name}: damaged{found.reason}; kept as {set_aside(cell).name} and started again")
            found = State("waiting")
        say(f"{cell.name}: {'started' if found.status == 'waiting' else f'resumed after iteration {found.iteration}'}")
        process = _start(command(cell, found), log, env={**os.environ, **environment}, start_new_session=True)
        while process.poll() is None and not stop.wait(POLL):
            pass
        stopped = process.poll() is None
        if stopped:
            process.terminate()  # it ends after a checkpoint
        failed = process.wait() != 0 and not stopped
        if cell.method == BASE and process.returncode == 0:
            cell.run.write(cell.run.MARKER, to_yaml(cell.config))  # last: it marks the evaluation as complete
        found = _state_on_disk(cell)
    if failed and found.status in ("waiting", "stopped"):
        found = replace(found, status="failed")
    reason = f"{found.reason}, {last_line(cell.log)}; the log is {cell.log}"
    say(f"{cell.name}: {found.status}{'' if found.status == 'finished' else reason}")
    return found


def command(cell: Cell, found: State) -> list[str]:
    """The command that starts a cell, or resumes it with the settings that the grid has now."""
    if found.status != "waiting":
        changed = overrides(load_config(cell.run.config), cell.config)
        changed = [f"{name}={value}" for name, value in changed.items() if name not in ("output", "evaluation.base")]
        return [*PROGRAM, "train", "--trust-code", "--resume", str(cell.run.path), *changed]
    file = write(cell.root / "configs" / f"{cell.log.stem}.yaml", to_yaml(cell.config))
    words = ["eval", "--output", str(cell.run.path)] if cell.method == BASE else ["train"]
    return [*PROGRAM, *words, "--trust-code", str(file)]  # the grid was trusted as a whole


def _start(words: Sequence[str], log: IO[bytes], **options: Any) -> subprocess.Popen[Any]:
    """Start a command that writes to a log, below a line with the time and the command."""
    log.write(f"\n# {now()}  {shlex.join(words)}\n".encode())
    log.flush()
    return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options)


def last_line(log: Path) -> str:
    """The last line that a command printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "nothing was logged")


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM do what SIGINT does."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _slots(count: int, workers: int | None, threads: int | None) -> list[dict[str, str]]:
    """The environment of each worker: its share of the cores, and its GPU if there are GPUs."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
    workers = max(1, min(workers or len(gpus) or cores // (threads or 1), count))
    share = str(threads or max(1, cores // workers))
    common = {"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share}
    return [common | ({"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]} if gpus else {}) for n in range(workers)]
