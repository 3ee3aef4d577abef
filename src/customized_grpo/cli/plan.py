"""The command `cgrpo plan`: print what a run needs as tables."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from customized_grpo.config import Config
from customized_grpo.plan.estimate import Choice, Planner, check_share
from customized_grpo.plan.hardware import Gpu, find_gpu


def show_plan(
    console: Console, config: Config, name: str, gpus: int, price: float | None, share: float, references: int
) -> None:
    """Print parameters, memory, operations, seconds and the verdict for one kind of GPU."""
    gpu = find_gpu(name)
    check_share(share)
    planner = Planner(config, gpus, references)
    given, sizes = planner.given, planner.first.sizes
    console.print(
        f"Parameters: transformer {_billions(sizes.transformer)}, of them trained {_billions(sizes.trained)}; text "
        f"encoders {_billions(sizes.encoders)}; VAE {_billions(sizes.vae)}.",
        soft_wrap=True,
    )
    console.print(_memory_table(planner, given))
    console.print(_time_table(planner, given, gpu, share))
    for line in (*_cost(planner, given, gpu, share, price), *_verdict(planner, given, name, gpu, share)):
        console.print(line, soft_wrap=True)


SIZES = ("4090", "a6000", "h100-80", "h200")
"""GPUs of 24, 48, 80 and 141 GB."""


def markdown_row(name: str, config: Config, share: float) -> str:
    """A row of docs/hardware.md: on each GPU, and on eight of them, the fastest setting that fits."""
    one = Planner(config)
    cells = []
    for planner in (one, one.among(8)):
        for gpu in map(find_gpu, SIZES):
            best = planner.fastest(gpu, share)
            cells.append("no" if best is None else _cell(planner, best, gpu, share))
    return f"| {name} | {' | '.join(cells)} |"


def _cell(planner: Planner, best: Choice, gpu: Gpu, share: float) -> str:
    settings = [
        f"micro-batch {best.micro_batch}", "checkpointing" * best.checkpointing, "offload" * (best.offload == "cpu"),
        best.quantize * (best.quantize != "none"),
    ]  # fmt: skip
    seconds = sum(planner.seconds(best, gpu, share).values())
    return f"{_gib(planner.memory(best).peak)} GiB, {seconds:,.0f} s: {', '.join(filter(None, settings))}"


def _memory_table(planner: Planner, choice: Choice) -> Table:
    memory = planner.memory(choice)
    table = Table("stage", "GiB", "parts", title="Memory of one GPU, counted", title_justify="left")
    table.add_row("always", _gib(sum(memory.resident.values())), _parts(memory.resident))
    for stage, parts in memory.stages.items():
        table.add_row(stage, _gib(memory.of(stage)), _parts(parts))
    return table


def _time_table(planner: Planner, choice: Choice, gpu: Gpu, share: float) -> Table:
    title = f"One iteration at {share:.0%} of the peak rate"
    table = Table("stage", "TFLOP", "seconds", title=title, title_justify="left")
    operations, seconds = planner.operations(choice), planner.seconds(choice, gpu, share)
    for stage, found in seconds.items():
        table.add_row(stage, f"{sum(operations.get(stage, {}).values()) / 1e12:,.0f}", f"{found:,.1f}")
    total = sum(sum(counts.values()) for counts in operations.values())
    table.add_row("all", f"{total / 1e12:,.0f}", f"{sum(seconds.values()):,.1f}")
    return table


def _cost(planner: Planner, choice: Choice, gpu: Gpu, share: float, price: float | None) -> list[str]:
    hours, length = planner.hours(choice, gpu, share), planner.config.training.iterations
    cost = "" if price is None else f", {hours * planner.gpus * price:,.0f} at {price:g} for each GPU and hour"
    lines = [f"The run: {length} iterations and its evaluations in {hours:,.1f} hours{cost}."]
    if left_out := planner.left_out(choice):
        lines.append(f"Not counted: {', '.join(left_out)}.")
    return lines


def _verdict(planner: Planner, choice: Choice, name: str, gpu: Gpu, share: float) -> list[str]:
    memory = planner.memory(choice)
    fits = memory.peak <= gpu.usable
    lines = [
        f"{'Fits' if fits else 'Does not fit'}: at most {_gib(memory.peak)} GiB, in the stage {memory.fullest}, of the "
        f"{_gib(gpu.usable)} GiB that {name} has for tensors."
    ]
    if not fits:
        lines.append(f"Lower first: {planner.advice(choice, gpu)}.")
    best = planner.fastest(gpu, share)
    if best is None:
        return [*lines, "No micro-batch, offloading, checkpointing or quantisation makes it fit."]
    settings, seconds = best.settings(choice), sum(planner.seconds(best, gpu, share).values())
    peak = _gib(planner.memory(best).peak)
    return [*lines, f"Fastest that fits: {settings or 'as it is'} ({peak} GiB, {seconds:,.1f} seconds an iteration)."]


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:,.0f} million"
