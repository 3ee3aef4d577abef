"""`cgrpo rewards check`."""

from functools import partial
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from customized_grpo.cli.terminal import TrustCode, new_console, quiet_libraries, split_settings
from customized_grpo.errors import printable

app = typer.Typer(help="Test the configured rewards before a run.", no_args_is_help=True)
console = new_console()


@app.callback()
def _rewards() -> None:
    """A group, because Typer drops the name of a single command without one."""


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
