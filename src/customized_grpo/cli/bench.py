"""The command `cgrpo bench`: from a protocol and a policy to images, scores and a report. Run it again to resume."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from customized_grpo.cli.terminal import (
    Checkpoint,
    TrustCode,
    fraction,
    new_console,
    quiet_libraries,
    split_settings,
)
from customized_grpo.settings.parse import load_settings
from customized_grpo.shell import command

if TYPE_CHECKING:
    from customized_grpo.studies.bench.plan import BenchSettings

console = new_console()


def bench(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROTOCOL | BENCH.yaml] [data=FOLDER ...]", help="Default: list the protocols."),
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", help="A run folder; default: measure the base model.")] = None,
    checkpoint: Checkpoint = None,
    config: Annotated[Path | None, typer.Option(help="Configuration of the base model, if there is no run.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write; default: benches/PROTOCOL-NAME.")] = None,
    against: Annotated[list[Path] | None, typer.Option(help="A finished benchmark to compare with.")] = None,
    part: Annotated[str | None, typer.Option(help="2/8: run the second of eight parts of the tasks.")] = None,
    trust_code: TrustCode = False,
) -> None:
    """Evaluate a model on a published benchmark, and compare results. Re-run to resume."""
    from customized_grpo import page, trust
    from customized_grpo.assemble import PolicySource, open_policy
    from customized_grpo.check import check_parts
    from customized_grpo.studies.bench.measure import Share
    from customized_grpo.studies.bench.plan import BenchSettings, make_plan, specs
    from customized_grpo.studies.bench.record import BenchFolder, read_bench, write_table
    from customized_grpo.studies.bench.report import contents
    from customized_grpo.studies.bench.suites import open_suite

    quiet_libraries()
    if not settings:
        page.show_block(console, page.Facts(protocols()))
        return
    file, overrides = split_words(settings)
    given, (mine, parts) = load_settings(BenchSettings, file, overrides), which_part(part)
    others = [read_bench(path) for path in against or []]
    source = open_policy(config or given.config, run=run, iteration=checkpoint, trust_code=trust_code)
    if file is not None:
        trust.require_file(
            file, overrides, lambda some: specs(load_settings(BenchSettings, file, some), source.config),
            trust_code=trust_code,
        )  # fmt: skip
    plan = make_plan(given, source.config)
    check_parts(plan.config.policy, "policy")
    for name, metric in plan.metrics.items():
        check_parts(metric.spec, "metric", f"metrics.{name}")
    suite = open_suite(plan.protocol, given.data, given.prompts, given.subjects)
    rules, departures = plan.rules(suite), plan.departures(suite)
    name = source.run.path.resolve().name if source.run else (config or given.config or Path("toyworld")).stem
    folder = BenchFolder(output or Path("benches") / f"{plan.protocol.name}-{name}")
    folder.join(plan.identity(source, suite), {
        "label": f"{name} iteration {source.iteration}" if source.run else f"{name} base",
        "about": plan.protocol.about, "source": plan.protocol.source, "rules": rules, "departures": departures,
        "data": given.data, "grid_rows": given.grid_rows,
    })  # fmt: skip
    if mine == 0:
        departed = page.Remarks([page.Remark(f"departs: {text}") for text in departures])
        for block in (page.Text(f"{plan.protocol.name}:"), page.Bullets(rules), departed):
            page.show_block(console, block)
    launched = part is None and mine != 0  # one of many that share a terminal
    with page.Progress(Console(quiet=True) if launched else console) as progress:
        share = Share(plan, suite, folder, progress, mine, parts)
        share.measure(PolicySource(plan.config, source.run, source.iteration).build)
    if not share.is_complete():
        done = f"part {mine + 1} of {parts} is done; the last to finish writes the report"
        page.show_block(console, page.Text(done))
        return
    folder.end(against or [])
    found = read_bench(folder.path)
    page.present(console, contents(found, others), folder.path, scores=write_table(found), images=folder.images)


def protocols() -> list[tuple[str, str]]:
    """The protocols with their metrics, and how to use them."""
    from customized_grpo.studies.bench.protocols import PROTOCOLS

    found = []
    for protocol in PROTOCOLS.values():
        metrics = ", ".join(metric.title for metric in protocol.metrics.values())
        found.append((protocol.name, f"{protocol.about} Metrics: {metrics}."))
    usage = command("bench", "PROTOCOL", "data=FOLDER", "--config", "CONFIG.yaml")
    return [*found, ("usage", f"{usage}, or --run RUN")]


def read_settings(words: Sequence[str]) -> "BenchSettings":
    """The settings among the words of a command line: a protocol or a YAML file, and overrides."""
    from customized_grpo.studies.bench.plan import BenchSettings

    return load_settings(BenchSettings, *split_words(words))


def split_words(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The YAML file, if there is one, and the overrides; a protocol's name becomes one."""
    first, overrides = split_settings(list(words), "protocol or YAML file")
    if first is None or first.suffix in (".yaml", ".yml") or len(first.parts) > 1:
        return first, overrides
    return None, [f"protocol={first}", *overrides]


def which_part(part: str | None) -> tuple[int, int]:
    """This process's place among how many, from `--part` or from a launcher's RANK and WORLD_SIZE.

    Raises:
        UserError: if it is no fraction such as 2/8.
    """
    given = fraction(part, "--part")
    if given is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return given[0] - 1, given[1]
