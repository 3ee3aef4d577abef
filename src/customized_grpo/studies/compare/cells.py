"""The cells of a grid on disk: where each stands, and how they are run. A cell is an ordinary `cgrpo train`."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from customized_grpo.config import load_config
from customized_grpo.errors import UserError
from customized_grpo.settings.identity import overrides
from customized_grpo.settings.parse import to_yaml
from customized_grpo.store import now, write
from customized_grpo.store.run import RunFolder
from customized_grpo.store.scores import read_scores
from customized_grpo.studies.compare.grid import (
    Cell,
    Grid,
    base_config,
    base_evaluation,
    cells,
    check_runnable,
    differences,
)
from customized_grpo.train.trackers import provenance

Status = Literal["waiting", "running", "stopped", "failed", "damaged", "finished"]
Say = Callable[[str], None]

POLL = 0.2
"""Seconds between two looks at the running cells."""


@dataclass(frozen=True)
class State:
    """Where a cell stands."""

    status: Status
    """waiting: not begun. stopped: begun, goes on from its checkpoint. damaged: what is there is no whole run."""
    iteration: int = 0
    seconds: float = 0.0
    """Of the finished iterations."""
    note: str = ""


# ---- where a cell stands


def state(cell: Cell) -> State:
    """Where a cell stands, as its folder, its lock and the lock of its run say.

    Raises:
        UserError: if the folder holds a run of another configuration.
    """
    found = _in_folder(cell)
    busy = _is_locked(cell) or RunFolder(cell.folder).is_locked()
    return State("running", found.iteration, found.seconds) if busy else found


def _in_folder(cell: Cell) -> State:
    """Where a cell stands if no process is at it."""
    run = RunFolder(cell.folder)
    if run.is_empty():
        return State("waiting")
    if not run.config.is_file():
        return State("damaged", note="it has no config.yaml")
    _check_same(cell, run)
    rows = run.records()
    done = int(rows[-1]["iteration"]) if rows else 0
    seconds = sum(value for row in rows for key, value in row.items() if key.startswith("seconds/") and value)
    status = run.facts().get("status")  # none if run.json is damaged: training can go on without it
    if status != "finished":
        return State("failed" if status == "failed" else "stopped", done, seconds)
    last = run.evaluation(cell.config.training.iterations)
    try:
        read_scores(last)
    except (OSError, ValueError):
        note = f"it says that it is finished, but {last.relative_to(run.path)} is missing or damaged"
        return State("damaged", done, seconds, note)
    return State("finished", done, seconds)


def _check_same(cell: Cell, run: RunFolder) -> None:
    try:
        found = load_config(run.config)
    except UserError as error:
        raise UserError(f"The run in '{run.path}' cannot be read ({error}); move that folder away.") from error
    differ = differences(cell.config, found)
    if differ:
        raise UserError(
            f"The run in '{run.path}' is not of this grid: {differ[0]}"
            f"{f' and {len(differ) - 1} more' if len(differ) > 1 else ''}; "
            f"name another --output, or move that folder away."
        )


def _lock(cell: Cell) -> AbstractContextManager[IO[str] | None]:
    return _locked(cell.root / "locks" / f"{cell.method}-seed-{cell.seed}.lock")


@contextmanager
def _locked(path: Path) -> Iterator[IO[str] | None]:
    """The lock of a cell, or None if someone else holds it. A child that gets the file holds it on, so that a grid that
    was killed and begun again does not run a cell twice whose first process still lives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks on this system
            pass
        except OSError:
            yield None
            return
        yield file


def _inherited(lock: IO[str]) -> tuple[int, ...]:
    return (lock.fileno(),) if os.name == "posix" else ()


def _is_locked(cell: Cell) -> bool:
    if not (cell.root / "locks").is_dir():
        return False
    with _lock(cell) as file:
        return file is None


# ---- a grid's folder


def open_folder(grid: Grid, root: Path) -> list[Cell]:
    """Make or reopen the folder of a comparison and write its grid. More methods or seeds may be added to an old one.

    Raises:
        UserError: if the folder holds something else, or finished cells of another configuration.
    """
    if root.is_dir() and any(root.iterdir()) and not (root / "compare.yaml").is_file():
        raise UserError(f"The folder '{root}' holds something that is not a comparison; name another --output.")
    if root.exists() and not root.is_dir():
        raise UserError(f"The output '{root}' is a file; name a folder.")
    found = cells(grid, root)
    check_runnable(found)
    for cell in found:
        state(cell)
    shared = root / "base" / "config.yaml"
    if shared.is_file() and (differ := differences(base_config(grid, root), load_config(shared))):
        raise UserError(f"The base evaluation in '{root}' is not of this grid: {differ[0]}; name another --output.")
    write(root / "compare.yaml", to_yaml(grid))
    if not (root / "compare.json").is_file():
        write(root / "compare.json", json.dumps(provenance(), indent=1))
    return found


def set_aside(cell: Cell) -> Path:
    """Move a damaged run out of the way, keeping it."""
    taken = (cell.folder.with_name(f".{cell.folder.name}-damaged-{n}") for n in range(1, 10**6))
    target = next(path for path in taken if not path.exists())
    return cell.folder.rename(target)


# ---- running


def run_cells(
    todo: Sequence[Cell], *, workers: int | None = None, threads: int | None = None, say: Say = lambda text: None
) -> dict[str, State]:
    """Run every cell that is not finished, several at a time, each in a process of its own.

    A cell that fails leaves the others alone. SIGINT and SIGTERM stop all cells after a checkpoint.

    Args:
        todo: the cells; finished ones are left as they are.
        workers: processes at once; None takes one for each GPU, or else for each core.
        threads: CPU threads of each; None shares the cores out.
        say: told one line about every cell that starts or ends.

    Returns:
        The state of every cell in the end, by name.
    """
    slots = _slots(len(todo), workers, threads)
    queue = [cell for cell in todo if state(cell).status != "finished"]
    running: dict[int, _Process] = {}
    ended: dict[str, State] = {}
    with _stop_on_signal() as stop:
        while (queue and not stop.is_set()) or running:
            for number, environment in enumerate(slots):
                if number not in running and not stop.is_set():
                    started = _start_next(queue, environment, say)
                    if started is not None:
                        running[number] = started
            for number, process in list(running.items()):
                if stop.is_set():
                    process.stop()
                if process.finished():
                    ended[process.cell.name] = found = process.result()
                    say(f"{process.cell.name}: {found.status}{_reason(process, found)}")
                    del running[number]
            time.sleep(POLL)
    if stop.is_set():
        raise KeyboardInterrupt
    return {cell.name: ended.get(cell.name) or state(cell) for cell in todo}


def _start_next(queue: list[Cell], environment: dict[str, str], say: Say) -> "_Process | None":
    """Start the first cell of the queue that nobody else runs, and take it off the queue."""
    for cell in list(queue):
        with _lock(cell) as lock:
            if lock is None or RunFolder(cell.folder).is_locked():
                continue
            queue.remove(cell)
            found = _in_folder(cell)
            if found.status == "finished":
                continue
            if found.status == "damaged":
                say(f"{cell.name}: half-written ({found.note}); kept as {set_aside(cell).name} and begun anew")
                found = State("waiting")
            before = "begins" if found.status == "waiting" else f"goes on after iteration {found.iteration}"
            say(f"{cell.name}: {before}")
            return _Process(cell, command(cell, found), environment, lock)
    return None


def command(cell: Cell, found: State) -> list[str]:
    """The command that begins a cell, or resumes it with the settings that the grid has now."""
    program = [sys.executable, "-m", "customized_grpo", "train", "--trust-code"]  # the grid was trusted as a whole
    if found.status != "waiting":
        changed = overrides(load_config(RunFolder(cell.folder).config), cell.config)
        changed = {name: value for name, value in changed.items() if name not in ("output", "evaluation.base")}
        return [*program, "--resume", str(cell.folder), *(f"{name}={value}" for name, value in changed.items())]
    path = cell.root / "configs" / f"{cell.method}-seed-{cell.seed}.yaml"
    write(path, to_yaml(cell.config))
    return [*program, str(path)]


class _Process:
    """A command under way, with its own log."""

    def __init__(self, cell: Cell, words: list[str], environment: dict[str, str], lock: IO[str]) -> None:
        self.cell, self.stopped = cell, False
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        with cell.log.open("a", encoding="utf-8") as log:
            log.write(f"\n# {now()}  {shlex.join(words)}\n")
            log.flush()
            self.process = subprocess.Popen(
                words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, **environment}, start_new_session=True, pass_fds=_inherited(lock),
            )  # fmt: skip

    def stop(self) -> None:
        if not self.stopped:
            self.process.send_signal(signal.SIGTERM)
            self.stopped = True

    def finished(self) -> bool:
        return self.process.poll() is not None

    def result(self) -> State:
        """Where the cell stands now; failed if the command said so, whatever it wrote before."""
        found = _in_folder(self.cell)
        failed = self.process.returncode != 0 and not self.stopped and found.status in ("waiting", "stopped")
        return State("failed", found.iteration, found.seconds) if failed else found


def _reason(process: _Process, found: State) -> str:
    if found.status == "finished":
        return ""
    log = process.cell.log
    return f" after iteration {found.iteration} ({last_line(log)}); the log is {log}"


def last_line(log: Path) -> str:
    """What a command said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "nothing was logged")


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that the cells can save before they stop."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {n: signal.signal(n, lambda number, frame: event.set()) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _slots(count: int, workers: int | None, threads: int | None) -> list[dict[str, str]]:
    """The environment of each worker: its share of the cores, and its GPU where there are GPUs."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
    if workers is None:
        workers = len(gpus) or max(1, cores // (threads or 1))
    workers = max(1, min(workers, count))
    share = str(threads or max(1, cores // workers))
    environments: list[dict[str, str]] = []
    for n in range(workers):
        environment = {"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[n % len(gpus)]
        environments.append(environment)
    return environments


# ---- the base policy


def measure_base(grid: Grid, root: Path, say: Say = lambda text: None) -> Path:
    """Evaluate the base policy, once: BASE/iteration-000000.json, from which every cell starts.

    Raises:
        UserError: if the evaluation fails.
    """
    target = base_evaluation(root)
    while not target.is_file():
        with _locked(root / "locks" / "base.lock") as lock:
            if lock is not None and not target.is_file():
                _evaluate_base(grid, root, say, lock)
        time.sleep(0 if target.is_file() else POLL)  # someone else is at it
    return target


def _evaluate_base(grid: Grid, root: Path, say: Say, lock: IO[str]) -> None:
    config, target = base_config(grid, root), base_evaluation(root)
    draft, log = root / ".base.partial", root / "logs" / "base.log"
    shutil.rmtree(draft, ignore_errors=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    file = root / "configs" / "base.yaml"
    write(file, to_yaml(config))
    words = [sys.executable, "-m", "customized_grpo", "eval", "--trust-code", str(file), "--output", str(draft)]
    say("base: begins")
    with log.open("a", encoding="utf-8") as output:
        output.write(f"\n# {now()}  {shlex.join(words)}\n")
        output.flush()
        code = subprocess.run(
            words, stdout=output, stderr=subprocess.STDOUT, check=False, pass_fds=_inherited(lock)
        ).returncode
    if code != 0 or not (draft / target.name).is_file():
        raise UserError(f"The base policy could not be evaluated ({last_line(log)}); the log is {log}.")
    write(draft / "config.yaml", to_yaml(config))
    draft.rename(target.parent)
    say("base: finished")


# ---- other machines


def run_cells_on_ray(
    todo: Sequence[Cell], *, threads: int = 1, gpus: float = 0.0, say: Say = print
) -> dict[str, State]:
    """Hand the unfinished cells to Ray's scheduler, over a file system that all machines share.

    Args:
        todo: the cells.
        threads, gpus: what each cell asks Ray for.

    Raises:
        UserError: if Ray is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("Ray is not installed; pip install customized-grpo[ray], or leave --ray out.") from error
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"))
    options: Any = {"num_cpus": threads, "num_gpus": gpus}
    remote = ray.remote(**options)(_run_here)
    pending = {remote.remote(cell, threads): cell for cell in todo if state(cell).status != "finished"}
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1)
        cell = pending.pop(done[0])
        say(f"{cell.name}: {ray.get(done[0])}")
    return {cell.name: state(cell) for cell in todo}


def _run_here(cell: Cell, threads: int) -> str:
    """One cell where Ray put this call; Ray has set CUDA_VISIBLE_DEVICES."""
    said: list[str] = []
    run_cells([cell], workers=1, threads=threads, say=said.append)
    return said[-1].removeprefix(f"{cell.name}: ") if said else "finished"
