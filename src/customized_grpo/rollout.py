"""Policy to Rollout: sample P groups of G trajectories, stochastic inside the plan, deterministic outside it."""

import inspect
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from customized_grpo.functional import sde
from customized_grpo.functional.schedule import StepPlan
from customized_grpo.functional.sde import Gaussian
from customized_grpo.policies.contract import Policy, repeat
from customized_grpo.randomness import normal
from customized_grpo.settings import Role, Settings, Spec
from customized_grpo.types import Conditioning, Rollout

Dynamics = Callable[[Tensor, Tensor, Tensor, Tensor], Gaussian]
Stage = Callable[[str], AbstractContextManager[None]]


class RolloutSettings(Settings):
    """How trajectories are sampled."""

    num_generations: Annotated[int, Role.APPLIED] = Field(default=8, ge=2)
    """G: pictures per prompt. A group of one has no spread, so nothing to learn from."""
    num_inference_steps: Annotated[int, Role.KEPT] = Field(default=10, ge=2)
    """T, in training and in evaluation."""
    dynamics: Annotated[Spec, Role.APPLIED] = Spec(use="flow_sde", noise_level=0.7)  # pyright: ignore[reportCallIssue]
    """The stochastic step: dance_sde, flow_sde, cps, or package.module:name."""
    steps: Annotated[Spec, Role.APPLIED] = Spec(use="random_fraction", fraction=0.6)  # pyright: ignore[reportCallIssue]
    """Which steps are stochastic and trained: all_steps, random_fraction, sliding_window, or package.module:name."""
    share_initial_noise: Annotated[bool, Role.APPLIED] = True
    """All generations of a prompt start from one noise, and are computed once until the first stochastic step."""
    chunk_prompts: Annotated[int | None, Role.RUNTIME] = Field(default=None, ge=1)
    """Prompts sampled in one batch; None takes all. It changes memory, and the result only by rounding."""


def complete_dynamics(dynamics: Dynamics, sigmas: Tensor) -> Dynamics:
    """Give dynamics that are singular at sigma = 1 the largest sigma below it. Source: Flow-GRPO, sigmas[1]."""
    parameters = inspect.signature(dynamics).parameters
    if "sigma_max" in parameters and "sigma_max" not in getattr(dynamics, "keywords", {}):
        return partial(dynamics, sigma_max=float(sigmas[1]))  # pyright: ignore[reportCallIssue]
    return dynamics


class RowNoise:
    """The noise of one iteration's rows, each draw a function of (seed, iteration, slot, generation, step).

    A slot is the global place of a prompt in the iteration, so neither the number of processes nor the chunks matter.
    """

    def __init__(self, seed: int, iteration: int | str, slots: list[int], num_generations: int) -> None:
        self.prefix, self.slots, self.num_generations = (seed, iteration), slots, num_generations

    def per_prompt(self, shape: tuple[int, int]) -> Tensor:
        """Initial noise, shape (P, N, C)."""
        return normal(shape, [("initial", *self.prefix, slot) for slot in self.slots])

    def per_row(self, shape: tuple[int, int], step: int) -> Tensor:
        """Shape (P * G, N, C). Step -1 is the initial noise of groups that do not share theirs."""
        keys = [(*self.prefix, slot, g, step) for slot in self.slots for g in range(self.num_generations)]
        return normal(shape, keys)


@torch.no_grad()
def collect(
    policy: Policy,
    conditioning: Conditioning,
    plan: StepPlan,
    noise: RowNoise,
    settings: RolloutSettings,
    dynamics: Dynamics,
    *,
    stage: Stage = lambda name: nullcontext(),
    keep_means: bool = False,
) -> Rollout:
    """Sample groups.

    Args:
        policy: in the state that samples.
        conditioning: leading axis P, one row per prompt.
        plan: which steps are stochastic, and which of them the update will train.
        noise: of these prompts.
        settings: G, T and whether a group shares its initial noise.
        dynamics: the stochastic step.
        stage: context manager that times a named stage.
        keep_means: keep the means of the trained steps, for GRPO-Guard's ratio.

    Returns:
        A Rollout of B = P * G rows; row b belongs to prompt b // G.

    Raises:
        ValueError: if a trained step is deterministic (noise level 0), because it has no density.
    """
    with stage("rollout"):
        groups, shape = settings.num_generations, policy.latent_shape(conditioning)
        sigmas = policy.sigmas(settings.num_inference_steps, conditioning).to(policy.device)
        dynamics = complete_dynamics(dynamics, sigmas)
        everyone = repeat(conditioning, groups)
        stochastic, trained = set(plan.stochastic.tolist()), plan.trained.tolist()

        if settings.share_initial_noise:
            current, latents = conditioning, policy.initial_latents(conditioning, _to(noise.per_prompt(shape), policy))
        else:
            current, latents = everyone, policy.initial_latents(everyone, _to(noise.per_row(shape, -1), policy))
        before, after, log_probs, means = {}, {}, {}, {}
        for step in range(settings.num_inference_steps):
            if step in stochastic and current is not everyone:
                # Until here the group was one trajectory: what is shared is computed once.
                velocity = policy.velocity(latents, sigmas[step].expand(len(latents)), current)
                velocity, latents = (x.repeat_interleave(groups, dim=0) for x in (velocity, latents))
                current = everyone
            else:
                velocity = policy.velocity(latents, sigmas[step].expand(len(latents)), current)
            sigma, sigma_next = (sigmas[i].expand(len(latents)) for i in (step, step + 1))
            if step in stochastic:
                gaussian = dynamics(latents, velocity, sigma, sigma_next)
                next_latents = sde.sample(gaussian, noise=_to(noise.per_row(shape, step), policy))
                if step in trained:
                    before[step], after[step] = latents, next_latents
                    log_probs[step], means[step] = sde.log_prob(gaussian, next_latents), gaussian.mean
            else:
                next_latents = sde.ode_step(latents, velocity, sigma, sigma_next).mean
            latents = next_latents
    with stage("decode"):
        images = policy.decode(latents, everyone)
    return Rollout(
        latents=torch.stack([before[s] for s in trained], dim=1),
        next_latents=torch.stack([after[s] for s in trained], dim=1),
        log_probs=torch.stack([log_probs[s] for s in trained], dim=1),
        sigmas=sigmas,
        steps=plan.trained,
        images=images,
        conditioning=everyone,
        means=torch.stack([means[s] for s in trained], dim=1) if keep_means else None,
    )


@torch.no_grad()
def sample_ode(policy: Policy, conditioning: Conditioning, noise: Tensor, num_inference_steps: int) -> Tensor:
    """Deterministic images (B, 3, H, W) from conditioning and standard normal noise (B, N, C)."""
    latents = policy.initial_latents(conditioning, _to(noise, policy))
    sigmas = policy.sigmas(num_inference_steps, conditioning).to(policy.device)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        rows = (sigma.expand(len(latents)), sigma_next.expand(len(latents)))
        latents = sde.ode_step(latents, policy.velocity(latents, rows[0], conditioning), *rows).mean
    return policy.decode(latents, conditioning)


def _to(noise: Tensor, policy: Policy) -> Tensor:
    return noise.to(policy.device)
