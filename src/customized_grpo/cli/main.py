"""The command line: `cgrpo train`, `generate`, `export`, `eval`, `config`, `report`, `probe`, `compare`, `bench` ..."""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from customized_grpo._version import __version__
from customized_grpo.cli import data as cli_data
from customized_grpo.cli import rewards as cli_rewards
from customized_grpo.cli.bench import bench
from customized_grpo.cli.compare import compare
from customized_grpo.cli.terminal import (
    Checkpoint,
    PlainConsole,
    TrustCode,
    leave_at_once,
    new_console,
    quiet_libraries,
    show_trusted,
    split_settings,
)
from customized_grpo.errors import TrainingError, UserError, is_text
from customized_grpo.libraries import library_problem
from customized_grpo.settings.recipes import recipe_names
from customized_grpo.shell import command

app = typer.Typer(
    name="cgrpo",
    help="Reinforcement learning for subject-driven image generation with competing rewards.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
DEBUG = "--debug"
REFUSED = {
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOENT), "check the path"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space or choose another output"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check the permissions or choose another path"),
    errno.EROFS: "choose another path",
    errno.EEXIST: "choose another output",
}
"""Advice for errors of the operating system."""
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_rewards.app, name="rewards")
console = new_console()
errors = PlainConsole(stderr=True)

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG.yaml] [section.setting=value ...]", help="A file or recipe, and overrides."),
]
Run = Annotated[Path, typer.Option("--run", help="A run folder.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show tracebacks and warnings; may be given anywhere.")] = False,
) -> None:
    if version:
        console.print(__version__)
        raise typer.Exit


@app.command()
def train(
    settings: Settings = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Resume the run in this folder.")] = None,
    trust_code: TrustCode = False,
) -> None:
    """Train a model. Without arguments, train the embedded default: a tiny FLUX.1-Kontext on the toy world."""
    from customized_grpo import trust
    from customized_grpo.assemble import build_trainer, finished_iterations, resume_run
    from customized_grpo.cli.display import Display, show_result
    from customized_grpo.config import load_config
    from customized_grpo.settings.parse import to_yaml

    quiet_libraries()
    file, overrides = split_settings(settings)
    run = None
    if resume is not None:
        if file is not None:
            raise UserError("--resume reads the configuration from the run folder; remove the configuration file.")
        run, config = resume_run(resume, overrides, trust_code=trust_code)
        if done := finished_iterations(run, config):
            console.print(
                f"'{resume}' has finished its {done} iterations. To continue training, increase their number: "
                f"{command('train', '--resume', resume, f'training.iterations={2 * done}')}",
                soft_wrap=True,
            )
            return
    else:
        config = load_config(file, overrides)
        show_trusted(console, trust.items(config.specs()))
    trainer = build_trainer(config, new=resume is None)
    main = trainer.accelerator.is_main_process
    display = Display(console if main else Console(quiet=True))
    result = trainer.train(display, resume=run, config_yaml=to_yaml(config))
    if main:
        show_result(console, result, display.report)
    if result.interrupted:
        raise typer.Exit(130)


@app.command()
def generate(
    run: Run,
    reference: Annotated[Path | None, typer.Option(help="Image of the subject; default: a toy subject.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt of the images.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of images, each from its own noise.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed for noise and toy subject.")] = 0,
    checkpoint: Checkpoint = None,
    output: Annotated[Path | None, typer.Option(help="Image to write; default: a new PNG in RUN/generated.")] = None,
    trust_code: TrustCode = False,
) -> None:
    """Generate images of a subject with the base and the trained model, side by side, from the same noise."""
    from PIL import Image

    from customized_grpo.assemble import build_policy, find_checkpoint, load_trained, open_run
    from customized_grpo.check import check_named
    from customized_grpo.cli.generation import generate as draw
    from customized_grpo.cli.generation import new_file, reference_example, warn_of_toy_model
    from customized_grpo.distributed import refuse_several
    from customized_grpo.store import replacing

    quiet_libraries()
    refuse_several("generate")
    folder, config = open_run(run, trust_code=trust_code)
    target = new_file(folder.path / "generated", output)
    example = reference_example(reference, prompt, seed)
    find_checkpoint(folder, checkpoint)
    check_named(config)
    warn_of_toy_model(config.policy, example)
    policy = build_policy(config)
    sheet = draw(policy, example, lambda: load_trained(policy, folder, checkpoint), count, seed, config)
    with replacing(target, new=True) as draft:
        sheet.save(draft, Image.registered_extensions()[target.suffix.lower()])
    console.print(f'"{example.prompt}"\n{target}', soft_wrap=True)


@app.command()
def export(
    run: Run,
    output: Annotated[Path, typer.Option(help="New file to write, ending in .safetensors.")],
    checkpoint: Checkpoint = None,
    format: Annotated[
        Literal["diffusers", "kohya"], typer.Option(help="diffusers, or kohya for ComfyUI (FLUX only).")
    ] = "diffusers",
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload to this hub repository too.")] = None,
    trust_code: TrustCode = False,
) -> None:
    """Export the trained adapter of a run as a file, with a model card and a script that uses it exactly (use.py)."""
    from customized_grpo.assemble import find_checkpoint, open_run
    from customized_grpo.cli.export import export_checkpoint

    quiet_libraries()
    folder, config = open_run(run, trust_code=trust_code)
    export_checkpoint(console, folder, config, find_checkpoint(folder, checkpoint), output, format, push)


@app.command(name="eval")
def evaluate(
    settings: Settings = None,
    run: Annotated[Path | None, typer.Option("--run", help="A run folder; default: evaluate the base model.")] = None,
    checkpoint: Checkpoint = None,
    output: Annotated[Path | None, typer.Option(help="Folder for scores and images; default: only print.")] = None,
    trust_code: TrustCode = False,
) -> None:
    """Evaluate a model on held-out subjects: the base model, or a run and its base model."""
    from customized_grpo.assemble import open_policy
    from customized_grpo.cli.generation import evaluate_source
    from customized_grpo.distributed import refuse_several

    quiet_libraries()
    refuse_several("eval")
    file, overrides = split_settings(settings)
    evaluate_source(console, open_policy(file, overrides, run=run, iteration=checkpoint, trust_code=trust_code), output)


@app.command(epilog=f"Packaged recipes: {', '.join(recipe_names())}.")
def config(
    settings: Settings = None,
    check: Annotated[bool, typer.Option("--check", help="Only validate the configuration.")] = False,
    describe: Annotated[bool, typer.Option("--describe", help="Describe every setting.")] = False,
) -> None:
    """Print, validate or describe a configuration."""
    from customized_grpo.config import Config, load_config
    from customized_grpo.settings.parse import describe_settings, to_yaml

    file, overrides = split_settings(settings)
    resolved = load_config(file, overrides)
    if describe:
        typer.echo(describe_settings(Config))
    elif check:
        from customized_grpo.check import check_config

        quiet_libraries()
        unchecked = check_config(resolved, foreign=False).unchecked
        console.print(f"{file or 'The configuration'} is valid.")
        if unchecked:
            console.print(
                f"Not checked, because that would run code or download data: {', '.join(unchecked)}.", soft_wrap=True
            )
    else:
        typer.echo(to_yaml(resolved), nl=False)


@app.command()
def plan(
    settings: Settings = None,
    gpu: Annotated[str, typer.Option(help="4090, a6000, a100-80, h100-80, h200 ...")] = "h100-80",
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs; prompts are divided among them.")] = 1,
    price: Annotated[float | None, typer.Option(min=0, help="Price of one GPU for one hour.")] = None,
    share: Annotated[float, typer.Option(help="Share of the GPU's peak rate that a run reaches.")] = 0.4,
    references: Annotated[int, typer.Option(min=1, help="Number of reference images of each example.")] = 1,
    table: Annotated[bool, typer.Option("--table", help="Print a row of docs/hardware.md instead.")] = False,
) -> None:
    """Tell whether a run fits on a GPU, how long it takes and what it costs. Needs no weights, data, GPU or network."""
    from customized_grpo.cli.plan import markdown_row, show_plan
    from customized_grpo.config import load_config

    quiet_libraries()
    file, overrides = split_settings(settings)
    config = load_config(file, overrides)
    if table:
        typer.echo(markdown_row(f"`{file or 'default'}`", config, share))
    else:
        show_plan(console, config, gpu, gpus, price, share, references)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, a probe, a comparison or a benchmark.")],
) -> None:
    """Rebuild the report of a folder: report.html and report.md (of a probe, probe.html and probe.md)."""
    if (folder / "probe.json").is_file():
        from customized_grpo.studies.probe import write_report
    elif (folder / "compare.yaml").is_file():
        from customized_grpo.studies.compare.page import write_report
    elif (folder / "bench.json").is_file():
        from customized_grpo.studies.bench.report import write_report
    else:
        from customized_grpo.studies.report import write_report
    console.print(str(write_report(folder)), soft_wrap=True)


@app.command()
def probe(
    settings: Settings = None,
    run: Annotated[Path | None, typer.Option("--run", help="A run folder; default: probe the base model.")] = None,
    checkpoint: Checkpoint = None,
    examples: Annotated[int | None, typer.Option(help="Number of training examples; default: 24.")] = None,
    branches: Annotated[int | None, typer.Option(help="Branches per step; default: 8.")] = None,
    gradients: Annotated[bool | None, typer.Option(help="Whether to measure gradients; default: yes.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images sampled at once; default: 64.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write; default: a new one under probes/.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Resume the probe in this folder.")] = None,
    trust_code: TrustCode = False,
) -> None:
    """Measure at which denoising steps each reward is decided, and fit time weights."""
    from customized_grpo.cli.probe import new_probe, resume_probe

    quiet_libraries()
    given = {"examples": examples, "branches": branches, "gradients": gradients}
    given = {name: value for name, value in given.items() if value is not None}
    file, overrides = split_settings(settings)
    if resume is None:
        given |= {} if batch is None else {"batch": batch}
        new_probe(console, file, overrides, given, run=run, iteration=checkpoint, output=output, trust_code=trust_code)
    elif file or given or run or output or checkpoint is not None:
        raise UserError(
            "--resume reads everything but --batch and overrides from the folder; remove the other options."
        )
    else:
        resume_probe(console, resume, overrides, batch, trust_code=trust_code)


app.command()(compare)
app.command()(bench)


def program() -> None:
    """Run `main` and end the process: the entry point of `cgrpo` and `python -m customized_grpo`."""
    with leave_at_once():
        main()


def main(command: typer.Typer | None = None) -> None:
    """Run `command` (default: cgrpo); report an expected error in one sentence, with exit status 2."""
    debug = DEBUG in sys.argv[1:]
    sys.argv = [word for word in sys.argv if word != DEBUG]
    os.environ["CGRPO_DEBUG"] = "1" if debug else ""
    sys.path.append("")  # `use: mine:reward` finds mine.py in the folder one starts from, as `python -m` does
    try:
        _check_text(sys.argv[1:])
        (command or app)(standalone_mode=True)
    except (UserError, TrainingError) as error:
        if getattr(error, "shared", False) and os.environ.get("RANK", "0") != "0":
            sys.exit(2)  # the first process prints it
        _fail(str(error), debug, advice=error.advice)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        place = f"'{str(error.filename)[:100]}'" if error.filename else "a file"
        _fail(f"{os.strerror(error.errno)} for {place}; {REFUSED[error.errno]}.", debug)
    except (ImportError, AttributeError, RuntimeError) as error:
        if (problem := library_problem(error)) is None:
            raise
        _fail(str(problem), debug)
    except SystemExit as error:  # an interrupt too, by the time it comes through typer
        cause = getattr(error.__context__, "__cause__", None)
        if not isinstance(cause, KeyboardInterrupt):
            raise
        _fail(str(cause) or "Interrupted.", debug, status=130)


def _check_text(words: Sequence[str]) -> None:
    """Raise UserError for words that cannot be written to a file, such as file names in an older encoding."""
    odd = next((word for word in words if not is_text(word)), None)
    if odd is not None:
        raise UserError(f"'{odd[:100]}' is not UTF-8 text; rename the file, or type the word again.")


def _fail(sentence: str, debug: bool, status: int = 2, advice: str = "") -> None:
    if debug:
        raise
    errors.print("error:", style="bold red", end=" ")
    for text in (sentence, advice):
        if text:
            errors.print(" ".join(text.split()), soft_wrap=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
