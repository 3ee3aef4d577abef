"""`cgrpo rewards check` and `cgrpo rewards install`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from customized_grpo.cli.terminal import TrustCode, new_console, quiet_libraries, split_settings
from customized_grpo.errors import printable

app = typer.Typer(
    help="Test rewards before a run, and install those that need their own environment.", no_args_is_help=True
)
console = new_console()


@app.command()
def check(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [section.setting=value ...]")] = None,
    count: Annotated[int, typer.Option(min=2, help="Number of images to score.")] = 4,
    trust_code: TrustCode = False,
) -> None:
    """Score a few images with each reward and metric, and print values, seconds, device and memory."""
    from customized_grpo.assemble import build_reward
    from customized_grpo.check import check_named
    from customized_grpo.config import open_config
    from customized_grpo.data import load_datasets
    from customized_grpo.rewards.check import check_rewards

    quiet_libraries()
    config = open_config(*split_settings(settings), trust_code=trust_code)
    check_named(config)
    train, _ = load_datasets(config.data)
    specs = [(name, spec, "reward") for name, spec in config.rewards.items()]
    specs += [(name, spec, "metric") for name, spec in config.metrics.items()]
    makers = {name: partial(build_reward, spec, slot) for name, spec, slot in specs}
    trials = check_rewards(makers, [train[i] for i in range(min(count, len(train)))])
    table = Table(title="Scores of reference images with their own prompts", title_justify="left")
    for column in ("reward", "class", "scores", "s / image", "device", "memory (MiB)", "contract"):
        table.add_column(column, overflow="fold")
    for trial, (_, spec, _) in zip(trials, specs, strict=True):
        scores = " ".join(f"{float(score):.3f}" for score in trial.scores)
        memory = "-" if trial.memory is None else f"{trial.memory:.0f}"
        verdict = Text(printable(trial.violation or "passed"), "red" if trial.violation else "green")
        seconds = f"{trial.seconds_per_image:.4f}"
        names = (text for text in (trial.name, spec.use.split(":")[-1]))
        table.add_row(*names, scores, seconds, trial.device, memory, verdict)
    console.print(table)
    if any(trial.violation for trial in trials):
        raise typer.Exit(1)


@app.command()
def install(
    name: Annotated[str, typer.Argument(help="hpsv3, editreward, editscore, unifiedreward-edit or paco-reward.")],
    folder: Annotated[Path | None, typer.Option(help="Where to; default: ~/envs/NAME.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
) -> None:
    """Make the environment of a reward: pinned packages, and how to use it. Weights are not downloaded."""
    import shlex

    from customized_grpo.rewards.environments import commands, environment_named
    from customized_grpo.rewards.environments import install as make

    environment = environment_named(name)
    place = (folder or Path("~/envs") / name).expanduser().absolute()
    console.print(f"licence: {environment.licence}; read the licence of the weights on their pages", soft_wrap=True)
    console.print(f"weights, downloaded when first used: {environment.weights}", soft_wrap=True)
    console.print(f"GPU memory: {environment.memory} (computed, not measured)", soft_wrap=True)
    for command in commands(environment, place):
        console.print(shlex.join(command), soft_wrap=True)
    if dry_run:
        return
    make(environment, place)
    console.print(f"ready in {place}. To use it:", soft_wrap=True)
    console.print(environment.use.format(folder=place), soft_wrap=True)
