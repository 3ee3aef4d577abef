"""Sample P groups of G trajectories: stochastic in the steps of a plan, deterministic in the others."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from customized_grpo.functional import sde
from customized_grpo.functional.schedule import StepPlan
from customized_grpo.policies.contract import Policy, repeat
from customized_grpo.randomness import normal
from customized_grpo.structures import Conditioning, Rollout
from customized_grpo.train.settings import RolloutSettings
from customized_grpo.train.trajectory import Dynamics, last, trajectory

Stage = Callable[[str], AbstractContextManager[None]]


def complete_dynamics(dynamics: Dynamics, sigmas: Tensor) -> Dynamics:
    """Give dynamics that are singular at sigma = 1 the largest sigma below it. Source: Flow-GRPO, sigmas[1]."""
    parameters = inspect.signature(dynamics).parameters
    if "sigma_max" in parameters and "sigma_max" not in getattr(dynamics, "keywords", {}):
        return partial(dynamics, sigma_max=float(sigmas[1]))  # pyright: ignore[reportCallIssue]
    return dynamics


class RowNoise:
    """Noise for the rows of one iteration. Each draw is a function of (seed, iteration, slot, generation, step).

    A slot is the index of a prompt among all prompts of the iteration, so the noise does not depend on the number of
    processes or on the chunks.
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
        policy: with the weights that sample.
        conditioning: leading axis P, one row per prompt.
        plan: which steps are stochastic, and which of them the update will train.
        noise: for these prompts.
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
        stochastic, trained = set(plan.stochastic.tolist()), set(plan.trained.tolist())
        if settings.share_initial_noise:
            initial = noise.per_prompt(shape)
        else:
            conditioning, initial = repeat(conditioning, groups), noise.per_row(shape, -1)
        steps = trajectory(
            policy.velocity,
            conditioning,
            policy.initial_latents(conditioning, initial.to(policy.device)),
            sigmas,
            dynamics=complete_dynamics(dynamics, sigmas),
            noise=lambda index: noise.per_row(shape, index).to(policy.device) if index in stochastic else None,
        )
        before, after, log_probs, means = [], [], [], []
        for step in steps:
            if step.index in trained:
                before.append(step.latents)
                after.append(step.next_latents)
                log_probs.append(sde.log_prob(step.gaussian, step.next_latents))
                if keep_means:
                    means.append(step.gaussian.mean)
    with stage("decode"):
        images = policy.decode(step.next_latents, step.conditioning)
    return Rollout(
        latents=torch.stack(before, dim=1),
        next_latents=torch.stack(after, dim=1),
        log_probs=torch.stack(log_probs, dim=1),
        sigmas=sigmas,
        steps=plan.trained,
        images=images,
        conditioning=step.conditioning,
        means=torch.stack(means, dim=1) if keep_means else None,
    )


@torch.no_grad()
def sample_ode(policy: Policy, conditioning: Conditioning, noise: Tensor, num_inference_steps: int) -> Tensor:
    """Deterministic images (B, 3, H, W) from conditioning and standard normal noise (B, N, C)."""
    latents = policy.initial_latents(conditioning, noise.to(policy.device))
    sigmas = policy.sigmas(num_inference_steps, conditioning).to(policy.device)
    end = last(trajectory(policy.velocity, conditioning, latents, sigmas))
    return policy.decode(end.next_latents, conditioning)
