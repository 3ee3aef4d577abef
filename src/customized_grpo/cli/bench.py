"""What `cgrpo bench` does: a protocol and a policy to pictures, scores and a report. The same command goes on."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from customized_grpo import trust
from customized_grpo.assemble import build_policy, load_trained, open_run
from customized_grpo.config import open_config
from customized_grpo.errors import UserError
from customized_grpo.policies.contract import Policy
from customized_grpo.policies.pipeline import default_device
from customized_grpo.settings import Role
from customized_grpo.settings.identity import declared_roles
from customized_grpo.settings.parse import load_settings
from customized_grpo.store.run import RunFolder
from customized_grpo.studies.bench.display import BenchDisplay, show_bench, show_protocols, show_rules
from customized_grpo.studies.bench.measure import (
    Progress,
    all_jobs,
    draw,
    measure_images,
    measure_oracle,
    save_references,
    undrawn,
)
from customized_grpo.studies.bench.plan import BenchSettings, Plan, make_plan, named, size_departures
from customized_grpo.studies.bench.record import Bench, BenchFolder, Job, read_bench, write_table
from customized_grpo.studies.bench.report import report
from customized_grpo.studies.bench.suites import Suite, open_suite
from customized_grpo.train import checkpoint
from customized_grpo.train.trackers import provenance


def bench_command(
    console: Console,
    words: Sequence[str],
    *,
    run: Path | None = None,
    iteration: int | None = None,
    config: Path | None = None,
    output: Path | None = None,
    against: Sequence[Path] = (),
    part: str | None = None,
    trust_code: bool = False,
) -> Bench | None:
    """Bench the base policy of a configuration, or a run's checkpoint.

    Args:
        words: a protocol's name or a YAML file of `BenchSettings`, and overrides; none lists the protocols.
        run, iteration: whose trained weights; None is the base policy.
        config: the configuration whose policy is measured, over that of the settings.
        output: the folder; None is benches/PROTOCOL-NAME. A bench in it goes on.
        against: finished benches of the same protocol to compare with.
        part: "2/8" for the second of eight processes; None takes a launcher's, or everything.
        trust_code: run whatever the run or the files name.

    Returns:
        The finished bench, or None if other processes still have work to do.

    Raises:
        UserError: if a setting is wrong, or something is missing.
    """
    if not words:
        show_protocols(console)
        return None
    file, overrides = split_words(words)
    settings = read_settings(words)
    if run is not None and (config is not None or settings.config is not None):
        raise UserError("Give a run or a configuration, not both; a run has its own.")
    if run is None and iteration is not None:
        raise UserError("--iteration names a checkpoint of a run; give --run too.")
    mine, parts = which_part(part)
    others = [read_bench(path) for path in against]
    if run is not None:
        folder_of_run, chosen = open_run(run, trust_code=trust_code)
    else:
        folder_of_run, chosen = None, open_config(config or settings.config, trust_code=trust_code)
    if file is not None:
        trust.require(
            file, trust.items(named(settings, chosen)), trust_code=trust_code,
            typed=[override.partition("=")[0] for override in overrides],
            written=lambda: trust.items(named(load_settings(BenchSettings, file), chosen)),
        )  # fmt: skip
    plan = make_plan(settings, chosen)
    suite = open_suite(plan.protocol, settings.data, settings.prompts)
    if settings.subjects is not None:
        suite.keep(settings.subjects)
    plan.departures.extend(size_departures(plan, suite))
    iteration = newest(folder_of_run, iteration) if folder_of_run else None
    name = folder_of_run.path.resolve().name if folder_of_run else (config or settings.config or Path("toyworld")).stem
    label = f"{name} base" if folder_of_run is None else f"{name} iteration {iteration}"
    folder = BenchFolder(output or Path("benches") / f"{plan.protocol.name}-{name}")
    identity = identify(plan, suite, folder_of_run, iteration)
    if mine == 0:
        show_rules(console, plan.protocol.name, plan.rules(suite), plan.departures)
    about = {
        "label": label, "about": plan.protocol.about, "source": plan.protocol.source, "rules": plan.rules(suite),
        "departures": plan.departures, "data": settings.data, "grid_rows": settings.grid_rows, **provenance(),
    }  # fmt: skip
    folder.claim(identity, about, suite.tasks)

    def build() -> Policy:
        policy = build_policy(plan.config)
        if folder_of_run is not None:
            load_trained(policy, folder_of_run, iteration)
        return policy

    launched = part is None and mine != 0  # one of many that share a terminal
    with BenchDisplay(Console(quiet=True) if launched else console) as progress:
        run_part(plan, suite, folder, build, mine, parts, progress)
    if not everything_done(plan, suite, folder):
        console.print(f"part {mine + 1} of {parts} is done; the last to finish writes the report", highlight=False)
        return None
    bench = read_bench(folder.path)
    show_bench(console, bench, write_table(bench), *report(bench, others))
    return bench


def read_settings(words: Sequence[str]) -> BenchSettings:
    """The settings among the words of a command line: a protocol or a YAML file first, overrides after it."""
    return load_settings(BenchSettings, *split_words(words))


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The YAML file among the words of a command line, if there is one, and the overrides; a protocol is one too."""
    first, *rest = sorted(words, key=lambda word: "=" in word)
    if "=" in first:
        return None, list(words)
    if len(rest) and "=" not in rest[0]:
        raise UserError(f"Give one protocol or YAML file, got '{first}' and '{rest[0]}'; overrides look like images=1.")
    if Path(first).suffix in (".yaml", ".yml"):
        return first, rest
    return None, [f"protocol={first}", *rest]


def which_part(part: str | None) -> tuple[int, int]:
    """This process's place among how many: as said, or as a launcher says in RANK and WORLD_SIZE.

    Raises:
        UserError: if it is no fraction such as 2/8.
    """
    if part is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part is '{part}'; the second of eight processes is --part 2/8.")
    return int(match[1]) - 1, int(match[2])


def newest(run: RunFolder, iteration: int | None) -> int:
    """The iteration of the run's newest checkpoint, unless one is named."""
    if iteration is not None:
        return iteration
    found = checkpoint.checkpoints(run.checkpoints)
    if not found:
        raise UserError(f"'{run.path}' has no finished checkpoint under {run.checkpoints}; train on, or name another.")
    return checkpoint.iteration_of(found[-1])


def identify(plan: Plan, suite: Suite, run: RunFolder | None, iteration: int | None) -> dict[str, Any]:
    """What makes two benches the same one: every setting that is kept, as the plan has it; weights and tasks."""
    planned = {
        **vars(plan.settings),
        "policy": plan.config.policy.model_dump(),
        "images": plan.images,
        "seed": plan.seed,
        "num_inference_steps": plan.num_inference_steps,
        "metrics": {name: {**asdict(m), "spec": m.spec.model_dump()} for name, m in plan.metrics.items()},
    }
    kept = {name: planned[name] for name, role in declared_roles(BenchSettings).items() if role is Role.KEPT}
    return {**kept, "run": str(run.path.resolve()) if run else None, "iteration": iteration, "tasks": len(suite.tasks)}


def run_part(
    plan: Plan,
    suite: Suite,
    folder: BenchFolder,
    build: Callable[[], Policy],
    part: int,
    parts: int,
    progress: Progress,
) -> None:
    """Do this process's share: what is on disk already is not done again."""
    if torch.cuda.is_available():
        torch.cuda.set_device(default_device())  # of metrics too, which take the current one
    if part == 0:
        save_references(suite, folder)
        measure_oracle(plan.metrics, suite, folder, progress)
    mine = share(plan, suite, part, parts)
    if undrawn(folder, mine):
        draw(
            build(), suite, mine, folder, seed=plan.seed, num_inference_steps=plan.num_inference_steps,
            batch=plan.settings.batch, progress=progress,
        )  # fmt: skip
    measure_images(plan.metrics, suite, mine, folder, part=part, batch=plan.settings.score_batch, progress=progress)


def share(plan: Plan, suite: Suite, part: int, parts: int) -> list[Job]:
    """This process's pictures: every so many tasks, whole."""
    mine = {task.id for task in suite.tasks[part::parts]}
    return [job for job in all_jobs(suite, plan.images) if job[0].id in mine]


def everything_done(plan: Plan, suite: Suite, folder: BenchFolder) -> bool:
    """Whether every picture has every score, whoever made it."""
    wanted = {(task.id, n) for task, n in all_jobs(suite, plan.images)}
    scored = all(wanted <= folder.score_lines(name).keys() for name in plan.metrics)
    return scored and all(folder.oracle_scores(name) is not None for name in plan.metrics)
