"""GRPO: policy gradients on sampled steps, each of which is a Gaussian whose log-probability is known."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.functional import credit, sde
from customized_grpo.functional.surrogate import (
    approx_kl,
    clipped_surrogate,
    gaussian_kl,
    masked_surrogate,
    normalized_log_ratio,
)
from customized_grpo.policies.contract import Policy, repeat, rows
from customized_grpo.randomness import generator, moved
from customized_grpo.settings.build import bind, named_after, resolve
from customized_grpo.structures import Conditioning, Rollout
from customized_grpo.train.meters import Meter
from customized_grpo.train.objectives.contract import MicroBatch, Objective, Plan, Stage
from customized_grpo.train.rollout import RowNoise, complete_dynamics
from customized_grpo.train.settings import GrpoSettings, TrainerConfig
from customized_grpo.train.trajectory import trajectory

__all__ = ["grpo"]
"""What a configuration can name as `objective`."""


@dataclass(frozen=True)
class Trajectories(Rollout):
    """The trained steps of P * G trajectories."""

    latents: Tensor
    """(B, S, N, C) float32, before each trained step."""
    next_latents: Tensor
    """(B, S, N, C) float32, after each trained step."""
    log_probs: Tensor
    """(B, S) float32, nats per latent element, under the policy that sampled."""
    sigmas: Tensor
    """(T + 1,) float32, from 1 (noise) to 0 (image), in the memory of the host."""
    steps: Tensor
    """(S,) int64, the true indices of the trained steps, ascending, in the memory of the host."""
    means: Tensor | None = None
    """(B, S, N, C) means of the trained steps, where the update compares them."""
    pending: Collection[int] = ()
    """Columns whose log-probs and means the first pass of the update is to fill in."""


class Grpo(Objective):
    """The clipped surrogate on stochastic steps; with `divergence_threshold`, Flow-DPPO's mask in place of the clip."""

    SETTINGS = GrpoSettings
    checked = False

    def __init__(self, settings: GrpoSettings, policy: Policy, config: TrainerConfig) -> None:
        super().__init__(settings, policy, config)
        dynamics, steps = config.rollout.dynamics, config.rollout.steps
        assert dynamics is not None, "the configuration is not resolved"
        assert steps is not None, "the configuration is not resolved"
        self.dynamics, self.dynamics_name = (
            bind(dynamics, "dynamics", "rollout.dynamics"),
            f"rollout.dynamics '{dynamics.use}'",
        )
        self.steps, self.steps_name = bind(steps, "steps", "rollout.steps"), f"rollout.steps '{steps.use}'"
        assert config.method.credit is not None, "the configuration is not resolved"
        self.predicts = resolve(config.method.credit.use, "credit") is not credit.final
        self.keep_means = bool(config.method.ratio_norm) or settings.divergence_threshold is not None

    def check(self) -> None:
        """Raise UserError if the stochastic step is deterministic: it would have no density to train on."""
        probe, sigma, sigma_next = torch.zeros(1, 1, 1), torch.tensor([0.8]), torch.tensor([0.6])
        with named_after(self.dynamics_name):
            step = complete_dynamics(self.dynamics, torch.tensor([1.0, 0.8, 0.0]))
            std = step(probe, probe, sigma, sigma_next).std
        if not bool((std > 0).all()):
            raise UserError(
                f"{self.dynamics_name} has no noise (std {float(std):g}), but training needs stochastic steps; "
                f"set a noise_level above 0."
            )

    def plan(self, iteration: int) -> Plan:
        count, draw = self.config.rollout.num_inference_steps, generator("steps", self.config.seed, iteration)
        with named_after(self.steps_name):
            steps = self.steps(iteration - 1, count, generator=draw)
            return Plan(steps.trained / count, steps)

    @torch.no_grad()
    def collect(self, conditioning: Conditioning, plan: Plan, noise: RowNoise, stage: Stage) -> Trajectories:
        """Sample stochastically in the steps of the plan, deterministically in the others.

        Raises:
            ValueError: if a trained step is deterministic (noise level 0), because it has no density.
        """
        assert plan.steps is not None
        policy, settings = self.policy, self.config.rollout
        with stage("rollout"):
            groups, shape = settings.num_generations, policy.latent_shape(conditioning)
            sigmas = policy.sigmas(settings.num_inference_steps, conditioning).cpu()
            stochastic, trained = set(plan.steps.stochastic.tolist()), set(plan.steps.trained.tolist())
            if settings.share_initial_noise:
                initial = noise.per_prompt(shape)
            else:
                conditioning, initial = repeat(conditioning, groups), noise.per_row(shape, -1)
            steps = trajectory(
                policy.velocity,
                conditioning,
                policy.initial_latents(conditioning, moved(initial, policy.device)),
                sigmas.to(policy.device),
                solver=settings.solver,
                dynamics=complete_dynamics(self.dynamics, sigmas),
                noise=lambda index: moved(noise.per_row(shape, index), policy.device) if index in stochastic else None,
            )
            before, after, log_probs, means = [], [], [], []
            wanted = trained | {index + 1 for index in trained} if self.predicts else set[int]()
            predicted: dict[int, Tensor] = {}
            for step in steps:
                if step.index in wanted:
                    predicted[step.index] = step.latents - step.sigma.view(-1, 1, 1) * step.velocity
                if step.index in trained:
                    before.append(step.latents)
                    after.append(step.next_latents)
                    log_probs.append(sde.log_prob(step.gaussian, step.next_latents))
                    if self.keep_means:
                        means.append(step.gaussian.mean)
        with stage("decode"):
            images = policy.decode(step.next_latents, step.conditioning)
            previews = {index: policy.decode(x0, step.conditioning) for index, x0 in predicted.items()}
        return Trajectories(
            images=images,
            conditioning=step.conditioning,
            previews=previews,
            latents=torch.stack(before, dim=1),
            next_latents=torch.stack(after, dim=1),
            log_probs=torch.stack(log_probs, dim=1),
            sigmas=sigmas,
            steps=plan.steps.trained,
            means=torch.stack(means, dim=1) if self.keep_means else None,
        )

    def prepare(self, rollouts: Sequence[Trajectories], first: Collection[int]) -> Sequence[Trajectories]:
        if self.config.training.old_log_probs != "recompute":
            return rollouts
        pending = first if self.checked else ()  # the first update compares two passes: see `check_first`
        self.checked = True
        return [self._recompute(rollout, pending) for rollout in rollouts]

    @torch.no_grad()
    def _recompute(self, rollout: Trajectories, pending: Collection[int]) -> Trajectories:
        """The rollout with log-probs, and means where it keeps them, computed in the update's own batches."""
        size = self.size(rollout)
        old = torch.empty_like(rollout.log_probs)
        means = None if rollout.means is None else torch.empty_like(rollout.means)
        columns = [column for column in range(old.shape[1]) if column not in pending]
        for row in range(0, len(old), size):
            some = slice(row, row + size)
            for column in columns:
                _, step = self._step(rollout, some, column)
                old[some, column] = sde.log_density(step, rollout.next_latents[some, column])
                if means is not None:
                    means[some, column] = step.mean
        return replace(rollout, log_probs=old, means=means, pending=pending)

    def loss(self, batch: MicroBatch, meter: Meter) -> Tensor:
        method, rollout, some, column = self.config.method, batch.rollout, batch.rows, batch.column
        base, base_step = None, None
        if method.needs_base:  # before the pass that trains, because full training changes weights in place for it
            with torch.no_grad(), self.policy.base():
                base, base_step = self._step(rollout, some, column)
        velocity, step = self._step(rollout, some, column)
        log_prob = sde.log_density(step, rollout.next_latents[some, column])
        if batch.first and column in rollout.pending:
            rollout.log_probs[some, column] = log_prob.detach()
            if rollout.means is not None:
                rollout.means[some, column] = step.mean.detach()
        old = None if rollout.means is None else sde.Gaussian(rollout.means[some, column], step.std)
        log_ratio = log_prob - rollout.log_probs[some, column]
        drift = log_ratio.detach().abs().max()
        meter.maximum("update/ratio_max", drift.clamp(max=80).exp())
        meter.mean("update/approx_kl", approx_kl(log_ratio.detach()), batch.share)
        if method.ratio_norm:
            assert old is not None
            log_ratio = normalized_log_ratio(log_ratio, step, old)
        if batch.first:
            drift = torch.maximum(drift, log_ratio.detach().abs().max())  # as it is, and as it is clipped
            meter.maximum("update/first_ratio_error", drift)
        threshold = self.settings.divergence_threshold
        if threshold is None:
            assert method.clip_range is not None
            surrogate = clipped_surrogate(log_ratio, batch.advantage, method.clip_range)
        else:
            assert old is not None
            moved = gaussian_kl(step, old).detach()
            surrogate = masked_surrogate(log_ratio, batch.advantage, moved, threshold=threshold)
        loss = surrogate.losses.mean()
        if method.beta and base_step is not None:
            kl = gaussian_kl(step, base_step).mean()
            meter.mean("update/kl", kl, batch.share)
            loss = loss + method.beta * kl
        meter.mean("update/clip_share", surrogate.clip_share, batch.share)
        return loss + self.norm_hinge(velocity, base, batch, meter)

    def _step(self, rollout: Trajectories, some: slice, column: int) -> tuple[Tensor, sde.Gaussian]:
        """The velocity and the distribution of a trained step under the policy."""
        latents, step = rollout.latents[some, column], int(rollout.steps[column])
        sigma, sigma_next = (latents.new_full((len(latents),), float(rollout.sigmas[i])) for i in (step, step + 1))
        velocity = self.policy.velocity(latents, sigma, rows(rollout.conditioning, some))
        dynamics = complete_dynamics(self.dynamics, rollout.sigmas)
        return velocity, dynamics(latents, velocity, sigma, sigma_next)

    def kept(self, count: int) -> int:
        return count * (3 if self.keep_means else 2)

    def predicted(self, count: int) -> int:
        return min(2 * count, self.config.rollout.num_inference_steps) if self.predicts else 0

    def extra_passes(self, count: int) -> int:
        training, extra = self.config.training, count * self.config.method.needs_base
        if training.old_log_probs == "recompute":
            extra += count - len(range(0, count, training.updates_per_epoch))
        return extra


grpo = Grpo
