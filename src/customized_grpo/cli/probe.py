"""What `cgrpo probe` does: a configuration, or a run, or a probe that was stopped, to findings on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from customized_grpo.assemble import build_policy, build_rewards, load_trained, open_run
from customized_grpo.config import Config, load_config, open_config
from customized_grpo.data import load_datasets
from customized_grpo.errors import UserError
from customized_grpo.settings.build import bind
from customized_grpo.settings.identity import result_differences, result_settings
from customized_grpo.settings.parse import parse_config, to_yaml
from customized_grpo.store.run import RunFolder
from customized_grpo.studies.probe.display import Progress, show_findings
from customized_grpo.studies.probe.findings import Findings
from customized_grpo.studies.probe.measure import Probe, ProbeSettings, choose
from customized_grpo.studies.probe.record import ProbeFolder
from customized_grpo.studies.probe.run import run_probe
from customized_grpo.train.trackers import provenance


def new_probe(
    console: Console,
    file: Path | None,
    overrides: Sequence[str],
    settings: Mapping[str, Any],
    *,
    run: Path | None = None,
    iteration: int | None = None,
    output: Path | None = None,
    trust_code: bool = False,
) -> Findings:
    """Probe the base policy of a configuration, or a run's checkpoint.

    Args:
        settings: of `ProbeSettings`; the seed is the configuration's unless given.
        output: a folder that is free; None makes one under probes/.
    """
    if run is not None and file is not None:
        raise UserError("Give --run or a configuration file, not both; overrides may follow --run.")
    if run is None and iteration is not None:
        raise UserError("--iteration names a checkpoint of a run; give --run too.")
    if output is not None:
        ProbeFolder(output).check_free()
    if run is not None:
        _, config = open_run(run, overrides, trust_code=trust_code)
    else:
        config = open_config(file, overrides, trust_code=trust_code)
    chosen = parse_config({"seed": config.seed, **settings}, ProbeSettings)
    probe, checkpoint = build_probe(config, chosen, {"run": str(run), "iteration": iteration} if run else None)
    folder = ProbeFolder.create(output)
    with folder.lock():
        folder.check_free()  # again: another process may have been here before the lock
        folder.write(folder.config.name, to_yaml(config))
        folder.describe(**provenance(), settings=result_settings(chosen), batch=chosen.batch, checkpoint=checkpoint)
        return _go(console, probe, folder)


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
    info = folder.described()
    if not folder.config.is_file() or "settings" not in info:
        raise UserError(f"'{path}' was stopped before its configuration was written; remove it and start again.")
    sizes = {} if (size := batch or info.get("batch")) is None else {"batch": size}  # older probes do not tell
    chosen = parse_config({**info["settings"], **sizes}, ProbeSettings)
    folder.check_idle()
    config = open_config(folder.config, overrides, trust_code=trust_code)
    if changed := result_differences(load_config(folder.config), config):
        raise UserError(
            f"The probe in '{path}' has another {next(iter(changed))}, which changes the result; leave that override "
            f"out, or start a new probe."
        )
    probe, _ = build_probe(config, chosen, info.get("checkpoint"))
    with folder.lock():
        folder.write(folder.config.name, to_yaml(config))
        folder.describe(batch=chosen.batch)
        return _go(console, probe, folder)


def build_probe(
    config: Config, settings: ProbeSettings, checkpoint: Mapping[str, Any] | None
) -> tuple[Probe, dict[str, Any] | None]:
    """The probe of a configuration, and the run and iteration whose weights it measures. Cheap parts first."""
    examples = choose(load_datasets(config.data)[0], settings)
    rewards, dynamics = build_rewards(config.rewards), bind(config.rollout.dynamics, "dynamics")
    policy, loaded = build_policy(config), None
    if checkpoint is not None:
        folder = RunFolder.existing(checkpoint["run"])
        loaded = {"run": checkpoint["run"], "iteration": load_trained(policy, folder, checkpoint["iteration"])}
    return Probe(policy, rewards, examples, settings, dynamics, config.rollout.num_inference_steps), loaded


def _go(console: Console, probe: Probe, folder: ProbeFolder) -> Findings:
    progress = Progress(console, len(probe.steps) + 1, len(folder.finished()))
    found = run_probe(probe, folder, on_finished=progress)
    show_findings(console, found, folder.path)
    return found
