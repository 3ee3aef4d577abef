"""The checks of `cgrpo config --check` and `cgrpo train`, before any weights are loaded."""

import inspect
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from customized_grpo import trust
from customized_grpo.config import Config, check_names
from customized_grpo.data import HubDataset, load_datasets
from customized_grpo.errors import UserError
from customized_grpo.policies.pipeline import default_device
from customized_grpo.settings import Spec
from customized_grpo.settings.build import arguments, exported, naming
from customized_grpo.sources import check_location
from customized_grpo.store.run import RunFolder
from customized_grpo.structures import Example
from customized_grpo.train.evaluation import reuse
from customized_grpo.train.method import Method
from customized_grpo.train.objectives import make_objective
from customized_grpo.train.preflight import check_plan, check_sizes
from customized_grpo.train.trackers import check_trackers
from customized_grpo.train.update import try_optimizer


class Checked(NamedTuple):
    """A configuration that can be run, as far as this is known without loading weights."""

    train: Sequence[Example] | None
    """The training data; None if it was not read."""
    held_out: Sequence[Example] | None
    """The held-out examples; None if there are none, or they were not read."""
    unchecked: list[str]
    """The settings that were not checked, such as `rewards.sharp.use = mine:sharpness`."""


Data = tuple[Sequence[Example], Sequence[Example] | None]
"""Training and held-out examples."""


def check_config(config: Config, *, foreign: bool = True, new: bool = True, data: Data | None = None) -> Checked:
    """Check everything about a run that needs no weights, and read its data.

    Args:
        config: the configuration of the run.
        foreign: also run third-party code and download data. Otherwise those parts are not checked.
        new: whether a new run begins, whose folder has to be empty.
        data: the data that the configuration names, if it was read already.

    Raises:
        UserError: for the first thing that is wrong.
    """
    if new and config.output is not None:
        RunFolder(config.output).check_idle()
        RunFolder(config.output).check_free()
    unchecked = check_named(config, foreign=foreign)
    check_trackers(config.tracking)
    _check_functions(config, foreign)
    remote = [] if foreign else [f"data.{name}.path" for name, spec in _sources(config) if _is_remote(spec)]
    unchecked += remote
    if remote or any(name.startswith("data.") for name in unchecked):
        train = held_out = None
    else:
        train, held_out = data or load_datasets(config.data)
    check_sizes(config, 1 if train is None else len(train), int(os.environ.get("WORLD_SIZE", "1")))
    if new and held_out:
        _check_base(config, held_out)
    return Checked(train, held_out, unchecked)


def check_named(config: Config, *, foreign: bool = True) -> list[str]:
    """Check every function and class that a configuration names, with its arguments. Returns `Checked.unchecked`.

    Raises:
        UserError: for the first one that does not exist or cannot be constructed.
    """
    if not config.rewards:
        raise UserError("No reward is given; name at least one under rewards.")
    if twice := sorted(config.rewards.keys() & config.metrics.keys()):
        raise UserError(f"'{twice[0]}' is a reward and a metric, and their scores would mix; rename one of them.")
    unchecked = check_names(config, foreign=foreign)
    for triple in config.specs():
        for setting, slot, spec in trust.walk(*triple):
            check_parts(spec, slot, setting)
    return unchecked


def check_parts(spec: Spec, slot: str, where: str = "") -> None:
    """Check that an object of this package can be constructed: its folders exist, its device has a known name, and the
    `check_arguments` of its class, if there is one, raises nothing. Nothing is loaded.

    Args:
        spec, slot, where: as in `check_spec`, which has to be called first.

    Raises:
        UserError: if it cannot be constructed.
    """
    where, target = where or slot, exported(spec.use, slot)
    if not inspect.isclass(target):
        return
    values = arguments(target, spec)
    for name, location in getattr(target, "LOCATIONS", {}).items():
        if values.get(name) is not None:
            with naming(f"{where}.{name}"):
                check_location(values[name], location, values.get(location.revision))
    if isinstance(values.get("device"), str):
        check_device(values["device"], f"{where}.device")
    if hasattr(target, "check_arguments"):
        with naming(where):
            target.check_arguments(**values)  # pyright: ignore[reportAttributeAccessIssue]


def check_device(name: str, where: str) -> None:
    """Raise UserError unless the text names a device. The device need not exist."""
    try:
        torch.device(name)
    except RuntimeError:
        raise UserError(f"{where} is '{name}'; expected a device such as cpu, cuda or cuda:1.") from None


def _check_functions(config: Config, foreign: bool) -> None:
    """Compute once what the settings name: the objective's plan, time weights, advantages, an optimizer step."""

    def runs(*slots: str) -> bool:
        named = [(spec, slot) for _, slot, spec in config.specs() if slot in slots]
        return foreign or all(exported(spec.use, slot) is not None for spec, slot in named)

    if runs("objective", "dynamics", "steps", "credit"):
        scale = config.policy.arguments.get("true_cfg_scale") or 1.0
        policy: Any = SimpleNamespace(  # nothing is loaded yet
            trainable_state=dict, keep_base=bool, step_distilled=False, true_cfg_scale=scale
        )
        objective = make_objective(policy, config)
        objective.check()
        if runs("time_weights", "advantage"):
            check_plan(objective, Method(config.method, config.rewards, config.metrics))
    if runs("optimizer"):
        try_optimizer(config.training.optimizer, torch.zeros(2, 2, device=default_device()))


def _sources(config: Config) -> list[tuple[str, Spec]]:
    named = {"train": config.data.train, "eval": config.data.eval}
    return [(name, spec) for name, spec in named.items() if isinstance(spec, Spec)]


def _is_remote(spec: Spec) -> bool:
    """Whether a data set would be downloaded."""
    return exported(spec.use, "dataset") is HubDataset and not os.path.exists(str(spec.arguments.get("path")))  # noqa: PTH110


def _check_base(config: Config, held_out: Sequence[Example]) -> None:
    """Read the evaluation of the base policy that the run reuses."""
    settings = config.evaluation
    if settings.base is not None:
        examples = [held_out[n] for n in range(min(settings.examples, len(held_out)))]
        reuse(settings.base, examples, [*config.rewards, *config.metrics], settings.replicates)
