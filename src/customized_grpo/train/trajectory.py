"""The denoising loop, the only one: every sampler iterates over `trajectory` and keeps what it needs of each step.

Notation: B rows, N latent tokens, C channels, T inference steps. sigma is the share of noise: 1 is noise, 0 is image.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from torch import Tensor

from customized_grpo.functional import sde
from customized_grpo.functional.sde import Gaussian
from customized_grpo.policies.contract import repeat
from customized_grpo.structures import Conditioning

Dynamics = Callable[[Tensor, Tensor, Tensor, Tensor], Gaussian]
"""(latents, velocity, sigma, sigma_next) to the distribution of the next latents."""

Solver = Literal["euler", "heun"]
"""Of the steps without noise. Source of heun: Karras et al. (arXiv 2206.00364), algorithm 1, as in k-diffusion."""


class Step(NamedTuple):
    """One denoising step of B rows. `latents - sigma * velocity` is the image that the model predicts there."""

    index: int
    """The step goes from sigmas[index] to sigmas[index + 1]."""
    latents: Tensor
    """(B, N, C) before the step."""
    velocity: Tensor
    """(B, N, C)"""
    sigma: Tensor
    """(B,)"""
    gaussian: Gaussian
    """The distribution of the next latents; std is 0 in a deterministic step."""
    next_latents: Tensor
    """(B, N, C)"""
    conditioning: Conditioning
    """Leading axis B."""


def trajectory(
    velocity: Callable[[Tensor, Tensor, Conditioning], Tensor],
    conditioning: Conditioning,
    latents: Tensor,
    sigmas: Tensor,
    *,
    dynamics: Dynamics = sde.ode_step,
    noise: Callable[[int], Tensor | None] = lambda index: None,
    solver: Solver = "euler",
    start: int = 0,
) -> Iterator[Step]:
    """Denoise step by step: stochastic where there is noise for a step, deterministic elsewhere.

    Noise with G times as many rows as the latents splits each row into a group of G: row b continues row b // G. The
    steps before the first such noise, and its velocity, are computed once per group.

    Args:
        velocity: (latents, sigma, conditioning) to d latents / d sigma, such as `policy.velocity`.
        conditioning: one row for each row of the latents.
        latents: at sigmas[start].
        sigmas: shape (T + 1,), falling, on the device of the latents.
        dynamics: the stochastic step.
        noise: step index to standard normal noise, or None for a deterministic step.
        solver: of the deterministic steps. heun averages the velocities before and after an Euler step, except in the
            step to sigma 0: two passes where euler takes one.
        start: index of the first step.

    Yields:
        Steps start to T - 1. Gradients are recorded if the caller records them.

    Raises:
        ValueError: if the rows of the noise are not a multiple of those of the latents.
    """
    for index in range(start, len(sigmas) - 1):
        v = velocity(latents, sigmas[index].expand(len(latents)), conditioning)
        drawn = noise(index)
        if drawn is not None and (groups := len(drawn) // len(latents)) > 1:
            latents, v = (x.repeat_interleave(groups, dim=0) for x in (latents, v))
            conditioning = repeat(conditioning, groups)
        sigma, sigma_next = (sigmas[i].expand(len(latents)) for i in (index, index + 1))
        if drawn is None:
            gaussian = sde.ode_step(latents, v, sigma, sigma_next)
            if solver == "heun" and index + 2 < len(sigmas):
                ahead = velocity(gaussian.mean, sigma_next, conditioning)
                gaussian = sde.ode_step(latents, (v + ahead) / 2, sigma, sigma_next)
            next_latents = gaussian.mean
        else:
            gaussian = dynamics(latents, v, sigma, sigma_next)
            next_latents = sde.sample(gaussian, noise=drawn)
        yield Step(index, latents, v, sigma, gaussian, next_latents, conditioning)
        latents = next_latents


def last(steps: Iterable[Step]) -> Step:
    """Run a trajectory and keep only its last step."""
    return deque(steps, maxlen=1).pop()
