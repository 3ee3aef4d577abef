"""Reward weights along the denoising trajectory. progress is 0 at pure noise, 1 at the image.

A schedule is `(progress (S,), **settings) -> (S, K)`: S trained steps in their true order, K rewards. With two rewards
the columns are prompt, identity.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["by_loop_index", "constant", "cosine", "linear", "piecewise", "reversed_", "sigmoid_crossover", "tabulated"]
"""What a configuration can name as `method.time_weights`."""

Schedule = Callable[..., Tensor]


def constant(progress: Tensor, *, weights: Sequence[float]) -> Tensor:
    """The same row at every step. (S,) to (S, K)."""
    return _row(weights, progress).expand(len(progress), -1)


def sigmoid_crossover(
    progress: Tensor,
    *,
    high: float = 0.7,
    low: float = 0.3,
    final: float = 0.5,
    start: float = 6 / 25,
    centre: float = 10 / 25,
    end: float = 22 / 25,
    slope: float = 20.0,
) -> Tensor:
    """Paper TDW: prompt reward first, then subject reward, equal at the end. (S,) to (S, 2), rows sum to 1.

    Args:
        progress: shape (S,).
        high, low, final: weight of the prompt before `start`, after the crossover, and from `end` on.
        start, centre, end: progress, in the paper's 25 steps 6, 10 and 22.
        slope: of the sigmoid, per unit of progress; the paper's 0.8 per step.

    Source: Customized-GRPO, train_customized_grpo.py:60-109.
    """
    falling = low + (high - low) * torch.sigmoid(-slope * (progress - centre))
    prompt = torch.where(progress < start, high, torch.where(progress >= end, final, falling))
    return torch.stack([prompt, 1 - prompt], dim=-1)


def linear(progress: Tensor, *, first: Sequence[float] = (0.7, 0.3), last: Sequence[float] = (0.3, 0.7)) -> Tensor:
    """From the row `first` at pure noise to the row `last` at the image, in a straight line. (S,) to (S, K)."""
    return _row(first, progress).lerp(_row(last, progress), progress.unsqueeze(-1))


def cosine(progress: Tensor, *, first: Sequence[float] = (0.7, 0.3), last: Sequence[float] = (0.3, 0.7)) -> Tensor:
    """As `linear`, but along half a cosine: flat at both ends. (S,) to (S, K)."""
    return linear((1 - torch.cos(math.pi * progress)) / 2, first=first, last=last)


def piecewise(
    progress: Tensor,
    *,
    boundaries: Sequence[float] = (6 / 25, 22 / 25),
    weights: Sequence[Sequence[float]] = ((0.7, 0.3), (0.3, 0.7), (0.5, 0.5)),
) -> Tensor:
    """One row between any two boundaries; a step on a boundary takes the row after it. (S,) to (S, K)."""
    if len(weights) != len(boundaries) + 1:
        raise ValueError(
            f"{len(boundaries)} boundaries part {len(boundaries) + 1} rows of weights, got {len(weights)}."
        )
    rows = torch.stack([_row(row, progress) for row in weights])
    return rows[torch.bucketize(progress, _row(boundaries, progress), right=True)]


def tabulated(progress: Tensor, *, grid: Sequence[float], weights: Sequence[Sequence[float]]) -> Tensor:
    """Straight lines through the given rows, constant beyond the ends: for measured schedules. (S,) to (S, K).

    Args:
        progress: shape (S,).
        grid: ascending progress of each row.
        weights: one row of K weights per grid point.
    """
    if len(grid) != len(weights) or len(grid) < 1 or any(b <= a for a, b in itertools.pairwise(grid)):
        raise ValueError(
            f"expected an ascending grid and a row of weights per point, got {len(grid)} and {len(weights)}."
        )
    points, rows = _row(grid, progress), torch.stack([_row(row, progress) for row in weights])
    if len(grid) == 1:
        return rows.expand(len(progress), -1)
    left = torch.bucketize(progress, points, right=True).clamp(1, len(grid) - 1) - 1
    share = ((progress - points[left]) / (points[left + 1] - points[left])).clamp(0, 1)
    return rows[left].lerp(rows[left + 1], share.unsqueeze(-1))


def reversed_(progress: Tensor, *, schedule: Schedule = sigmoid_crossover, **settings: Any) -> Tensor:
    """Any schedule mirrored in time, so that identity comes early: the control for `prompt first`. (S,) to (S, K).

    Mirroring, unlike exchanging the columns, leaves the total weight of each reward as it was.
    """
    return schedule(1 - progress, **settings)


def by_loop_index(
    progress: Tensor,
    *,
    num_inference_steps: int = 25,
    schedule: Schedule = sigmoid_crossover,
    permutation: Tensor | None = None,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Tensor:
    """The released code's look-up, for ablation: steps are shuffled, but weighted by their place in the loop.

    (S,) to (S, K). Every true step gets the same weights on average, so nothing is left of a schedule but noise.

    Args:
        progress: shape (S,).
        num_inference_steps: T, to turn a place in the loop into progress.
        schedule: what is looked up, with `settings`.
        permutation: shape (S,): row i of `progress` is trained as number permutation[i].
        generator: draws the permutation where none is given.

    Source: Customized-GRPO, train_customized_grpo.py:736-776, strategy "all".
    """
    if permutation is None:
        if generator is None:
            raise ValueError("by_loop_index needs a permutation or a generator to draw one, got neither.")
        permutation = torch.randperm(len(progress), generator=generator)
    if permutation.shape != progress.shape:
        raise ValueError(f"expected a permutation of shape {tuple(progress.shape)}, got {tuple(permutation.shape)}.")
    return schedule(permutation.to(progress) / num_inference_steps, **settings)


def fitted_weights(shares: Tensor, *, smoothing: int = 1, floor: float = 0.2) -> Tensor:
    """Time weights in proportion to the share of each reward that each step decides. Rows sum to 1.

    1. Shares are smoothed over neighbouring steps, `smoothing` times with (1/4, 1/2, 1/4), renormalized at the ends.
    2. weight[s, k] = share[s, k] / sum over rewards.
    3. No weight is below `floor`: the parts of a row above the floor are scaled so that it sums to 1 again. With two
       rewards this is a clip to [floor, 1 - floor].

    Ours: the paper sets its weights by hand.

    Args:
        shares: shape (..., S, K). They sum to 1 over the steps, so no reward counts more for its units.

    Returns:
        Shape (..., S, K).

    Raises:
        ValueError: unless 0 <= floor < 1 / K.
    """
    num_rewards, share = shares.shape[-1], shares
    if not 0 <= floor < 1 / num_rewards:
        raise ValueError(f"expected 0 <= floor < 1/{num_rewards}, got {floor}.")
    for _ in range(smoothing):
        share = _smooth(share)
    weight = share / share.sum(dim=-1, keepdim=True)
    weight = torch.where(weight.isnan(), torch.where(share.isnan(), torch.nan, 1 / num_rewards), weight)
    excess = (weight - floor).clamp(min=0)
    return floor + (1 - num_rewards * floor) * excess / excess.sum(dim=-1, keepdim=True)


def _row(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(tuple(values), dtype=like.dtype, device=like.device)


def _smooth(share: Tensor) -> Tensor:
    """(1/4, 1/2, 1/4) along the steps, divided by the weights that lie inside. (..., S, K)."""

    def blend(x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x, (0, 0, 1, 1))
        return 0.25 * x[..., :-2, :] + 0.5 * x[..., 1:-1, :] + 0.25 * x[..., 2:, :]

    return blend(share) / blend(torch.ones_like(share))
