"""The update: trained steps of a rollout to optimizer steps, with the guards against training nothing."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

from customized_grpo.build import construct
from customized_grpo.checkpoint import TrainingState
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.functional import sde
from customized_grpo.functional.surrogate import clipped_surrogate, gaussian_kl, normalized_log_ratio
from customized_grpo.meters import Meter
from customized_grpo.method import MethodSettings
from customized_grpo.policies.contract import Policy, rows
from customized_grpo.randomness import generator
from customized_grpo.rollout import Dynamics, complete_dynamics
from customized_grpo.settings import Settings, Spec
from customized_grpo.types import Rollout


class TrainingSettings(Settings):
    """The update and its length."""

    iterations: int = Field(default=40, ge=1)
    """Rollouts followed by their updates."""
    prompts_per_iteration: int = Field(default=8, ge=1)
    """Over all processes, which must divide it."""
    optimizer: Spec = Spec(use="AdamW", lr=1.5e-4, betas=[0.9, 0.99], weight_decay=0.0)  # pyright: ignore[reportCallIssue]
    """From torch.optim, or package.module:name."""
    lr_schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """By name as in diffusers' `get_scheduler`."""
    warmup_updates: int = Field(default=0, ge=0)
    """Optimizer steps of warm-up."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    inner_epochs: int = Field(default=1, ge=1)
    """Passes over each rollout."""
    updates_per_epoch: int = Field(default=2, ge=1)
    """Optimizer steps in one pass; the trained steps are shared out among them."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Rows in one forward pass; None takes a whole chunk, which reproduces the rollout's numbers exactly."""
    old_log_probs: Literal["rollout", "recompute"] = "rollout"
    """Where the ratio's denominator comes from. `recompute` runs a pass in the update's own batches first: for bfloat16
    with a micro-batch other than the rollout's, where rounding alone would move the ratio past the clip range."""
    ema_decay: float = Field(default=0.9, ge=0, lt=1)
    """Average of the trained weights per optimizer step, used in evaluation and in the saved adapter; 0 is none."""


class MicroBatch(NamedTuple):
    """Some rows of one rollout at one trained step: what one forward and backward pass sees."""

    rollout: Rollout
    rows: slice
    column: int
    """Which of the S trained steps."""
    old_log_prob: Tensor
    advantage: Tensor
    share: float
    """Of the optimizer step that it belongs to."""


def micro_batches(
    rollouts: list[Rollout], old: list[Tensor], advantage: Tensor, columns: list[int], size: int | None
) -> Iterator[MicroBatch]:
    """All rows at the given trained steps, `size` rows at a time; None takes whole rollouts."""
    start = 0
    for rollout, log_probs in zip(rollouts, old, strict=True):
        count = len(log_probs)
        for low in range(0, count, size or count):
            some = slice(low, min(low + (size or count), count))
            share = (some.stop - some.start) / (len(advantage) * len(columns))
            for column in columns:
                own = advantage[start + some.start : start + some.stop, column]
                yield MicroBatch(rollout, some, column, log_probs[some, column], own, share)
        start += count


class Updater:
    """Owns the optimizer, its schedule and the weight average; turns rollouts and advantages into optimizer steps.

    Args:
        policy: the one that sampled.
        settings: of the update.
        method: clip range, KL weight, ratio normalisation.
        dynamics: those of the rollout.
        accelerator: of the run.
        seed: of the order of the steps.
    """

    def __init__(
        self,
        policy: Policy,
        settings: TrainingSettings,
        method: MethodSettings,
        dynamics: Dynamics,
        accelerator: Accelerator,
        seed: int,
    ) -> None:
        self.policy, self.settings, self.method, self.dynamics = policy, settings, method, dynamics
        self.accelerator, self.seed, self.iteration = accelerator, seed, 0
        self.parameters = policy.trainable_parameters()
        if not self.parameters:
            raise TrainingError("The policy has no trainable parameter: the adapter is bound to nothing.")
        self.optimizer: torch.optim.Optimizer = construct(settings.optimizer, "optimizer", params=self.parameters)
        self.scheduler = self._make_scheduler()
        self.ema = {n: t.clone() for n, t in policy.trainable_state().items()} if settings.ema_decay else None
        self.updates, self.skipped = 0, 0

    def _make_scheduler(self) -> Any:
        from diffusers.optimization import get_scheduler

        training = self.settings
        total = training.iterations * training.inner_epochs * training.updates_per_epoch
        return get_scheduler(
            training.lr_schedule, self.optimizer, num_warmup_steps=training.warmup_updates, num_training_steps=total
        )

    def __call__(self, iteration: int, rollouts: list[Rollout], advantage: Tensor) -> dict[str, float]:
        """inner_epochs x updates_per_epoch optimizer steps.

        Args:
            iteration: for the order of the steps, and for messages.
            rollouts: the chunks of this process.
            advantage: (rows of all chunks, S).

        Returns:
            What metrics.jsonl says under update/.

        Raises:
            TrainingError: from a guard.
        """
        self.iteration = iteration
        meter, num_steps = Meter(), advantage.shape[1]
        old = [self._old_log_probs(rollout) for rollout in rollouts]
        parts = min(self.settings.updates_per_epoch, num_steps)
        for epoch in range(self.settings.inner_epochs):
            order = torch.randperm(num_steps, generator=generator("update", self.seed, iteration, epoch))
            for part in range(parts):
                columns = order[part::parts].tolist()
                for batch in micro_batches(rollouts, old, advantage, columns, self.settings.micro_batch):
                    self._backward(batch, on_policy=epoch == part == 0, meter=meter)
                self._step(meter)
        return meter.record() | {
            "update/learning_rate": self.optimizer.param_groups[0]["lr"],
            "update/skipped": self.skipped,
        }

    def _backward(self, batch: "MicroBatch", on_policy: bool, meter: Meter) -> None:
        """Accumulate the gradient of one micro-batch."""
        method, rollout, some, column = self.method, batch.rollout, batch.rows, batch.column
        step = self._gaussian(rollout, some, column)
        log_ratio = sde.log_prob(step, rollout.next_latents[some, column]) - batch.old_log_prob
        drift = float(log_ratio.detach().abs().max())
        meter.maximum("update/ratio_max", math.exp(min(drift, 80.0)))
        if on_policy:
            meter.maximum("update/first_ratio_error", drift)
            self._guard_first_ratio(drift)
        if method.ratio_norm:
            assert rollout.means is not None
            log_ratio = normalized_log_ratio(log_ratio, step, sde.Gaussian(rollout.means[some, column], step.std))
        surrogate = clipped_surrogate(log_ratio, batch.advantage, method.clip_range)
        loss = surrogate.losses.mean()
        if method.beta:
            with torch.no_grad(), self.policy.base():
                base = self._gaussian(rollout, some, column)
            kl = gaussian_kl(step, base).mean()
            meter.mean("update/kl", float(kl.detach()), batch.share)
            loss = loss + method.beta * kl
        meter.mean("update/loss", float(loss.detach()), batch.share)
        meter.mean("update/clip_share", float(surrogate.clip_share), batch.share)
        (loss * batch.share).backward()

    def _gaussian(self, rollout: Rollout, some: slice, column: int) -> sde.Gaussian:
        latents, step = rollout.latents[some, column], int(rollout.steps[column])
        sigma, sigma_next = (rollout.sigmas[i].expand(len(latents)) for i in (step, step + 1))
        velocity = self.policy.velocity(latents, sigma, rows(rollout.conditioning, some))
        return complete_dynamics(self.dynamics, rollout.sigmas)(latents, velocity, sigma, sigma_next)

    @torch.no_grad()
    def _old_log_probs(self, rollout: Rollout) -> Tensor:
        if self.settings.old_log_probs == "rollout":
            return rollout.log_probs
        size = self.settings.micro_batch or len(rollout.log_probs)
        old = torch.empty_like(rollout.log_probs)
        for row in range(0, len(old), size):
            some = slice(row, row + size)
            for column in range(old.shape[1]):
                old[some, column] = sde.log_prob(
                    self._gaussian(rollout, some, column), rollout.next_latents[some, column]
                )
        return old

    def _step(self, meter: Meter) -> None:
        """Average gradients over processes, check, clip, step."""
        missing = [p for p in self.parameters if p.grad is None]
        for p in missing:
            p.grad = torch.zeros_like(p)
        if self.accelerator.num_processes > 1:
            reduced = self.accelerator.reduce([p.grad for p in self.parameters], reduction="mean")
            for p, gradient in zip(self.parameters, reduced, strict=True):
                p.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self._guard_synchronised(norm)
        meter.mean("update/grad_norm", float(norm), 1.0)
        if bool(norm.isfinite()):
            self.optimizer.step()
            self.scheduler.step()
            self.updates += 1
            if self.ema is not None:
                decay = min(self.settings.ema_decay, (1 + self.updates) / (10 + self.updates))
                for name, tensor in self.policy.trainable_state().items():
                    self.ema[name].lerp_(tensor, 1 - decay)
        else:
            self._skip(norm)
        self.optimizer.zero_grad(set_to_none=True)

    # ---- guards

    def _guard_first_ratio(self, drift: float) -> None:
        """Before the first optimizer step the policy is the one that sampled, so the ratio must be 1."""
        tolerance = 1e-5 if self.policy.dtype == torch.float32 else 1e-3
        if not drift <= tolerance:
            raise TrainingError(
                f"The first ratio of iteration {self.iteration} is off 1 by {drift:.1e} (allowed {tolerance:.0e} in "
                f"{str(self.policy.dtype).removeprefix('torch.')}): sampling and training compute different log-probs. "
                f"Set training.old_log_probs=recompute, or switch dropout off."
            )

    def _guard_synchronised(self, norm: Tensor) -> None:
        if self.accelerator.num_processes > 1:
            norms = cast(Tensor, self.accelerator.gather(norm.detach().reshape(1)))
            if not bool((norms == norms[0]).all() | norms.isnan().all()):
                raise TrainingError(
                    f"Gradients differ between processes ({norms.tolist()}): they are not synchronised, so every "
                    f"process would train another model."
                )

    def _skip(self, norm: Tensor) -> None:
        self.skipped += 1
        if self.skipped >= 3:
            raise TrainingError(
                f"The gradient is not finite ({float(norm)}) for the third time, in iteration {self.iteration}; "
                f"lower the learning rate or train in float32. The last checkpoint is untouched."
            )

    # ---- the average

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside it the policy has the averaged weights, where there is an average."""
        if self.ema is None:
            yield
            return
        own = {name: tensor.clone() for name, tensor in self.policy.trainable_state().items()}
        self.policy.load_trainable_state(self.ema)
        try:
            yield
        finally:
            self.policy.load_trainable_state(own)

    # ---- what a checkpoint holds

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def restore(self, state: TrainingState) -> None:
        """Inverse of `state`, with the trained weights and their average.

        Raises:
            UserError: if the checkpoint is of another model.
        """
        self.policy.load_trainable_state(state.trainable)
        try:
            self.optimizer.load_state_dict(dict(state.optimizer))
        except ValueError as error:
            raise UserError(f"The optimizer state of the checkpoint is of another model: {error}") from error
        self.scheduler.load_state_dict(dict(state.scheduler))
        if self.ema is not None:
            self.ema = {n: t.to(self.ema[n]) for n, t in (state.ema or state.trainable).items()}
