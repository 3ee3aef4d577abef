"""Sigma schedules, and which steps of a trajectory are stochastic and trained. Pure.

Notation: T inference steps, S trained steps. Step i goes from sigmas[i] to sigmas[i + 1]; sigma is the share of noise.

A plan is `(iteration, num_inference_steps, *, generator, **settings) -> StepPlan`. The same arguments and generator
state give the same plan, so a run can be resumed at any iteration. No plan is ever empty, and the last step is left
out unless asked for: it ends at sigma 0, where its noise would stay in the image.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["all_steps", "random_fraction", "sliding_window"]
"""What a configuration can name as `rollout.steps`."""


def shifted_sigmas(num_inference_steps: int, shift: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """sigma = shift t / (1 + (shift - 1) t) for t from 1 to 0: shape (T + 1,), from 1 down to 0.

    A larger shift spends more steps at high noise; 1 is linear, 3 the paper's recipe.

    Raises:
        ValueError: for no step, or a shift that is not above 0.

    Source: SD3 (arXiv 2403.03206) eq. 23; Customized-GRPO, train_customized_grpo.py:164-165.
    """
    if num_inference_steps < 1 or shift <= 0:
        raise ValueError(f"expected at least 1 step and a shift > 0, got {num_inference_steps} steps, shift {shift}.")
    t = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
    return (shift * t / (1 + (shift - 1) * t)).to(dtype)


def resolution_shift(
    num_tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_mu: float = 0.5,
    max_mu: float = 1.15,
) -> float:
    """FLUX's shift for an image of `num_tokens` latent tokens: exp(mu), mu linear in the number of tokens.

    exp(mu) / (exp(mu) + 1/t - 1) is `shifted_sigmas` with shift = exp(mu), so both schedules are one formula.

    Source: FLUX, flux/sampling.py, time_shift and get_schedule.
    """
    mu = base_mu + (max_mu - base_mu) * (num_tokens - base_tokens) / (max_tokens - base_tokens)
    return math.exp(mu)


class StepPlan(NamedTuple):
    """Which true step indices of one iteration do what; both int64 and ascending."""

    stochastic: Tensor
    """Steps sampled as SDE; every other step is deterministic."""
    trained: Tensor
    """(S,) the stochastic steps that enter the loss."""


def all_steps(
    iteration: int, num_inference_steps: int, *, generator: torch.Generator | None = None, include_last: bool = False
) -> StepPlan:
    """Every step is stochastic and trained. Source: Flow-GRPO."""
    steps = torch.arange(_stop(num_inference_steps, include_last))
    return StepPlan(steps, steps)


def random_fraction(
    iteration: int,
    num_inference_steps: int,
    *,
    generator: torch.Generator | None = None,
    fraction: float = 0.6,
    include_last: bool = False,
) -> StepPlan:
    """Every step is stochastic; a random `fraction` (rounded down, at least one) is trained. Source: DanceGRPO."""
    if not 0 < fraction <= 1:
        raise ValueError(f"expected 0 < fraction <= 1, got {fraction}.")
    steps = torch.arange(_stop(num_inference_steps, include_last))
    count = max(1, int(len(steps) * fraction))
    chosen = torch.randperm(len(steps), generator=_required(generator, "random_fraction"))[:count]
    return StepPlan(steps, chosen.sort().values)


def sliding_window(
    iteration: int,
    num_inference_steps: int,
    *,
    generator: torch.Generator | None = None,
    size: int = 4,
    stride: int = 1,
    iterations_per_window: int = 25,
    strategy: Literal["progressive", "random", "decay", "exp_decay"] = "progressive",
    first: int = 0,
    stop: int | None = None,
    roll_back: bool = True,
    partial: bool = False,
    min_iterations: int | None = None,
    decay_from: int = 13,
    decay_rate: float = 0.1,
    include_last: bool = False,
) -> StepPlan:
    """Only a window of consecutive steps is stochastic and trained; the window moves towards the image.

    Args:
        iteration: 0-based.
        num_inference_steps: T.
        generator: needed by `random`.
        size: steps in the window.
        stride: steps the window moves at a time; `size` for windows that do not overlap, 0 to stand still.
        iterations_per_window: iterations spent in one place.
        strategy: `progressive` moves steadily; `random` draws a new place each iteration; `decay` and `exp_decay` move
            faster towards the image, linearly down to `min_iterations` (default a quarter) or as
            exp(-decay_rate * (place - decay_from)).
        first, stop: the steps that take part, `stop` excluded; all by default.
        roll_back: start again at the end; otherwise stay there.
        partial: let the window shrink at the end (MixGRPO) instead of ending with the last whole one (Customized-GRPO).

    Raises:
        ValueError: if no window fits, or `random` has no generator.

    Source: MixGRPO (arXiv 2507.21802), grpo_states.py. Where the published class runs past the end and trains nothing,
    the last window stays.
    """
    limit = _stop(num_inference_steps, include_last)
    stop = limit if stop is None else min(stop, limit)
    if size < 1 or first < 0 or first >= stop or (not partial and first + size > stop):
        raise ValueError(f"a window of {size} steps does not fit in steps {first} to {stop - 1}; lower its size.")
    if strategy == "random":
        places = max(1, stop - size + 1 - first)
        place = first + int(torch.randint(places, (), generator=_required(generator, "a random window")))
    elif strategy in ("progressive", "decay", "exp_decay"):
        place = first
        current, spent = first, 0
        for _ in range(iteration):
            spent += 1
            if spent >= _stay(current, stop, strategy, iterations_per_window, min_iterations, decay_from, decay_rate):
                current, spent = current + stride, 0
            if current > stop if partial else current + size > stop:
                current, spent = (first, 0) if roll_back else (stop, spent)
            if current < stop:
                place = current
    else:
        raise ValueError(f"expected strategy progressive, random, decay or exp_decay, got {strategy!r}.")
    window = torch.arange(place, min(place + size, stop))
    return StepPlan(window, window)


def _stay(
    place: int, stop: int, strategy: str, longest: int, shortest: int | None, decay_from: int, decay_rate: float
) -> int:
    """Iterations the window spends at `place`."""
    if strategy == "decay":
        shortest = max(1, longest // 4) if shortest is None else shortest
        return max(shortest, int(longest * (1 - place / stop) + shortest * (place / stop)))
    if strategy == "exp_decay":
        return math.ceil(longest * math.exp(-decay_rate * max(0, place - decay_from)))
    return longest


def _stop(num_inference_steps: int, include_last: bool) -> int:
    stop = num_inference_steps if include_last else num_inference_steps - 1
    if stop < 1:
        raise ValueError(
            f"no step is left to train in {num_inference_steps} inference steps; raise num_inference_steps."
        )
    return stop


def _required(generator: torch.Generator | None, who: str) -> torch.Generator:
    if generator is None:
        raise ValueError(f"{who} draws steps, so it needs a generator, got None.")
    return generator
