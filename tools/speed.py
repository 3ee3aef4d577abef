"""How fast an iteration is. `make bench` prints its seconds by stage, `make speed` compares it with an earlier commit.

The yardstick of `make bench` is the transformer itself: its bare forward, and forward with backward, on the same batch.
An iteration that costs more than those passes times their number wastes the rest. `make speed` runs both sides at the
same time, each in its own process, one iteration of one and then of the other, and compares CPU seconds: the load of
the machine changes them little.
"""

import gc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from customized_grpo.assemble import build_trainer
from customized_grpo.config import load_config
from customized_grpo.errors import UserError
from customized_grpo.train.preflight import pass_seconds
from customized_grpo.train.trainer import Observer, Trainer
from tools.one_side import unobserved

STAGES = ("rollout", "decode", "rewards", "update", "other")
ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = Path("src/customized_grpo/toyworld/weights")


# ---- one commit, by stage


class Recorder(Observer):
    """Keeps every record, the CPU seconds since the one before, and the resident memory after it."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, float]] = []
        self.memory: list[float] = []
        self.cpu, self.begun = list[float](), time.process_time()

    def on_iteration(self, record: Mapping[str, float]) -> None:
        self.records.append(record)
        self.cpu.append(time.process_time() - self.begun)
        self.memory.append(resident_gib())
        self.begun = time.process_time()


def bare_passes(trainer: Trainer, rows: int, repetitions: int = 5) -> tuple[float, float]:
    """Median seconds of one bare transformer forward, and of one forward with backward, on `rows` rows.

    On a CPU they are CPU seconds.
    """
    clock = time.process_time if trainer.policy.device.type == "cpu" else time.perf_counter
    pairs = [pass_seconds(trainer.policy, trainer.train_dataset[0], rows, clock) for _ in range(repetitions)]
    return statistics.median(f for f, _ in pairs), statistics.median(b for _, b in pairs)


def measure(overrides: Sequence[str], iterations: int, folder: Path) -> tuple[Trainer, Recorder]:
    """Train without evaluation, and keep what each iteration took."""
    fixed = unobserved(iterations, folder)
    trainer, recorder = build_trainer(load_config(None, [*fixed, *overrides])), Recorder()
    trainer.train(recorder)
    return trainer, recorder


def resident_gib() -> float:
    """Resident memory of this process now; on a GPU, allocated memory."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**30
    gc.collect()
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 / 2**30 if status.exists() else float("nan")


def stage_table(trainer: Trainer, recorder: Recorder, warmup: int = 1) -> tuple[Table, float, float]:
    """Seconds by stage (median and range), the share of `other`, and the cost over the bare passes.

    On a CPU the cost is that in CPU seconds.
    """
    records = recorder.records[warmup:]
    totals = [sum(r[f"seconds/{stage}"] for stage in STAGES) for r in records]
    table = Table(title=f"Seconds per iteration, median of {len(records)} (min to max)", title_justify="left")
    for column in ("stage", "seconds", "range", "share"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in STAGES:
        values = [r[f"seconds/{stage}"] for r in records]
        middle = statistics.median(values)
        span = f"{min(values):.2f} to {max(values):.2f}"
        table.add_row(stage, f"{middle:.2f}", span, f"{middle / statistics.median(totals):.1%}")
    table.add_row("all", f"{statistics.median(totals):.2f}", f"{min(totals):.2f} to {max(totals):.2f}", "")
    config = trainer.config
    rows = config.training.prompts_per_iteration * config.rollout.num_generations
    forward, backward = bare_passes(trainer, rows)
    job = trainer.job()
    trained = job.trained * config.training.inner_epochs
    passes = config.rollout.num_inference_steps + job.objective.extra_passes(job.trained)
    bare = passes * forward + trained * backward
    table.add_row("bare passes", f"{bare:.2f}", f"{passes} x {forward:.3f}", "")
    table.add_row("", "", f"+ {trained} x {backward:.3f}", "")
    other = statistics.median(r["seconds/other"] for r in records) / statistics.median(totals)
    spent = recorder.cpu[warmup:] if trainer.policy.device.type == "cpu" else totals
    return table, other, statistics.median(spent) / bare


# ---- two sides, in turn


class Side:
    """A process that trains with the package of a checkout."""

    def __init__(self, checkout: Path, settings: Sequence[str], folder: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("one_side.py")), str(folder), *settings]
        environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        package = self._answer()
        if not Path(package).is_relative_to(checkout):
            raise UserError(f"The package of {package} was imported, not that of {checkout}; use an editable install.")

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise UserError("One side ended before its measurement; its error is above.")
        return answer

    def iteration(self) -> float:
        """CPU seconds of one more iteration."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it ended; `_answer` says so
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return float(self._answer())


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A worktree of a commit with the weights of this one, removed at the end."""
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve() / "baseline"
        made = subprocess.run([*git, "worktree", "add", "--detach", place, commit], capture_output=True, text=True)
        if made.returncode:
            raise UserError(f"git made no worktree of '{commit}': {made.stderr.strip()}; give a commit that it has.")
        try:
            shutil.copytree(ROOT / WEIGHTS, place / WEIGHTS, dirs_exist_ok=True)
            yield place
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", place], check=True)


def in_turn(sides: Sequence[Side], pairs: int) -> list[tuple[float, float]]:
    """CPU seconds of an iteration of both sides. Every second pair begins with the second side."""
    found = []
    for pair in range(pairs):
        order = sides if pair % 2 == 0 else sides[::-1]
        seconds = {side: side.iteration() for side in order}
        found.append((seconds[sides[0]], seconds[sides[1]]))
    return found


def verdict(pairs: Sequence[tuple[float, float]]) -> str:
    """Medians of both sides, and of their ratio."""
    ratios, (first, second) = [a / b for a, b in pairs], map(statistics.median, zip(*pairs, strict=True))
    return (
        f"CPU seconds of an iteration: {first:.2f}, of the other side {second:.2f}; ratio "
        f"{statistics.median(ratios):.3f}, median of {len(ratios)} pairs ({min(ratios):.3f} to {max(ratios):.3f})"
    )


def compare(commit: str | None, settings: Sequence[str], against: Sequence[str], pairs: int) -> str:
    """The verdict on this commit against a commit, or against other settings."""
    with checkout(commit) if commit else nullcontext(ROOT) as baseline, tempfile.TemporaryDirectory() as folder:
        sides = []
        try:
            sides.append(Side(ROOT, settings, Path(folder) / "ours"))
            sides.append(Side(baseline, [*settings, *against], Path(folder) / "baseline"))
            return verdict(in_turn(sides, pairs))
        finally:
            for side in sides:
                side.process.kill()
                side.process.communicate()


def main(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[section.setting=value ...]")] = None,
    iterations: Annotated[int, typer.Option(help="Timed iterations, after one of warm-up.")] = 5,
    memory: Annotated[int, typer.Option(help="Iterations of the memory check (small ones); 0 leaves it out.")] = 200,
    baseline: Annotated[str | None, typer.Option(help="Compare CPU seconds with those of this commit.")] = None,
    against: Annotated[list[str] | None, typer.Option(help="A setting of the other side; may be repeated.")] = None,
) -> None:
    """Time the embedded default: 8 prompts x 8 generations x 10 steps, 5 of them trained."""
    from customized_grpo.cli.terminal import new_console, quiet_libraries

    quiet_libraries()
    console, overrides = new_console(), list(settings or [])
    if baseline or against:
        console.print(compare(baseline, overrides, against or [], iterations))
        return
    with tempfile.TemporaryDirectory() as folder:
        trainer, recorder = measure(overrides, iterations + 1, Path(folder) / "speed")
        table, other, ratio = stage_table(trainer, recorder)
        console.print(f"{trainer.policy.name}, {trainer.policy.dtype}, {torch.get_num_threads()} threads")
        console.print(table)
        console.print(f"other: {other:.1%} of an iteration (aim: at most 5 %)")
        console.print(f"iteration / bare passes: {ratio:.2f} (aim: at most 1.10)")
        if memory:
            small = ["training.prompts_per_iteration=2", "rollout.num_generations=2", "rollout.num_inference_steps=3"]
            # Two groups of two often agree in a reward to the last digit; what is measured here is memory.
            _, recorder = measure([*overrides, *small], memory, Path(folder) / "memory")
            warm = recorder.memory[len(recorder.memory) // 10]
            console.print(
                f"memory: {warm:.3f} GiB after {len(recorder.memory) // 10} iterations, "
                f"{recorder.memory[-1]:.3f} after {memory} ({recorder.memory[-1] / warm - 1:+.1%}; aim: within 2 %)"
            )


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
