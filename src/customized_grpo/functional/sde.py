"""One denoising step as a Gaussian. Pure.

Notation: B samples, N latent tokens, C channels. sigma is the share of noise: 1 is noise, 0 is image.

`dance_sde`, `flow_sde`, `cps` and `ode_step` are dynamics: `(latents, velocity, sigma, sigma_next) -> Gaussian`.
Your own may replace them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["cps", "dance_sde", "flow_sde"]
"""What a configuration can name as `rollout.dynamics`."""


class Gaussian(NamedTuple):
    """A diagonal normal over the next latents. mean: (B, N, C); std: (B, 1, 1), 0 for a deterministic step."""

    mean: Tensor
    std: Tensor


def sde_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, diffusion: Tensor) -> Gaussian:
    """Euler-Maruyama step of the reverse SDE with the marginals of the flow ODE.

    Args:
        latents, velocity: shape (B, N, C); latents in float32 or float64.
        sigma, sigma_next, diffusion: shape (B,); diffusion is the coefficient g(sigma) of dw.

    Returns:
        Gaussian with std = diffusion * sqrt(sigma - sigma_next).

    Raises:
        ValueError: if a shape does not fit, or the latents are in half precision.

    Source: Flow-GRPO eq. 9 and DanceGRPO eq. 8: the same step, they differ in g only.
    """
    sigma, sigma_next, g = _columns(latents, velocity, sigma, sigma_next, diffusion)
    dt = sigma_next - sigma
    score_drift = g**2 / (2 * sigma) * (latents + (1 - sigma) * velocity)
    return Gaussian(latents + (velocity + score_drift) * dt, g * (-dt).sqrt())


def cps_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float) -> Gaussian:
    """Coefficients-preserving step: the next latents hold exactly 1 - sigma' of image and sigma' of noise.

    Args:
        latents, velocity: shape (B, N, C); latents in float32 or float64.
        sigma, sigma_next: shape (B,).
        noise_level: 0 to 1, the share (as sin^2) of the next noise that is drawn afresh; 0 is the ODE.

    Returns:
        Gaussian with std = sigma_next * sin(noise_level * pi / 2): 0 in the step that ends at sigma 0.

    Raises:
        ValueError: as `sde_step`.

    Source: Flow-CPS (arXiv 2509.05952).
    """
    sigma, sigma_next = _columns(latents, velocity, sigma, sigma_next)
    image = latents - sigma * velocity
    noise = latents + (1 - sigma) * velocity
    fresh, kept = math.sin(noise_level * math.pi / 2), math.cos(noise_level * math.pi / 2)
    return Gaussian((1 - sigma_next) * image + sigma_next * kept * noise, sigma_next * fresh)


def ode_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Gaussian:
    """Deterministic Euler step of the flow: std is 0, so it can be sampled but has no log-probability.

    Shapes and errors as in `cps_step`.
    """
    sigma, sigma_next = _columns(latents, velocity, sigma, sigma_next)
    return Gaussian(latents + (sigma_next - sigma) * velocity, torch.zeros_like(sigma))


def flow_grpo_diffusion(sigma: Tensor, noise_level: float, sigma_max: float | Tensor) -> Tensor:
    """g = noise_level * sqrt(sigma / (1 - s)), s = sigma but sigma_max where sigma is 1. Shape (B,) to (B,)."""
    s = torch.where(sigma == 1, sigma_max, sigma)
    return noise_level * (sigma / (1 - s)).sqrt()


def dance_grpo_diffusion(sigma: Tensor, noise_level: float) -> Tensor:
    """g = noise_level. Shape (B,) to (B,)."""
    return torch.full_like(sigma, noise_level)


def dance_sde(
    latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, *, noise_level: float = 0.4
) -> Gaussian:
    """Dynamics of DanceGRPO (arXiv 2505.07818) and Customized-GRPO: `sde_step` with g = noise_level, their eta."""
    return sde_step(latents, velocity, sigma, sigma_next, dance_grpo_diffusion(sigma, noise_level))


def flow_sde(
    latents: Tensor,
    velocity: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    noise_level: float = 0.7,
    sigma_max: float | None = None,
) -> Gaussian:
    """Dynamics of Flow-GRPO (arXiv 2505.05470): `sde_step` with g = noise_level * sqrt(sigma / (1 - sigma)).

    At sigma 1, where g is infinite, `sigma_max` stands in; by default sigma_next, which there is the published choice,
    the second value of the schedule.
    """
    g = flow_grpo_diffusion(sigma, noise_level, sigma_next if sigma_max is None else sigma_max)
    return sde_step(latents, velocity, sigma, sigma_next, g)


def cps(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, *, noise_level: float = 0.7) -> Gaussian:
    """Dynamics of Flow-CPS (arXiv 2509.05952): `cps_step`, with its shapes."""
    return cps_step(latents, velocity, sigma, sigma_next, noise_level)


def sample(step: Gaussian, generator: torch.Generator | None = None, *, noise: Tensor | None = None) -> Tensor:
    """Draw next latents, shape (B, N, C).

    Args:
        step: the Gaussian.
        generator: draws the noise, unless it is given ready-made.
        noise: standard normal, shape (B, N, C); for noise that is keyed per row.

    Raises:
        ValueError: if there is neither generator nor noise, or the noise has another shape.
    """
    if noise is None:
        if generator is None:
            raise ValueError("sample needs a generator or ready-made noise, got neither.")
        noise = torch.randn(step.mean.shape, generator=generator, device=step.mean.device, dtype=step.mean.dtype)
    elif noise.shape != step.mean.shape:
        raise ValueError(f"expected noise of shape {tuple(step.mean.shape)}, got {tuple(noise.shape)}.")
    return step.mean + step.std * noise


def log_prob(step: Gaussian, next_latents: Tensor) -> Tensor:
    """Log-density of `next_latents`, averaged over latent dimensions: shape (B,), nats per dimension.

    The average, not the sum, is what the field clips: ratio = exp(difference) is the geometric mean of N*C ratios.

    Raises:
        ValueError: if a step is deterministic (std 0), because it has no density.
    """
    if next_latents.shape != step.mean.shape:
        raise ValueError(f"expected next latents of shape {tuple(step.mean.shape)}, got {tuple(next_latents.shape)}.")
    if not bool((step.std > 0).all()):
        raise ValueError("log_prob needs std > 0, got a deterministic step; train only steps that were sampled as SDE.")
    return log_density(step, next_latents)


def log_density(step: Gaussian, next_latents: Tensor) -> Tensor:
    """`log_prob` of a step that is known to be stochastic: a look at its std would wait for a GPU."""
    z = (next_latents.detach() - step.mean) / step.std
    return (-0.5 * z**2 - step.std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def _columns(latents: Tensor, velocity: Tensor, *per_sample: Tensor) -> tuple[Tensor, ...]:
    """Check the shapes of a step and give every (B,) argument as (B, 1, 1)."""
    if latents.ndim != 3 or velocity.shape != latents.shape:
        raise ValueError(
            "expected latents and velocity of one shape (B, N, C), "
            f"got {tuple(latents.shape)} and {tuple(velocity.shape)}."
        )
    if latents.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a step needs float32 latents, got {latents.dtype}; call latents.float().")
    for a in per_sample:
        if a.shape != latents.shape[:1]:
            raise ValueError(f"expected one sigma per sample, shape ({len(latents)},), got {tuple(a.shape)}.")
    return tuple(a.view(-1, 1, 1) for a in per_sample)
