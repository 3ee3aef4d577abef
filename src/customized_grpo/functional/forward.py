"""Reinforcement learning on the forward process: sampled images are noised again, and no sampling step is needed. Pure.

Notation: B rows, N latent tokens, C channels, S levels. sigma is the share of noise: 1 is noise, 0 is image. x0 is a
sampled image and eps standard normal noise; x = (1 - sigma) x0 + sigma eps. v is a velocity, which at the optimum is
eps - x0, so that x - sigma v is the image it predicts. x0, eps, x and every v are (B, N, C), sigma is (B,), A (B,) the
advantages of the rows, and <.> the mean over the N*C elements of a row.

Half precision is raised to float32 before anything is subtracted. Means that end in a denominator or under a root are
taken in float64, where the device has it.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from customized_grpo.functional.surrogate import Surrogate, clipped_surrogate


class NftLoss(NamedTuple):
    """Each of shape (B,). The mean of `losses` is the policy loss; only `losses` carries a gradient."""

    losses: Tensor
    positive: Tensor
    """L+, of the mixture towards the new velocity."""
    negative: Tensor
    """L-, of the mixture away from it."""


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    latents: Tensor,
    x0: Tensor,
    sigma: Tensor,
    advantages: Tensor,
    *,
    mix: float = 1.0,
    advantage_clip: float = 1.25,
) -> NftLoss:
    """DiffusionNFT: good images pull the velocity towards themselves, bad ones push it away.

        r    = clip(A, -c, c) / (2 c) + 1/2
        v+   = (1 - mix) v_old + mix v             v- = (1 + mix) v_old - mix v
        L+-  = <(x - sigma v+- - x0)^2> / w+-      w+- = max(<|x - sigma v+- - x0|>, 1e-5), without gradient
        loss = c (r L+ + (1 - r) L-) / mix

    At v = v_old the gradient is that of clip(A, -c, c) L: neither c nor mix scales it, c only bounds it. That takes
    both factors, c and 1 / mix, which act as well where gradients are clipped or a KL divergence is added.

    Args:
        velocity: v, of the policy in training.
        old_velocity: v_old, of the policy that sampled; no gradient goes through it.
        latents: x, from `add_noise`.
        x0, sigma, advantages: see the module.
        mix: the paper's beta, above 0; the released 1, or 0.1 for several rewards.
        advantage_clip: c, in the units of the advantages. The released 5 is for standard scores of one reward; 1.25 is
            ours, for weights that sum to 1.

    Raises:
        ValueError: if a shape does not fit, or mix or advantage_clip is not above 0.

    Source: DiffusionNFT (arXiv 2509.16117), train_nft_sd3.py:908-980. The paper has neither w nor the two factors.
    """
    check_rows((velocity, old_velocity, latents, x0), (sigma, advantages))
    if mix <= 0:
        raise ValueError(f"expected mix > 0, got {mix}.")
    v, v_old, x, x0 = (_at_least_float32(t) for t in (velocity, old_velocity.detach(), latents, x0))
    r = optimality(advantages, advantage_clip).to(x0)
    positive = _scaled_error(x, (1 - mix) * v_old + mix * v, x0, sigma)
    negative = _scaled_error(x, (1 + mix) * v_old - mix * v, x0, sigma)
    losses = advantage_clip * (r * positive + (1 - r) * negative) / mix
    return NftLoss(losses, positive.detach(), negative.detach())


def _scaled_error(x: Tensor, v: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """<(x - sigma v - x0)^2> / max(<|x - sigma v - x0|>, 1e-5), the denominator without gradient. Shape (B,)."""
    residual = x - _column(sigma, x) * v - x0
    size = _wide(residual.detach()).abs().mean(dim=(1, 2)).clamp(min=1e-5)
    return (residual**2).mean(dim=(1, 2)) / size.to(residual)


def optimality(advantages: Tensor, advantage_clip: float = 1.25) -> Tensor:
    """r = clip(A, -c, c) / (2 c) + 1/2, in [0, 1]: how far an image counts as a good one. Any shape to the same."""
    return unit_advantages(advantages, advantage_clip) / 2 + 0.5


def unit_advantages(advantages: Tensor, advantage_clip: float = 1.25) -> Tensor:
    """clip(A, -c, c) / c, in [-1, 1]. Any shape to the same.

    Raises:
        ValueError: if c is not above 0.
    """
    if advantage_clip <= 0:
        raise ValueError(f"expected advantage_clip > 0, got {advantage_clip}.")
    return advantages.clamp(-advantage_clip, advantage_clip) / advantage_clip


def select_advantages(
    advantages: Tensor, which: Literal["all", "positive_only", "negative_only", "one_only", "binary"]
) -> Tensor:
    """max(A, 0), min(A, 0), 1 where A > 0 else 0, or the sign of A; "all" is A. Any shape to the same.

    With c above 1 the last two use a part of the range of r only: with c = 5, r is 0.4, 0.5 or 0.6.

    Source: DiffusionNFT, train_nft_sd3.py, adv_mode.
    """
    if which == "all":
        return advantages
    if which == "positive_only":
        return advantages.clamp(min=0)
    if which == "negative_only":
        return advantages.clamp(max=0)
    if which == "one_only":
        return (advantages > 0).to(advantages)
    if which == "binary":
        return advantages.sign()
    raise ValueError(f"expected all, positive_only, negative_only, one_only or binary, got {which!r}.")


def awm_log_prob(
    velocity: Tensor,
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    *,
    weighting: Literal["uniform", "sigma", "sigma_squared", "huber", "ghuber"] = "ghuber",
    power: float = 0.25,
) -> Tensor:
    """Advantage-weighted matching: minus the matching error, which stands in for a log-probability. Shape (B,).

        m = <(v - (eps - x0))^2>                e = 1e-10
        uniform: -m        sigma: -sigma m      sigma_squared: -sigma^2 m
        huber:   -sigma (sqrt(m + e) - sqrt(e))
        ghuber:  -sigma ((m + e)^power - e^power) / power

    A mean over elements and no normalized density, so its ratios are no ratios of probabilities. 0 at sigma 0, except
    for `uniform`. The same levels and noise serve the old and the new policy.

    Raises:
        ValueError: if a shape does not fit, or for another weighting.

    Source: AWM (arXiv 2509.25050), train_sd3_awm.py:210-252.
    """
    check_rows((velocity, x0, noise), (sigma,))
    v, x0, eps = (_at_least_float32(t) for t in (velocity, x0, noise))
    m, s, e = _wide(v - (eps - x0)).square().mean(dim=(1, 2)), _wide(sigma), 1e-10
    if weighting == "uniform":
        log_prob = -m
    elif weighting == "sigma":
        log_prob = -s * m
    elif weighting == "sigma_squared":
        log_prob = -(s**2) * m
    elif weighting == "huber":
        log_prob = -s * ((m + e).sqrt() - e**0.5)
    elif weighting == "ghuber":
        log_prob = -s * ((m + e) ** power - e**power) / power
    else:
        raise ValueError(f"expected uniform, sigma, sigma_squared, huber or ghuber, got {weighting!r}.")
    return log_prob.to(x0)


def awm_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    advantage_clip: float = 1.25,
    clip_range: float = 1.0,
) -> Surrogate:
    """The clipped surrogate of `awm_log_prob`, with advantages in [-1, 1].

        ratio = exp(log p - log p_old)       A' = clip(A, -c, c) / c
        loss  = max(-A' ratio, -A' clip(ratio, 1 - clip_range, 1 + clip_range))

    With log p_old = log p, detached, the gradient is -A' times that of log p: the published first update. The release
    adds 1 times `velocity_kl` from a moving average of the weights, and a small multiple of that from the base policy.

    Args:
        log_prob, old_log_prob: shape (B,), or their means over levels, (rows,), for one ratio per image ("sum_first").
            No gradient goes through the old one.
        advantages: shape of the log-probabilities.
        advantage_clip: c; the released 5. Without the division by c an advantage of 1 weighs c times as much against
            the KL divergences.
        clip_range: 1 leaves ratios in [0, 2].

    Source: AWM (arXiv 2509.25050), train_sd3_awm.py:1282-1354.
    """
    return clipped_surrogate(log_prob - old_log_prob.detach(), unit_advantages(advantages, advantage_clip), clip_range)


def velocity_kl(velocity: Tensor, other: Tensor) -> Tensor:
    """<(v - v_other)^2>, shape (B,): what stands in for a KL divergence from the base or the averaged policy.

    No gradient goes through `other`. It is unweighted; multiply by `elbo_weight` for the divergence of a sampling step.

    Source: DiffusionNFT, train_nft_sd3.py, and AWM, train_sd3_awm.py, "Uniform".
    """
    check_rows((velocity, other), ())
    return (_at_least_float32(velocity) - _at_least_float32(other.detach())).square().mean(dim=(1, 2))


def norm_ratio(velocity: Tensor, base: Tensor) -> Tensor:
    """|v| / |v_base| of each row, shape (B,). No gradient goes through `base`.

    Its excess over 1 is the hinge of NormGuard (arXiv 2606.27771), by the abstract; its weighting was not compared.
    """
    check_rows((velocity, base), ())
    norms = [_at_least_float32(v).square().mean(dim=(1, 2)).sqrt() for v in (velocity, base.detach())]
    return norms[0] / norms[1]


def elbo_weight(sigma: Tensor, noise_level: float = 0.7) -> Tensor:
    """1 / (2 s^2) with s = noise_level sqrt(sigma / (1 - min(sigma, 0.99))), shape (B,) to (B,). sigma must not be 0.

    s is the noise of `sde.flow_sde` for a unit of time. Source: AWM, train_sd3_awm.py, "ELBO".
    """
    return (1 - sigma.clamp(max=0.99)) / (2 * noise_level**2 * sigma)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x = (1 - sigma) x0 + sigma eps, shape (B, N, C), float32 at least.

    Raises:
        ValueError: if a shape does not fit.
    """
    check_rows((x0, noise), (sigma,))
    x0, noise = _at_least_float32(x0), _at_least_float32(noise)
    sigma = _column(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def draw_levels(
    count: int,
    num_inference_steps: int,
    *,
    generator: torch.Generator,
    window: tuple[float, float] = (0.0, 1.0),
    continuous: bool = False,
) -> Tensor:
    """Levels to train at, as progress: (S,) float64, ascending, 0 at noise; never 1, where sigma is 0.

    Drawn once per iteration for all rows: time weights and advantages then have one row per level. Progress, and not
    sigma, because images of different sizes have different schedules; see `level_sigmas`. Keep it in float64: float32
    may round the last level to 1.

    Args:
        count: S.
        num_inference_steps: T, of the grid.
        generator: keyed by the seed and the iteration.
        window: first progress, and the progress before which the last level lies.
        continuous: draw one level uniformly from each of S equal parts of the window. Otherwise draw S of the points
            0, 1/T ... (T - 1)/T that lie in the window, without replacement.

    Raises:
        ValueError: if the window is none, or fewer than S points lie in it.
    """
    first, stop = window
    if not 0 <= first < stop <= 1:
        raise ValueError(f"expected a window with 0 <= first < stop <= 1, got {first} to {stop}.")
    if count < 1:
        raise ValueError(f"expected at least 1 level, got {count}.")
    if continuous:
        # Drawn in float32: adding in float64 then cannot round up to `stop`.
        place = torch.rand(count, generator=generator, dtype=torch.float32).double()
        return first + (stop - first) * (torch.arange(count) + place) / count
    grid = torch.arange(num_inference_steps, dtype=torch.float64) / num_inference_steps
    inside = grid[(grid >= first) & (grid < stop)]
    if count > len(inside):
        raise ValueError(
            f"{len(inside)} of {num_inference_steps} steps lie in the window from {first} to {stop}, too few for "
            f"{count} levels; lower their number, widen the window, or draw continuous levels."
        )
    return inside[torch.randperm(len(inside), generator=generator)[:count]].sort().values


def level_sigmas(progress: Tensor, sigmas: Tensor) -> Tensor:
    """The schedule at any progress: straight lines between its points, exactly sigmas[i] at i / T. (S,) to (S,).

    Args:
        progress: shape (S,), in [0, 1].
        sigmas: shape (T + 1,), the schedule of these rows.
    """
    num_steps = len(sigmas) - 1
    position = progress * num_steps
    rounding = 4 * num_steps * torch.finfo(progress.dtype).eps
    position = torch.where((position - position.round()).abs() <= rounding, position.round(), position)
    left = position.long().clamp(0, num_steps - 1)
    points, share = _wide(sigmas), _wide(position - left).to(sigmas.device)
    return ((1 - share) * points[left] + share * points[left + 1]).to(sigmas)


def old_policy_decay(updates: int, *, rate: float | None = None, top: float = 0.3, start: int = 0) -> float:
    """d of v_old <- d v_old + (1 - d) v, once per iteration: `top`, or min(rate * max(s - start, 0), top) with a rate.

    Args:
        updates: s, optimizer steps so far. The repositories count differently: UniRL as here, verl-omni iterations,
            Flow-Factory epochs from 0.
        rate: per optimizer step; None for a constant d.
        top: the largest d; 0 copies the policy.
        start: optimizer steps before which d is 0.

    Source: DiffusionNFT, train_nft_sd3.py:169-189: decay_type 0 is top=0, 1 is rate=0.001, top=0.5, and 2 is
    rate=0.0075, top=0.999, start=75. AWM, train_sd3_awm.py:1410-1419: rate=0.001, top=0.3, or the constant 0.3.
    """
    return top if rate is None else min(rate * max(updates - start, 0), top)


def check_rows(latents: tuple[Tensor, ...], per_row: tuple[Tensor, ...]) -> None:
    """Raise ValueError unless all `latents` have one shape (B, N, C) and all of `per_row` have shape (B,)."""
    shapes, rows = [tuple(t.shape) for t in latents], [tuple(t.shape) for t in per_row]
    if len(shapes[0]) != 3 or set(shapes) != {shapes[0]} or any(row != shapes[0][:1] for row in rows):
        raise ValueError(f"expected latents of one shape (B, N, C) and one number per row (B,), got {shapes + rows}.")


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _wide(x: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return x.float() if x.device.type == "mps" else x.double()


def _column(per_row: Tensor, like: Tensor) -> Tensor:
    return per_row.to(like).view(-1, 1, 1)
