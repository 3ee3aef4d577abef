"""How fast, and is it as fast as it can be: `python -m customized_grpo.cli.speed` (or `make bench`) prints tables.

The yardstick is the transformer itself: its bare forward, and forward with backward, on the same batch. An iteration
that costs more than those passes times their number wastes the rest.
"""

import gc
import statistics
import tempfile
from collections.abc import Mapping, Sequence
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

STAGES = ("rollout", "decode", "rewards", "update", "other")


class Recorder(Observer):
    """Keeps every record and the resident memory after it."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, float]] = []
        self.memory: list[float] = []

    def on_iteration(self, record: Mapping[str, float]) -> None:
        self.records.append(record)
        self.memory.append(resident_gib())


def bare_passes(trainer: Trainer, rows: int, repetitions: int = 5) -> tuple[float, float]:
    """Median seconds of one bare transformer forward, and of one forward with backward, on `rows` rows."""
    pairs = [pass_seconds(trainer.policy, trainer.train_dataset[0], rows) for _ in range(repetitions)]
    return statistics.median(f for f, _ in pairs), statistics.median(b for _, b in pairs)


def measure(overrides: Sequence[str], iterations: int, folder: Path) -> tuple[Trainer, Recorder]:
    """Train without evaluation, and keep what each iteration took."""
    fixed = [
        f"training.iterations={iterations}", "evaluation.examples=0", "tracking.log_with=[]",
        f"checkpoint.every={iterations}", f"output={folder}",
    ]  # fmt: skip
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
    """Seconds by stage (median and range), the share of `other`, and the cost over the bare passes."""
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
    return table, other, statistics.median(totals) / bare


def main(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[section.setting=value ...]")] = None,
    iterations: Annotated[int, typer.Option(help="Timed iterations, after one of warm-up.")] = 5,
    memory: Annotated[int, typer.Option(help="Iterations of the memory check (small ones); 0 leaves it out.")] = 200,
) -> None:
    """Time the embedded default: 8 prompts x 8 generations x 10 steps, 5 of them trained."""
    from customized_grpo.cli.terminal import new_console, quiet_libraries

    quiet_libraries()
    console, overrides = new_console(), list(settings or [])
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
