"""Objectives on the forward process: sampled images are noised again, and the velocity is trained there.

No sampling step is trained, so any solver samples, and a rollout keeps clean latents alone. `Forward` does everything
but the loss of a row; DiffusionNFT and AWM are its subclasses. The formulas are in `functional.forward`.
"""

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from customized_grpo.errors import TrainingError, UserError
from customized_grpo.functional import forward
from customized_grpo.functional.advantages import centred, normalized
from customized_grpo.policies.contract import Policy, move_towards, repeat, rows, weights_replaced
from customized_grpo.randomness import generator, moved
from customized_grpo.settings.build import named_after
from customized_grpo.structures import Conditioning, Rollout
from customized_grpo.train.meters import Meter
from customized_grpo.train.method import SpreadGuard
from customized_grpo.train.objectives.contract import REPEATABLE, MicroBatch, Objective, Plan, Stage
from customized_grpo.train.rollout import RowNoise, denoise
from customized_grpo.train.settings import AwmSettings, ForwardSettings, NftSettings, TrainerConfig

__all__ = ["awm", "nft"]
"""What a configuration can name as `objective`."""


@dataclass(frozen=True)
class Samples(Rollout):
    """P * G images and the levels at which they are noised again."""

    x0: Tensor
    """(B, N, C) float32, the clean latents."""
    sigmas: Tensor
    """(S,) the levels, by the schedule of these images."""
    noise: RowNoise
    """Gives eps, the same whenever it is asked."""
    old_velocities: Tensor | None = None
    """(B, S, N, C) of the old policy."""
    old_log_probs: Tensor | None = None
    """(B, S) of the policy before the update."""


class Noised(NamedTuple):
    """Some rows at one level."""

    latents: Tensor
    """(rows, N, C), x."""
    x0: Tensor
    """(rows, N, C)"""
    noise: Tensor
    """(rows, N, C), eps."""
    sigma: Tensor
    """(rows,)"""


class Forward(Objective):
    """Everything but the loss of a row, which a subclass gives in `losses`.

    The old policy is a moving average of the trained one. Its weights replace the trained ones as a whole while images
    are sampled, and again while `prepare` takes old velocities: never between the passes of the update.
    """

    SETTINGS = ForwardSettings
    RUNTIME = ("offload_old",)
    """Arguments that do not change the result."""
    SAMPLES_WITH_OLD = True
    """Whether the old policy samples, where there is one."""

    def __init__(self, settings: ForwardSettings, policy: Policy, config: TrainerConfig) -> None:
        super().__init__(settings, policy, config)
        self.old = self._weights() if self.keeps_old() else None
        self.name, self.flat = type(self).__name__.lower(), 0

    def keeps_old(self) -> bool:
        """Whether there is an old policy."""
        return True

    def check(self) -> None:
        """Raise UserError for classifier-free guidance, whose velocity is not that of the forward process."""
        if (scale := getattr(self.policy, "true_cfg_scale", 1.0)) > 1:
            raise UserError(
                f"policy.true_cfg_scale is {scale:g}, but the objective {self.config.objective.use} trains without "
                f"classifier-free guidance; set policy.true_cfg_scale=1. evaluation.true_cfg_scale may be another."
            )
        if self.policy.step_distilled:
            warnings.warn(
                f"{self.policy.name} has a model that was distilled to few steps, and {self.config.objective.use} "
                f"trains it at all noise levels, which is not known to work; watch the evaluations, or use its base.",
                stacklevel=1,
            )

    # ---- sampling

    def plan(self, iteration: int) -> Plan:
        settings, draw = self.settings, generator("levels", self.config.seed, iteration)
        with named_after(f"objective '{self.config.objective.use}'"):
            return Plan(
                forward.draw_levels(
                    settings.levels, self.config.rollout.num_inference_steps,
                    generator=draw, window=settings.window, continuous=settings.continuous,
                )
            )  # fmt: skip

    def sampling(self) -> AbstractContextManager[None]:
        return weights_replaced(self.policy, self.old if self.SAMPLES_WITH_OLD else None)

    @torch.no_grad()
    def collect(self, conditioning: Conditioning, plan: Plan, noise: RowNoise, stage: Stage) -> Samples:
        policy, settings = self.policy, self.config.rollout
        with stage("rollout"):
            initial = noise.per_row(policy.latent_shape(conditioning), -1)
            conditioning = repeat(conditioning, settings.num_generations)
            x0, sigmas = denoise(policy, conditioning, initial, settings.num_inference_steps, settings.solver)
        with stage("decode"):
            images = policy.decode(x0, conditioning)
        return Samples(images, conditioning, x0, forward.level_sigmas(plan.progress, sigmas), noise)

    def advantages(self, everyone: Tensor, scored: Tensor) -> tuple[Tensor, dict[str, float]]:
        if self.settings.centre:
            everyone = centred(everyone, scored)
        if self.settings.normalize == "batch":
            everyone = normalized(everyone, everyone, scored)
        counted = everyone[scored].double()
        self.flat = 0 if counted.numel() and bool(counted.min() < counted.max()) else self.flat + 1
        if self.flat >= SpreadGuard.PATIENCE:
            raise TrainingError(
                f"All advantages were the same in {self.flat} iterations in a row, which teaches nothing: the rewards "
                f"cancel; change method.advantage or method.time_weights, or raise rollout.num_generations."
            )
        clipped = counted.abs() > self.settings.advantage_clip
        return everyone, {f"{self.name}/clipped": float(clipped.double().mean())}

    # ---- the update

    def noised(self, rollout: Samples, some: slice, level: int) -> Noised:
        """The given rows at one of the S levels."""
        x0 = rollout.x0[some]
        noise = moved(rollout.noise.per_row((x0.shape[1], x0.shape[2]), f"level {level}", some), x0.device).to(x0)
        sigma = rollout.sigmas[level].expand(len(x0))
        return Noised(forward.add_noise(x0, noise, sigma), x0, noise, sigma)

    def velocity(self, rollout: Samples, some: slice, at: Noised) -> Tensor:
        return self.policy.velocity(at.latents, at.sigma, rows(rollout.conditioning, some))

    @torch.no_grad()
    def over_levels(self, rollout: Samples, value: Callable[[Tensor, Noised], Tensor]) -> Tensor:
        """(B, S, ...) a value (rows, ...) of velocities, at all rows and levels, in the update's own batches."""
        size, found = self.size(rollout), []
        for row in range(0, len(rollout), size):
            some = slice(row, row + size)
            places = [self.noised(rollout, some, level) for level in range(len(rollout.sigmas))]
            found.append(torch.stack([value(self.velocity(rollout, some, at), at) for at in places], dim=1))
        return torch.cat(found)

    def prepare(self, rollouts: Sequence[Samples], first: Collection[int]) -> Sequence[Samples]:
        if self.old is None:
            return rollouts
        with weights_replaced(self.policy, self.old):
            return [replace(one, old_velocities=self.over_levels(one, lambda v, at: v)) for one in rollouts]

    def loss(self, batch: MicroBatch, meter: Meter) -> Tensor:
        rollout, some, beta, base = batch.rollout, batch.rows, self.config.method.beta, None
        at = self.noised(rollout, some, batch.column)
        if self.config.method.needs_base:  # before the pass that trains, because full training swaps weights for it
            with torch.no_grad(), self.policy.base():
                base = self.velocity(rollout, some, at)
        velocity = self.velocity(rollout, some, at)
        loss = self.losses(velocity, at, batch, meter).mean()
        if beta and base is not None:
            kl = forward.velocity_kl(velocity, base).mean()
            meter.mean("update/kl", kl, batch.share)
            loss = loss + beta * kl
        return loss + self.norm_hinge(velocity, base, batch, meter)

    def losses(self, velocity: Tensor, at: Noised, batch: MicroBatch, meter: Meter) -> Tensor:
        """The loss of each row, (rows,), with gradient through the velocity (rows, N, C)."""
        raise NotImplementedError

    # ---- the old policy

    def _weights(self) -> dict[str, Tensor]:
        own, away = self.policy.trainable_state(), self.settings.offload_old
        return {name: tensor.to("cpu" if away else tensor.device, copy=True) for name, tensor in own.items()}

    def after_iteration(self, updates: int) -> None:
        if self.old is not None:
            decay = forward.old_policy_decay(updates, rate=self.settings.decay_rate, top=self.settings.decay)
            move_towards(self.old, self.policy.trainable_state(), 1 - decay)

    def state(self) -> Mapping[str, Tensor]:
        return self.old or {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if self.old is not None:  # switched on by this run, it starts from the trained weights
            self.old = {name: state.get(name, tensor).to(tensor, copy=True) for name, tensor in self._weights().items()}

    def kept(self, count: int) -> int:
        return 1 + count * (self.old is not None)

    def extra_passes(self, count: int) -> int:
        return count * ((self.old is not None) + self.config.method.needs_base)

    def copies(self) -> int:
        return int(self.old is not None and not self.settings.offload_old)


class Nft(Forward):
    """DiffusionNFT: good images pull the velocity towards themselves, bad ones push it away."""

    SETTINGS = NftSettings
    checked = False

    def advantages(self, everyone: Tensor, scored: Tensor) -> tuple[Tensor, dict[str, float]]:
        everyone, record = super().advantages(everyone, scored)
        r = forward.optimality(everyone[scored].double(), self.settings.advantage_clip)
        deviation = (r - r.mean()).square().mean().sqrt()
        return everyone, {"nft/r_mean": float(r.mean()), "nft/r_std": float(deviation), **record}

    def losses(self, velocity: Tensor, at: Noised, batch: MicroBatch, meter: Meter) -> Tensor:
        old = batch.rollout.old_velocities[batch.rows, batch.column]
        if not self.checked:
            self._guard_gradient(velocity, at, batch.advantage)
        if batch.first and self.iteration == 1:
            self._guard_first_velocity(velocity, old, meter)
        return self._losses(velocity, old, at, batch.advantage)

    def _losses(self, velocity: Tensor, old: Tensor, at: Noised, advantages: Tensor) -> Tensor:
        settings = self.settings
        return forward.nft_loss(
            velocity, old, at.latents, at.x0, at.sigma, advantages, mix=settings.mix,
            advantage_clip=settings.advantage_clip,
        ).losses  # fmt: skip

    def _guard_gradient(self, velocity: Tensor, at: Noised, advantages: Tensor) -> None:
        """Where the old velocity is the new one, the gradient of a row is 2 r - 1 times that of a row with r = 1."""

        def gradient(advantages: Tensor) -> Tensor:
            v = velocity.detach().requires_grad_()
            return torch.autograd.grad(self._losses(v, v.detach(), at, advantages).sum(), v)[0]

        best = gradient(torch.full_like(advantages, math.inf))
        r = forward.optimality(advantages, self.settings.advantage_clip)
        error = gradient(advantages) - (2 * r - 1).view(-1, 1, 1) * best
        if not float(error.abs().max()) <= 1e-4 * float(best.abs().max()):
            raise TrainingError(
                f"The gradient of iteration {self.iteration} is not proportional to 2 r - 1 where the old policy is "
                f"the new one: the loss of {self.config.objective.use} is not that of DiffusionNFT."
            )
        self.checked = True

    def _guard_first_velocity(self, velocity: Tensor, old: Tensor, meter: Meter) -> None:
        """In the first iteration the old policy is the one in training."""
        drift = float((velocity.detach() - old).abs().max() / old.abs().max().clamp(min=1e-8))
        meter.maximum("update/first_velocity_error", drift)
        if not drift <= self.rounding():
            raise TrainingError(
                f"The first velocity of iteration {self.iteration} is off the old policy's by {drift:.1e} of the "
                f"largest (allowed {self.rounding():.0e}), although their weights are the same; {REPEATABLE}."
            )


class Awm(Forward):
    """AWM, advantage-weighted matching: a clipped surrogate in which minus the matching error stands in for a
    log-probability. The policy in training samples; the old one only holds it back."""

    SETTINGS = AwmSettings
    SAMPLES_WITH_OLD = False

    def keeps_old(self) -> bool:
        return self.settings.old_beta > 0

    def prepare(self, rollouts: Sequence[Samples], first: Collection[int]) -> Sequence[Samples]:
        known = [replace(one, old_log_probs=self.over_levels(one, self._log_prob)) for one in rollouts]
        return super().prepare(known, first)

    def _log_prob(self, velocity: Tensor, at: Noised) -> Tensor:
        return forward.awm_log_prob(
            velocity, at.x0, at.noise, at.sigma, weighting=self.settings.weighting, power=self.settings.power
        )

    def losses(self, velocity: Tensor, at: Noised, batch: MicroBatch, meter: Meter) -> Tensor:
        settings, rollout, clip_range = self.settings, batch.rollout, self.config.method.clip_range
        assert clip_range is not None
        log_prob, old = self._log_prob(velocity, at), rollout.old_log_probs[batch.rows, batch.column]
        drift = (log_prob.detach() - old).abs().max()
        meter.maximum("update/ratio_max", drift.clamp(max=80).exp())
        if batch.first:
            meter.maximum("update/first_ratio_error", drift)
        surrogate = forward.awm_loss(
            log_prob, old, batch.advantage, advantage_clip=settings.advantage_clip, clip_range=clip_range
        )
        meter.mean("update/clip_share", surrogate.clip_share, batch.share)
        if not settings.old_beta:
            return surrogate.losses
        kl = forward.velocity_kl(velocity, rollout.old_velocities[batch.rows, batch.column])
        meter.mean("update/old_kl", kl.mean(), batch.share)
        return surrogate.losses + settings.old_beta * kl

    def extra_passes(self, count: int) -> int:
        return super().extra_passes(count) + count


nft, awm = Nft, Awm
