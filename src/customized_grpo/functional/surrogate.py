"""The policy-gradient loss and what keeps it near the old and the base policy. Pure.

Shapes: (...) is any shape shared by the arguments, in training (rows,) of one micro-batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from customized_grpo.functional.sde import Gaussian


class Surrogate(NamedTuple):
    """`losses` has the shape of the advantages and carries the gradient; `clip_share` is a scalar for the log."""

    losses: Tensor
    clip_share: Tensor
    """Share of elements whose gradient the clip stops."""


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Surrogate:
    """max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) for each element, ratio = exp(log_ratio).

    Args:
        log_ratio: shape (...), new minus old log-probability, or `normalized_log_ratio`.
        advantages: shape (...), clamped by `advantages.advantages`.
        clip_range: c; ratios of mean log-densities move little, so 1e-4 in the paper's recipe.

    Raises:
        ValueError: if the shapes differ.

    Source: PPO (arXiv 1707.06347) eq. 7; Customized-GRPO, train_customized_grpo.py:815-829.
    """
    if log_ratio.shape != advantages.shape:
        raise ValueError(
            "expected log-ratios and advantages of one shape, "
            f"got {tuple(log_ratio.shape)} and {tuple(advantages.shape)}."
        )
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    with torch.no_grad():
        stopped = (ratio - clipped) * advantages > 0
        return Surrogate(losses, stopped.to(ratio).mean())


def masked_surrogate(
    log_ratio: Tensor, advantages: Tensor, divergence: Tensor, *, threshold: float = 1e-5
) -> Surrogate:
    """Flow-DPPO: -A ratio, but 0 where the step has already moved too far in the direction that A asks for.

        ratio = exp(log_ratio)
        drop  = divergence >= threshold and (ratio > 1 and A > 0, or ratio < 1 and A < 0)

    Neither ratio nor A is clipped. A step that moved too far can still move back. Rows that are dropped stay in the
    mean, and in `clip_share`.

    Args:
        log_ratio: shape (...), new minus old log-probability, not normalized.
        advantages: shape (...).
        divergence: shape (...), `gaussian_kl` of the step from the old policy's; no gradient goes through it.
        threshold: nats per latent element, because `gaussian_kl` is a mean over elements; the paper's sum is larger by
            their number.

    Raises:
        ValueError: if the shapes differ.

    Source: Flow-DPPO (arXiv 2606.11025), UniRL, unirl/algorithms/flowdppo.py. Its divergence has a standard deviation
    of its own, sigma limited to 0.99. `gaussian_kl` has the one with which the step was sampled, `sigma_max` included;
    the two differ for sigma between 0.99 and 1, where the published one is larger, twice as large at 0.995.
    """
    if not log_ratio.shape == advantages.shape == divergence.shape:
        raise ValueError(
            "expected log-ratios, advantages and divergences of one shape, "
            f"got {tuple(log_ratio.shape)}, {tuple(advantages.shape)} and {tuple(divergence.shape)}."
        )
    with torch.no_grad():
        ratio = log_ratio.exp()
        drop = (divergence >= threshold) & ((ratio > 1) & (advantages > 0) | (ratio < 1) & (advantages < 0))
    # exp(-inf), so that a dropped ratio that overflows leaves no NaN in the gradient.
    losses = -advantages * log_ratio.masked_fill(drop, -torch.inf).exp()
    return Surrogate(losses, drop.to(losses).mean())


def approx_kl(log_ratio: Tensor) -> Tensor:
    """KL(old || new) estimated as mean(ratio - 1 - log ratio): a scalar, nats per latent element, never negative.

    Args:
        log_ratio: shape (...), new minus old log-probability, not normalized.

    Source: "Approximating KL Divergence", J. Schulman, http://joschu.net/blog/kl-approx.html (k3).
    """
    return (log_ratio.expm1() - log_ratio).mean()


def gaussian_kl(step: Gaussian, base: Gaussian) -> Tensor:
    """KL divergence of the policy's step from the base policy's, averaged over latent elements: shape (B,), nats.

    ||mean - mean_base||^2 / (2 std^2): both steps have the same std, because the dynamics alone set it. Means are
    (B, N, C); the std must not be 0.

    Source: Flow-GRPO (arXiv 2505.05470).
    """
    return ((step.mean - base.mean) ** 2 / (2 * step.std**2)).flatten(1).mean(1)


def normalized_log_ratio(log_ratio: Tensor, step: Gaussian, old: Gaussian) -> Tensor:
    """GRPO-Guard's RatioNorm: the log-ratio without its negative bias and with one scale at all steps. Shape (B,).

    With x = mean_old + std e and d = mean - mean_old, the log-ratio is <e, d> / std - ||d||^2 / (2 std^2): its mean is
    below 0, so positive advantages hardly reach the clip, and its spread follows 1 / std. Adding the square and
    multiplying by std leaves <e, d>.

    Args:
        log_ratio: shape (B,), new minus old log-probability per latent element.
        step, old: the step's Gaussian under the new policy and under the policy that sampled.

    Source: GRPO-Guard (arXiv 2510.22319) eq. 8. Its gradient reweighting is separate: divide the loss by
    sigma - sigma_next.
    """
    return (log_ratio + gaussian_kl(step, old)) * step.std.flatten()
