"""Build the objects that a configuration names: policy, rewards, datasets, trainer."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from customized_grpo.check import check_config, check_named
from customized_grpo.config import Config, load_config, open_config
from customized_grpo.data import load_datasets
from customized_grpo.errors import UserError
from customized_grpo.plan.fits import check_fits
from customized_grpo.policies.contract import Policy
from customized_grpo.rewards.contract import contained
from customized_grpo.rewards.scoring import RewardFunction
from customized_grpo.settings import Spec
from customized_grpo.settings.build import construct
from customized_grpo.settings.identity import changes_on_resume
from customized_grpo.settings.parse import read_tree
from customized_grpo.store.run import RunFolder
from customized_grpo.structures import Example
from customized_grpo.train import checkpoint
from customized_grpo.train.trainer import Trainer


def build_policy(config: Config) -> Policy:
    """The policy a configuration names, with an untrained adapter."""
    policy = construct(config.policy, "policy", seed=config.seed)
    if not isinstance(policy, Policy):
        raise UserError(f"policy: {config.policy.use} gives a {type(policy).__name__}, which is not a Policy.")
    return policy


def build_rewards(specs: dict[str, Spec], slot: str = "reward") -> dict[str, RewardFunction]:
    """Rewards (or metrics) by name, in the order of the configuration."""
    return {name: build_reward(spec, slot) for name, spec in specs.items()}


def build_reward(spec: Spec, slot: str = "reward") -> Any:
    """The reward (or metric) that a spec names. Importing and constructing it is contained, like its calls."""
    with contained(f"{slot}: {spec.use}"):
        return construct(spec, slot)


@contextmanager
def loaded_reward(spec: Spec, slot: str = "reward") -> Iterator[Any]:
    """A reward that is in memory only inside the block, so that a large judge can use the whole machine."""
    reward = build_reward(spec, slot)
    try:
        yield reward
    finally:
        if callable(close := getattr(reward, "close", None)):
            close()
        del reward
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def build_trainer(config: Config, *, new: bool = False) -> Trainer:
    """The trainer of a run. Settings are checked first, so that a wrong one fails before a large model is loaded.

    Args:
        config: the configuration of the run.
        new: whether a new run begins, whose folder has to be empty.
    """
    train, held_out, _ = check_config(config, new=new)
    assert train is not None, "with third-party code everything is read"
    check_fits(config, train[0])
    rewards = build_rewards(config.rewards)
    metrics = build_rewards(config.metrics, "metric")
    return Trainer(build_policy(config), rewards, train, held_out, config, metrics)


def open_run(path: str | Path, overrides: Sequence[str] = (), *, trust_code: bool = False) -> tuple[RunFolder, Config]:
    """A run folder and its configuration, with overrides on top.

    Args:
        trust_code: run the code that the folder names. It is not needed for folders of this user's own training.

    Raises:
        UserError: if the folder names code, programs or addresses that this user does not trust, or the overrides name
            another family of models, whose layers may have the same names and shapes.
    """
    run = RunFolder.existing(path)
    read_tree(run.config, stored=True)
    trained = load_config(run.config) if overrides else None
    if trained and (chosen := [word for word in overrides if word.startswith(("objective=", "objective.use="))]):
        asked = load_config(None, chosen).objective.use
        if trained.objective.use != asked:  # reported first, because the meaning of other settings depends on it
            raise UserError(
                f"The run in '{run.path}' was trained with the objective {trained.objective.use}, and its checkpoints "
                f"are not for {asked}; leave objective out, or start a new run in another output."
            )
    config = open_config(run.config, [*overrides, f"output={os.fspath(run.path)}"], trust_code=trust_code)
    if trained and trained.policy.use != config.policy.use:
        raise UserError(
            f"The run in '{run.path}' trained a {trained.policy.use}, and its weights are not for a "
            f"{config.policy.use}; leave policy.use out."
        )
    return run, config


def resume_run(
    path: str | Path, overrides: Sequence[str] = (), *, trust_code: bool = False
) -> tuple[RunFolder, Config]:
    """A run folder to resume, and its configuration with overrides on top.

    Raises:
        UserError: if they change a setting that a resumed run keeps, or another process is training it.
    """
    run, config = open_run(path, overrides, trust_code=trust_code)
    run.check_idle()
    if found := checkpoint.checkpoints(run.checkpoints):
        changes_on_resume(found[-1], config)
    return run, config


def finished_iterations(run: RunFolder, config: Config) -> int | None:
    """How many iterations a run has finished if all are finished, else None."""
    found = checkpoint.checkpoints(run.checkpoints)
    done = checkpoint.iteration_of(found[-1]) if found else 0
    return done if run.facts().get("status") == "finished" and done >= config.training.iterations else None


def find_checkpoint(run: RunFolder, iteration: int | str | None = None) -> Path:
    """A checkpoint of a run: "last" (and None), "best" by held-out worst-reward gain, or that of an iteration.

    Raises:
        UserError: if there is none, or it is named in another way.
    """
    found, which = checkpoint.checkpoints(run.checkpoints), "no finished checkpoint"
    if iteration == "best":
        best, which = run.best(map(checkpoint.iteration_of, found)), "no checkpoint that was evaluated"
        found = [path for path in found if best and checkpoint.iteration_of(path) == best[0]]
    elif iteration not in (None, "last"):
        if not str(iteration).isdecimal():
            raise UserError(f"--checkpoint is '{iteration}'; give best, last, or the number of an iteration.")
        found = [path for path in found if checkpoint.iteration_of(path) == int(iteration)]
        which = f"no checkpoint of iteration {iteration}"
    if not found:
        raise UserError(f"'{run.path}' has {which} under {run.checkpoints}; train on, or name another run.")
    return found[-1]


def load_trained(policy: Policy, run: RunFolder, iteration: int | str | None = None) -> int:
    """Load the weights of a checkpoint (see `find_checkpoint`) into a policy: the averaged ones if there are any.

    Returns:
        The iteration of the checkpoint.

    Raises:
        UserError: if there is no such checkpoint, or it is of another model.
    """
    state = checkpoint.load(find_checkpoint(run, iteration))
    policy.load_trainable_state(state.ema if state.ema is not None else state.trainable)
    return state.iteration


@dataclass(frozen=True)
class PolicySource:
    """The policy that a command measures: the base policy of a configuration, or a run's checkpoint."""

    config: Config
    run: RunFolder | None = None
    iteration: int | None = None
    """The iteration of the checkpoint."""

    def build(self) -> Policy:
        """The policy with its weights."""
        policy = build_policy(self.config)
        if self.run is not None:
            load_trained(policy, self.run, self.iteration)
        return policy


def open_policy(
    file: Path | None,
    overrides: Sequence[str] = (),
    *,
    run: Path | None = None,
    iteration: int | str | None = None,
    trust_code: bool = False,
) -> PolicySource:
    """The policy of a configuration file, or of a checkpoint of a run, as `find_checkpoint` finds it.

    Raises:
        UserError: if both are given, there is no such checkpoint, or as `open_run` and `open_config`.
    """
    if run is None and iteration is not None:
        raise UserError("--checkpoint names a checkpoint of a run; give --run too.")
    if run is None:
        config = open_config(file, overrides, trust_code=trust_code)
        check_named(config)
        return PolicySource(config)
    if file is not None:
        raise UserError("Got both --run and a configuration file; give one of them. Overrides may follow --run.")
    folder, config = open_run(run, overrides, trust_code=trust_code)
    check_named(config)
    return PolicySource(config, folder, checkpoint.iteration_of(find_checkpoint(folder, iteration)))


def held_out_examples(config: Config) -> list[Example]:
    """The examples that evaluation uses."""
    train, held_out = load_datasets(config.data)
    source = held_out if held_out is not None else train
    return [source[i] for i in range(min(config.evaluation.examples, len(source)))]
