"""What an objective decides about an iteration: `Objective`. The trainer and the update do the rest."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from customized_grpo.errors import TrainingError, UserError
from customized_grpo.functional.forward import norm_ratio
from customized_grpo.functional.schedule import StepPlan
from customized_grpo.policies.contract import Policy
from customized_grpo.settings import Settings
from customized_grpo.settings.build import resolve
from customized_grpo.settings.parse import parse_config
from customized_grpo.structures import Conditioning, Rollout
from customized_grpo.train.meters import Meter
from customized_grpo.train.rollout import RowNoise
from customized_grpo.train.settings import TrainerConfig

Stage = Callable[[str], AbstractContextManager[None]]
"""Times a named stage."""
REPEATABLE = "switch dropout off, and see that two equal calls of the policy's velocity give equal results"


class Plan(NamedTuple):
    """Where one iteration trains. Equal on all processes."""

    progress: Tensor
    """(S,) at which advantages are wanted: 0 at noise, 1 at the image."""
    steps: StepPlan | None = None
    """Sampled steps that are stochastic and trained; None where none is."""


class MicroBatch(NamedTuple):
    """Some rows of one rollout at one of the S trained places: what one forward and backward pass sees."""

    rollout: Any
    """The objective's own subclass of `Rollout`."""
    rows: slice
    column: int
    """Which of the S."""
    advantage: Tensor
    """(rows,)"""
    share: float
    """Of the optimizer step that it belongs to."""
    first: bool
    """Whether the policy is still the one before the update: no optimizer step came since."""


class Objective(ABC):
    """Between the trainer, which draws prompts and scores images, and the update, which owns the optimizer.

    An iteration calls `plan`, `collect` inside `sampling`, `advantages`, `prepare`, `loss` for every micro-batch,
    `check_first` after those of the first optimizer step, and `after_iteration`, in this order.

    Args:
        settings: an instance of SETTINGS.
        policy: the one in training.
        config: of the run, resolved.
    """

    SETTINGS: ClassVar[type[Settings]] = Settings
    """Its arguments in the configuration."""

    def __init__(self, settings: Any, policy: Policy, config: TrainerConfig) -> None:
        self.settings, self.policy, self.config = settings, policy, config
        if config.method.needs_base:
            policy.keep_base()
        self.iteration = 0
        """The one in progress."""

    def check(self) -> None:  # noqa: B027
        """Raise UserError, before the run, for what cannot work."""

    @abstractmethod
    def plan(self, iteration: int) -> Plan:
        """Where to train, a function of (seed, iteration)."""

    def sampling(self) -> AbstractContextManager[None]:
        """Inside it the policy has the weights that sample; by default those in training."""
        return nullcontext()

    @abstractmethod
    def collect(self, conditioning: Conditioning, plan: Plan, noise: RowNoise, stage: Stage) -> Rollout:
        """Sample G images for each of P rows of conditioning, without gradient. Row b belongs to prompt b // G."""

    def advantages(self, everyone: Tensor, scored: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The advantages to train on, and what to log about them.

        Args:
            everyone: (P, G, S), of all processes.
            scored: bool (P, G), whether any reward could score the image.
        """
        return everyone, {}

    def prepare(self, rollouts: Sequence[Any], first: Collection[int]) -> Sequence[Any]:
        """Before the first optimizer step: complete the rollouts with what the old policy says, without gradient.

        Args:
            rollouts: the chunks of this process.
            first: the columns of the first optimizer step. In its micro-batches `loss` sees the policy before the
                update, so what that says about them need not be computed here.
        """
        return rollouts

    @abstractmethod
    def loss(self, batch: MicroBatch, meter: Meter) -> Tensor:
        """The mean over the rows of a micro-batch, with gradient. Logs into `meter`, weighted by `batch.share`.

        Raises:
            TrainingError: from a guard.
        """

    def after_iteration(self, updates: int) -> None:  # noqa: B027
        """After the last optimizer step of an iteration, of `updates` in the whole run."""

    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint holds besides the trained weights, their average and the optimizer; {} for nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Inverse of `state`, after the trained weights were restored."""

    # ---- for the estimates of time and memory

    def kept(self, count: int) -> int:
        """Latents kept for each row of a rollout, of `count` trained places."""
        return 0

    def copies(self) -> int:
        """Copies of the trained weights that it keeps on the policy's device."""
        return 0

    def predicted(self, count: int) -> int:
        """Images kept for each row besides the final one until they are scored, of `count` trained places."""
        return 0

    def extra_passes(self, count: int) -> int:
        """Forward passes without gradient for each row, of `count` trained places, besides those that train."""
        return 0

    # ---- for subclasses

    def size(self, rollout: Rollout) -> int:
        """Rows in one pass of the update."""
        return self.config.training.micro_batch or len(rollout)

    def norm_hinge(self, velocity: Tensor, base: Tensor | None, batch: MicroBatch, meter: Meter) -> Tensor | float:
        """The term of the loss, 0 without `method.norm_hinge`. Logs |v| / |v_base|, or |v| without a base; the update
        divides the latter by that of the first iteration."""
        if base is None:
            norm, hinge = velocity.detach().float().square().mean(dim=(1, 2)).sqrt(), 0.0
        else:
            norm = norm_ratio(velocity, base)
            hinge = self.config.method.norm_hinge * (norm - 1).clamp(min=0).mean()
        meter.mean("update/velocity_norm", norm.mean(), batch.share)
        return hinge

    def check_first(self, meter: Meter) -> None:
        """Before the first optimizer step the policy is the one that sampled, so the ratio must be 1: rounding may
        move it by a tenth of the clip range at most, or the clip would act on noise.

        Raises:
            TrainingError: if `loss` has logged another update/first_ratio_error.
        """
        clip_range = self.config.method.clip_range
        tolerance = min(self.rounding(), (clip_range or 1.0) / 10)
        for drift in map(float, meter.compared.get("update/first_ratio_error", ())):
            if drift <= tolerance:
                continue
            clip = f" with method.clip_range={clip_range:g}" if clip_range else ""
            advice = ""
            if self.config.training.old_log_probs == "rollout":
                advice = "set training.old_log_probs=recompute; if that does not help, "
            raise TrainingError(
                f"The first ratio of iteration {self.iteration} is off 1 by {drift:.1e} (allowed {tolerance:.0e} in "
                f"{str(self.policy.dtype).removeprefix('torch.')}{clip}): sampling and training compute different "
                f"log-probs; {advice}{REPEATABLE}."
            )

    def rounding(self) -> float:
        """What equal weights may differ by in two passes of the policy."""
        return 1e-5 if self.policy.dtype == torch.float32 else 1e-3


def make_objective(policy: Policy, config: TrainerConfig) -> Objective:
    """The objective that a configuration names.

    Raises:
        UserError: if it is no Objective, or does not take an argument.
    """
    spec = config.objective
    kind = resolve(spec.use, "objective")
    if not (inspect.isclass(kind) and issubclass(kind, Objective)):
        raise UserError(f"objective: {spec.use} is not derived from customized_grpo.train.objectives.Objective.")
    return kind(parse_config(spec.arguments, kind.SETTINGS, "objective"), policy, config)
