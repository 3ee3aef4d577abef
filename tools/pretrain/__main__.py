"""Pretrain the models of the toy world: python -m tools.pretrain [CONFIG.yaml] [setting=value ...]"""

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from customized_grpo.cli.display import duration
from customized_grpo.cli.main import main
from customized_grpo.cli.terminal import new_console, quiet_libraries, split_settings
from customized_grpo.settings.parse import describe_settings, load_settings
from customized_grpo.toyworld import WEIGHTS_VARIABLE
from tools.pretrain import PretrainSettings, pretrain
from tools.pretrain import Progress as TrainingProgress

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [setting=value ...]", help="A file and overrides.")
    ] = None,
    describe: Annotated[bool, typer.Option("--describe", help="Explain every setting.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")] = False,
) -> None:
    """Pretrain the toy world's autoencoder, CLIP, DINO, oracle and generator. Re-run to resume."""
    quiet_libraries()
    file, overrides = split_settings(settings)
    chosen: PretrainSettings = load_settings(PretrainSettings, file, overrides)
    if describe:
        typer.echo(describe_settings(PretrainSettings))
        return
    console = new_console()
    with Display(console) as display:
        report = pretrain(chosen, display)
    console.print(
        f"report    {report}\nuse it    export {WEIGHTS_VARIABLE}={chosen.output.resolve()}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


class Display:
    """A progress bar per component with its loss and remaining time. Without a terminal: ten lines per component."""

    def __init__(self, console: Console) -> None:
        self.console, self.tasks, self.tenths = console, dict[str, TaskID](), dict[str, int]()
        self.progress = Progress(
            TextColumn("{task.description:<12}"), BarColumn(bar_width=30), TextColumn("{task.fields[numbers]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def __call__(self, state: TrainingProgress) -> None:
        numbers = f"step {state.step}  loss {state.loss:.4f}  {duration(state.eta_seconds)} left"
        if state.component not in self.tasks:
            self.tasks[state.component] = self.progress.add_task(state.component, total=1.0, numbers=numbers)
        self.progress.update(self.tasks[state.component], completed=state.share, numbers=numbers)
        tenth = int(state.share * 10)
        if not self.console.is_terminal and tenth > self.tenths.get(state.component, -1):
            self.tenths[state.component] = tenth
            self.console.print(f"{state.component:<12} {state.share:4.0%}  {numbers}", highlight=False)


if __name__ == "__main__":
    main(app)
