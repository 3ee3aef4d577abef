"""From rewards to advantages: which aggregation, which time weights, and what to say about the rewards."""

import inspect
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from customized_grpo.errors import TrainingError, UserError, nearest
from customized_grpo.functional.advantages import advantages, conflict_statistics, difficulty_weights, standardize
from customized_grpo.settings.build import bind
from customized_grpo.structures import Example
from customized_grpo.train.settings import MethodSettings


class Method:
    """The settings, bound to functions.

    Args:
        settings: names of the functions and their arguments.
        measured: names of the rewards, in column order.
        metrics: names of what else is measured, and may train too.

    Raises:
        UserError: if the settings name a reward that is not measured, or contradict each other.
    """

    def __init__(self, settings: MethodSettings, measured: Iterable[str], metrics: Iterable[str] = ()) -> None:
        self.settings, self.names = settings, settings.rewards or tuple(measured)
        """K names of the rewards that train, in column order."""
        check_rewards(self.names, {*measured, *metrics}, "method.rewards")
        for kind, factors in settings.kind_weights.items():
            check_factors(factors, self.names, f"method.kind_weights.{kind}")
        if settings.difficulty:
            check_rewards([settings.difficulty.reward], self.names, "method.difficulty.reward")
        self.advantage = bind(settings.advantage, "advantage", "method.advantage")
        self.time_weights = bind(settings.time_weights, "time_weights", "method.time_weights")
        self.credit = bind(settings.credit, "credit", "method.credit") if settings.credit else None
        self._check_credit()

    def weights(self, progress: Tensor, num_inference_steps: int, draw: torch.Generator) -> Tensor:
        """Shape (S, K), at the progress of the TRUE steps.

        Raises:
            UserError: if the schedule is for another number of rewards.
        """
        offered: dict[str, Any] = {"num_inference_steps": num_inference_steps, "generator": draw}
        parameters = inspect.signature(self.time_weights).parameters
        weights = self.time_weights(progress, **{name: offered[name] for name in offered if name in parameters})
        if weights.shape != (len(progress), len(self.names)):
            raise UserError(
                f"method.time_weights gives weights of shape {tuple(weights.shape)} for {len(progress)} steps and "
                f"{len(self.names)} rewards ({', '.join(self.names)}); use constant with one weight per reward."
            )
        return weights

    def factors(self, examples: Sequence[Example]) -> Tensor:
        """(P, K) by how much the weight of each reward differs for each example.

        Raises:
            UserError: if an example names a reward that does not train.
        """
        rows = []
        for example in examples:
            check_factors(example.weights, self.names, f"The weights of example '{example.id}'")
            own = {**self.settings.kind_weights.get(example.kind, {}), **example.weights}
            rows.append([own.get(name, 1.0) for name in self.names])
        return torch.tensor(rows)

    @property
    def wants_copies(self) -> bool:
        """Whether the aggregation asks what unedited copies of the reference score."""
        given = self.settings.advantage.arguments.get("zero")
        known = given if isinstance(given, Sequence) else [given]
        return "copies" in inspect.signature(self.advantage).parameters and None in known

    def advantages(
        self, rewards: Tensor, weights: Tensor, factors: Tensor | None = None, copies: Tensor | None = None
    ) -> Tensor:
        """Raw rewards of all processes to advantages (P, G, S).

        Args:
            rewards: shape (P, G, K), or (P, G, S, K) for each step.
            weights: shape (S, K).
            factors: shape (P, K), from `factors`; None is 1 everywhere.
            copies: shape (P, 1, K), what unedited copies of the reference score; needed if `wants_copies`.
        """
        if rewards.ndim == 4:  # each step is an image of its own, so that every aggregation takes it
            steps = zip(rewards.unbind(2), weights.split(1), strict=True)
            return torch.cat([self.advantages(some, row, factors) for some, row in steps], dim=2)
        if factors is not None and bool((factors != 1).any()):
            scaled = weights * factors.unsqueeze(1)
            weights = scaled * weights.sum(dim=-1, keepdim=True) / scaled.sum(dim=-1, keepdim=True)
        more, clamp = ({"copies": copies} if self.wants_copies else {}), self.settings.advantage_clamp
        try:
            found = advantages(self.advantage, rewards, weights.to(rewards), clamp, **more)
        except ValueError as error:
            raise UserError(f"method.advantage '{self.settings.advantage.use}': {error}") from error
        return (found * self._difficulty(rewards).to(found)[:, None, None]).clamp(-clamp, clamp)

    def _check_credit(self) -> None:
        """Raise UserError for what cannot be computed from the gains between steps."""
        credit, advantage = self.settings.credit, self.settings.advantage
        if credit is None or credit.use == "final":
            return
        if self.wants_copies:
            raise UserError(
                f"method.credit '{credit.use}' gives gains, and method.advantage '{advantage.use}' would compare them "
                "with the rewards of unedited copies; give its zero, or set method.credit to final."
            )
        if self.settings.difficulty:
            raise UserError(
                f"method.credit '{credit.use}' gives gains, and method.difficulty weighs groups by the rewards of "
                "final images; remove one of the two."
            )

    def _difficulty(self, rewards: Tensor) -> Tensor:
        """(P,) weights of the groups."""
        if self.settings.difficulty is None:
            return torch.ones(len(rewards))
        arguments = self.settings.difficulty.model_dump()
        column = rewards[..., self.names.index(arguments.pop("reward"))]
        return difficulty_weights(column, **arguments)

    def credited(self, rewards: Mapping[int, Tensor], steps: Tensor) -> Tensor:
        """What each trained step is credited with, (P, G, S, K).

        Args:
            rewards: by step those of the images predicted there, (P, G, K); the last are those of the final images.
            steps: (S,) the trained ones.

        Raises:
            UserError: if `method.credit` gives another shape.
        """
        assert self.credit is not None, "no other objective predicts images"
        before, after = (torch.stack([rewards[i + n] for i in steps.tolist()], dim=2) for n in (0, 1))
        found = self.credit(before, after, rewards[max(rewards)])
        if found.shape != after.shape:
            raise UserError(
                f"method.credit gives shape {tuple(found.shape)}, expected (P, G, S, K) = {tuple(after.shape)}; return "
                f"one value for each image, trained step and reward."
            )
        return found


def check_rewards(names: Iterable[str], known: Collection[str], where: str) -> None:
    """Raise UserError for a name that is not the name of a reward."""
    for name in names:
        if name not in known:
            raise UserError(f"{where}: there is no reward '{name}'.{nearest(name, known)} Known: {', '.join(known)}.")


def check_factors(factors: Mapping[str, float], names: Collection[str], where: str) -> None:
    """Raise UserError unless the factors are of rewards that train, not negative, and leave one that counts."""
    check_rewards(factors, names, where)
    if any(value < 0 for value in factors.values()) or not any(factors.get(name, 1) for name in names):
        raise UserError(f"{where}: expected factors that are not negative and not all 0, got {dict(factors)}.")


def describe_rewards(rewards: Tensor, names: Sequence[str]) -> dict[str, float]:
    """What metrics.jsonl says about raw rewards (P, G, K): mean, spread within groups, unscored, conflict.

    Each number is over the images that the reward scored; a group with fewer than two of them has no spread.
    """
    record: dict[str, float] = {}
    scored = rewards.isfinite()
    for k, name in enumerate(names):
        column = rewards[..., k].double()
        spread = (column - column.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
        record[f"reward/{name}/mean"] = float(column.nanmean())
        record[f"reward/{name}/spread"] = float(spread[scored[..., k].sum(1) > 1].nanmean())
        record[f"reward/{name}/unscored"] = int((~scored[..., k]).sum())
    if len(names) > 1:
        conflict = conflict_statistics(standardize(rewards), scored)
        record |= {f"conflict/{'share' if k == 'conflict' else k}": float(v) for k, v in conflict._asdict().items()}
    return record


def describe_advantages(everyone: Tensor, rewards: Tensor, clamp: float) -> dict[str, float]:
    """Spread of the advantages (P, G, S), and the share that the clamp holds, of images that any reward scored."""
    counted = everyone[rewards.isfinite().any(dim=-1)]
    return {
        "advantage/std": float(counted.std()) if counted.numel() > 1 else math.nan,
        "advantage/clamped": float((counted.abs() >= clamp).float().mean()),
    }


class SpreadGuard:
    """Stops a run with a reward that teaches nothing: at once in the first iteration, later after three in a row."""

    PATIENCE = 3

    def __init__(self) -> None:
        self.streak: dict[str, int] = {}
        """Iterations in a row, of each reward that taught nothing in the last one."""

    def check(self, rewards: Tensor, names: Sequence[str], iteration: int) -> None:
        """rewards: (P, G, K).

        Raises:
            TrainingError: naming each reward that could not score, or is the same for all pictures of every group.
        """
        taught = (standardize(rewards) != 0).flatten(0, 1).any(dim=0).tolist()
        self.streak = {name: self.streak.get(name, 0) + 1 for name, some in zip(names, taught, strict=True) if not some}
        faults: list[str] = []
        for name, length in self.streak.items():
            if iteration == 1 or length >= self.PATIENCE:
                column = rewards[..., names.index(name)]
                unscored, count = int((~column.isfinite()).sum()), column.numel()
                fault = f"is the same for all pictures of every group in iteration {iteration}"
                if unscored == count:
                    fault = f"could not score any picture in iteration {iteration}"
                faults.append(f"'{name}' {fault} ({unscored} of {count} pictures unscored)")
        if faults:
            raise TrainingError(
                f"The reward {' and the reward '.join(faults)}, which teaches nothing; "
                f"check the reward, raise the noise level of the rollout, or remove it."
            )
