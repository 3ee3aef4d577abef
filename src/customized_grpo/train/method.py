"""From rewards to advantages: which aggregation, which time weights, and what to say about the rewards."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from customized_grpo.errors import TrainingError, UserError
from customized_grpo.functional.advantages import advantages, conflict_statistics, standardize
from customized_grpo.settings.build import bind
from customized_grpo.train.settings import MethodSettings


class Method:
    """The settings, bound to functions.

    Args:
        settings: names of the functions and their arguments.
        names: K rewards in column order.
    """

    def __init__(self, settings: MethodSettings, names: Sequence[str]) -> None:
        self.settings, self.names = settings, tuple(names)
        self.advantage = bind(settings.advantage, "advantage", "method.advantage")
        self.time_weights = bind(settings.time_weights, "time_weights", "method.time_weights")
        self.credit = bind(settings.credit, "credit", "method.credit") if settings.credit else None

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

    def advantages(self, rewards: Tensor, weights: Tensor) -> Tensor:
        """Raw rewards of all processes, (P, G, K) or (P, G, S, K) for each step, and (S, K) to (P, G, S)."""
        if rewards.ndim == 4:  # each step is an image of its own, so that every aggregation takes it
            steps = zip(rewards.unbind(2), weights.split(1), strict=True)
            return torch.cat([self.advantages(some, row) for some, row in steps], dim=2)
        try:
            return advantages(self.advantage, rewards, weights.to(rewards), self.settings.advantage_clamp)
        except ValueError as error:
            raise UserError(f"method.advantage '{self.settings.advantage.use}': {error}") from error

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
