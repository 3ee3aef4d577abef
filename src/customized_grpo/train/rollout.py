"""What sampling needs: noise that is a function of the row, dynamics for a schedule, and deterministic sampling."""

import inspect
from functools import partial

import torch
from torch import Tensor

from customized_grpo.policies.contract import Policy
from customized_grpo.randomness import moved, normal
from customized_grpo.structures import Conditioning
from customized_grpo.train.trajectory import Dynamics, Solver, last, trajectory


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

    def per_row(self, shape: tuple[int, int], step: int | str, rows: slice = slice(None)) -> Tensor:
        """Shape (P * G, N, C), or its given rows. Step -1 is the initial noise of groups that do not share theirs."""
        keys = [(*self.prefix, slot, g, step) for slot in self.slots for g in range(self.num_generations)]
        return normal(shape, keys[rows])


@torch.no_grad()
def denoise(
    policy: Policy, conditioning: Conditioning, noise: Tensor, num_steps: int, solver: Solver = "euler"
) -> tuple[Tensor, Tensor]:
    """Clean latents (B, N, C) and their schedule (T + 1,), deterministic, from standard normal noise (B, N, C)."""
    latents = policy.initial_latents(conditioning, moved(noise, policy.device))
    sigmas = policy.sigmas(num_steps, conditioning).to(policy.device)
    return last(trajectory(policy.velocity, conditioning, latents, sigmas, solver=solver)).next_latents, sigmas


@torch.no_grad()
def sample_ode(
    policy: Policy, conditioning: Conditioning, noise: Tensor, num_inference_steps: int, solver: Solver = "euler"
) -> Tensor:
    """Deterministic images (B, 3, H, W) from conditioning and standard normal noise (B, N, C)."""
    return policy.decode(denoise(policy, conditioning, noise, num_inference_steps, solver)[0], conditioning)
