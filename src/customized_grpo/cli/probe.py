"""The command `cgrpo probe`: measure, conclude and report in a folder, which can be resumed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from customized_grpo.assemble import PolicySource, build_rewards, open_policy
from customized_grpo.check import check_named
from customized_grpo.config import load_config, open_config
from customized_grpo.data import load_datasets
from customized_grpo.distributed import refuse_several
from customized_grpo.errors import UserError
from customized_grpo.settings.build import bind
from customized_grpo.settings.identity import result_differences
from customized_grpo.settings.parse import parse_config, read_tree, to_yaml
from customized_grpo.store.run import RunFolder
from customized_grpo.studies.probe.findings import Findings
from customized_grpo.studies.probe.measure import Probe, ProbeSettings, choose
from customized_grpo.studies.probe.record import ProbeFolder
from customized_grpo.studies.probe.run import run_probe
from customized_grpo.train.settings import FLOW_SDE


def new_probe(
    console: Console, file: Path | None, overrides: Sequence[str], settings: Mapping[str, Any], *,
    run: Path | None = None, iteration: int | str | None = None, output: Path | None = None, trust_code: bool = False,
) -> Findings:  # fmt: skip
    """Probe the base policy of a configuration, or a run's checkpoint.

    Args:
        settings: fields of `ProbeSettings`; the default seed is that of the configuration.
        output: an empty folder; None creates one under probes/.
    """
    if output is not None:
        ProbeFolder(output).check_free()
    refuse_several("probe")
    source = open_policy(file, overrides, run=run, iteration=iteration, trust_code=trust_code)
    probe = build_probe(source, parse_config({"seed": source.config.seed, **settings}, ProbeSettings))
    checkpoint = {"run": str(run), "iteration": source.iteration} if run else None
    return run_probe(probe, ProbeFolder.create(output), to_yaml(source.config), console, checkpoint=checkpoint)


def resume_probe(
    console: Console, path: Path, overrides: Sequence[str] = (), batch: int | None = None, *, trust_code: bool = False
) -> Findings:
    """Resume the probe in a folder: finished steps are read, the others measured.

    Args:
        overrides: settings of the configuration that do not change the result.
        batch: images sampled at once; None is that of the probe.

    Raises:
        UserError: if an override changes the result.
    """
    folder = ProbeFolder.existing(path)
    info = folder.read_facts(settings=dict)
    if not folder.config.is_file():
        raise UserError(f"'{path}' was stopped before its configuration was written; remove it and start again.")
    read_tree(folder.config, stored=True)
    folder.check_idle()
    config = open_config(folder.config, overrides, trust_code=trust_code)
    if changed := result_differences(load_config(folder.config), config):
        raise UserError(
            f"The probe in '{path}' has another {next(iter(changed))}, which changes the result; leave that override "
            f"out, or start a new probe."
        )
    size = batch or info.get("batch")  # which earlier versions do not note
    settings = parse_config({**info["settings"], **({"batch": size} if size else {})}, ProbeSettings)
    checkpoint = info.get("checkpoint") or {}
    run = RunFolder.existing(checkpoint["run"]) if checkpoint else None
    check_named(config)
    probe = build_probe(PolicySource(config, run, checkpoint.get("iteration")), settings)
    return run_probe(probe, folder, to_yaml(config), console)


def build_probe(source: PolicySource, settings: ProbeSettings) -> Probe:
    """The probe of a policy, on the training data of its configuration. Cheap parts first."""
    config = source.config
    examples = choose(load_datasets(config.data)[0], settings)
    rewards, dynamics = build_rewards(config.rewards), bind(config.rollout.dynamics or FLOW_SDE, "dynamics")
    return Probe(source.build(), rewards, examples, settings, dynamics, config.rollout.num_inference_steps)
