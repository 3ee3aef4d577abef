"""The command `cgrpo bench`: from a protocol and a policy to images, scores and a report. Run it again to resume."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from customized_grpo import page, trust
from customized_grpo.assemble import PolicySource, open_policy
from customized_grpo.check import check_parts
from customized_grpo.cli.terminal import fraction, split_settings
from customized_grpo.settings.parse import load_settings
from customized_grpo.shell import command
from customized_grpo.studies.bench.measure import Share
from customized_grpo.studies.bench.plan import BenchSettings, make_plan, specs
from customized_grpo.studies.bench.protocols import PROTOCOLS
from customized_grpo.studies.bench.record import Bench, BenchFolder, read_bench, write_table
from customized_grpo.studies.bench.report import contents
from customized_grpo.studies.bench.suites import open_suite


def bench_command(
    console: Console, words: Sequence[str], *, run: Path | None = None, iteration: int | str | None = None,
    config: Path | None = None, output: Path | None = None, against: Sequence[Path] = (), part: str | None = None,
    trust_code: bool = False,
) -> Bench | None:  # fmt: skip
    """Bench the base policy of a configuration, or a run's checkpoint.

    Args:
        words: a protocol's name or a YAML file of `BenchSettings`, and overrides; none lists the protocols.
        run, iteration: the trained weights; None is the base policy.
        config: the configuration of the base policy, instead of that of the settings.
        output: the folder; None is benches/PROTOCOL-NAME. A bench in it is resumed.
        against: finished benches of the same protocol to compare with.
        part: "2/8" for the second of eight processes; None takes a launcher's, or everything.
        trust_code: run the code that the run or the files name.

    Returns:
        The finished bench, or None if other processes still have work to do.

    Raises:
        UserError: if a setting is wrong, or something is missing.
    """
    if not words:
        page.show_block(console, page.Facts(protocols()))
        return None
    file, overrides = split_words(words)
    settings, (mine, parts) = load_settings(BenchSettings, file, overrides), which_part(part)
    others = [read_bench(path) for path in against]
    source = open_policy(config or settings.config, run=run, iteration=iteration, trust_code=trust_code)
    if file is not None:
        trust.require_file(
            file, overrides, lambda some: specs(load_settings(BenchSettings, file, some), source.config),
            trust_code=trust_code,
        )  # fmt: skip
    plan = make_plan(settings, source.config)
    check_parts(plan.config.policy, "policy")
    for name, metric in plan.metrics.items():
        check_parts(metric.spec, "metric", f"metrics.{name}")
    suite = open_suite(plan.protocol, settings.data, settings.prompts, settings.subjects)
    rules, departures = plan.rules(suite), plan.departures(suite)
    name = source.run.path.resolve().name if source.run else (config or settings.config or Path("toyworld")).stem
    folder = BenchFolder(output or Path("benches") / f"{plan.protocol.name}-{name}")
    folder.join(plan.identity(source, suite), {
        "label": f"{name} iteration {source.iteration}" if source.run else f"{name} base",
        "about": plan.protocol.about, "source": plan.protocol.source, "rules": rules, "departures": departures,
        "data": settings.data, "grid_rows": settings.grid_rows,
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
        return None
    folder.end(against)
    bench = read_bench(folder.path)
    page.present(console, contents(bench, others), folder.path, scores=write_table(bench), images=folder.images)
    return bench


def protocols() -> list[tuple[str, str]]:
    """The protocols with their metrics, and how to use them."""
    found = []
    for protocol in PROTOCOLS.values():
        metrics = ", ".join(metric.title for metric in protocol.metrics.values())
        found.append((protocol.name, f"{protocol.about} Metrics: {metrics}."))
    usage = command("bench", "PROTOCOL", "data=FOLDER", "--config", "CONFIG.yaml")
    return [*found, ("usage", f"{usage}, or --run RUN")]


def read_settings(words: Sequence[str]) -> BenchSettings:
    """The settings among the words of a command line: a protocol or a YAML file, and overrides."""
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
