"""From branches to shares of variance, correlations, gradient cosines, a verdict and fitted weights, with intervals.

Notation: P examples, M branches, K rewards, S probed steps, U subjects, R resamples. The claim under test is that the
first reward (prompt) is decided earlier along the trajectory than the second (identity).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.functional.advantages import group_correlation, group_variance
from customized_grpo.functional.statistics import Interval, bootstrap, gradient_cosine, interval
from customized_grpo.functional.time_weights import fitted_weights
from customized_grpo.store import plain
from customized_grpo.studies.probe.measure import Branches

RESAMPLES = 2000
FEWEST_DEFINED = 0.95
"""Share of resamples in which a cosine must exist to be reported."""

Answer = Literal["supports", "does not support", "undecided"]


@dataclass(frozen=True)
class Findings:
    """Intervals are 95 %, bootstrapped over subjects; NaN bounds where there is a single subject."""

    rewards: tuple[str, ...]
    steps: tuple[int, ...]
    num_inference_steps: int
    variance: Interval
    """(S, K) variance of each reward due to the noise of each step alone, in squared units of the reward."""
    total: Interval
    """(K,) variance with noise in all the steps together."""
    explained: Interval
    """(S, K) variance / total. Need not add up to 1: steps interact, and both numbers are estimates."""
    shares: Interval
    """(S, K) variance / sum over steps, of the mean variance: examples that vary more have more weight. Sums to 1."""
    centre: Interval
    """(K,) mean progress of each reward, weighted by its shares."""
    difference: Interval
    """() centre of the second reward minus centre of the first: positive if the first is decided earlier."""
    shares_each: Interval
    """(S, K) variance / sum over steps within each example, then averaged: every example has equal weight, as in
    training, where rewards are standardized within each group. Sums to 1."""
    centre_each: Interval
    """(K,) as `centre`, from `shares_each`."""
    difference_each: Interval
    """() as `difference`, from `shares_each`."""
    correlation: Interval
    """(S,) of the first two rewards within groups, mean over groups."""
    cosine: Interval | None
    """(S,) of the summed gradients of the first two rewards, as an optimizer step on these samples would see them."""
    cosine_across: Interval | None
    """(S,) the same from pairs of different subjects only, so that the noise they share drops out."""
    weights: Interval
    """(S, K) fitted time weights, see `fitted_weights`."""
    unscored: int
    """Images that a reward could not score."""
    images: int
    subjects: int

    @property
    def progress(self) -> list[float]:
        """Of the S probed steps: step / T."""
        return [step / self.num_inference_steps for step in self.steps]

    @property
    def verdict(self) -> "Verdict":
        """The answer that both ways of weighting the examples give; undecided if they differ."""
        by_variance = judge(self.difference, self.centre, self.rewards, 1 / self.num_inference_steps)
        equal = judge(self.difference_each, self.centre_each, self.rewards, 1 / self.num_inference_steps)
        if by_variance.answer == equal.answer:
            same = f"Weighting the examples by their variance gives the same answer {_gap(self.difference)}."
            return Verdict(equal.answer, f"{equal.sentence} {same}")
        return Verdict(
            "undecided",
            f"with equal weights for all examples the data say: {equal.answer} {_gap(self.difference_each)}; with the "
            f"examples weighted by their variance: {by_variance.answer} {_gap(self.difference)}. A few examples make "
            f"the difference.",
        )


@dataclass(frozen=True)
class Verdict:
    """Whether the data support the claim that the first reward is decided early and the second late."""

    answer: Answer
    sentence: str


def conclude(
    measured: Sequence[Branches], rewards: Sequence[str], subjects: Sequence[Hashable], num_inference_steps: int
) -> Findings:
    """All numbers with their intervals, from the same resamples, so that ratios and differences are paired.

    Args:
        measured: one for each step, ascending, and last the one with all steps.
        rewards: K names.
        subjects: of the P examples.
        num_inference_steps: T.

    Raises:
        UserError: if a reward did not move at all.
    """
    steps = measured[:-1]
    variances = torch.stack([group_variance(b.rewards) for b in measured], dim=1)  # (P, S + 1, K)
    correlations = torch.stack([group_correlation(b.rewards) for b in steps], dim=1)  # (P, S)
    _check_moved(variances, rewards)
    each = _share(variances[:, :-1])
    each = torch.where(each.isnan().any(dim=2).any(dim=1)[:, None, None], torch.nan, each)
    columns = torch.cat([variances.flatten(1), each.flatten(1), correlations], dim=1)
    random = torch.Generator().manual_seed(0)
    mean, draws = bootstrap(columns[None], subjects, random, resamples=RESAMPLES)
    if len(set(subjects)) < 2:
        draws = torch.full_like(draws, torch.nan)

    both = torch.cat([mean[None], draws])  # row 0 is the estimate, the others are its resamples
    pooled, share_each, correlation = both.split([variances[0].numel(), each[0].numel(), len(steps)], dim=1)
    pooled, share_each = pooled.unflatten(1, variances.shape[1:]), share_each.unflatten(1, each.shape[1:])
    variance, total = pooled[:, :-1], pooled[:, -1]
    share = _share(variance)
    progress = torch.tensor([b.steps[0] / num_inference_steps for b in steps], dtype=share.dtype)
    centre, centre_each = (torch.einsum("rsk,s->rk", x, progress) for x in (share, share_each))
    cosine, across = _cosines(steps, random) if steps[0].gram is not None else (None, None)
    values = torch.stack([b.rewards for b in measured])
    return Findings(
        rewards=tuple(rewards),
        steps=tuple(b.steps[0] for b in steps),
        num_inference_steps=num_inference_steps,
        variance=_interval(variance),
        total=_interval(total),
        explained=_interval(variance / total.unsqueeze(1)),
        shares=_interval(share),
        centre=_interval(centre),
        difference=_interval(centre[:, 1] - centre[:, 0]),
        shares_each=_interval(share_each),
        centre_each=_interval(centre_each),
        difference_each=_interval(centre_each[:, 1] - centre_each[:, 0]),
        correlation=_interval(correlation),
        cosine=cosine,
        cosine_across=across,
        weights=_interval(fitted_weights(share_each)),
        unscored=int(values.isnan().any(dim=-1).sum()),
        images=values[..., 0].numel(),
        subjects=len(set(subjects)),
    )


def to_dict(found: Findings) -> dict[str, Any]:
    """All numbers as JSON; an interval is {"estimate", "low", "high"}, null where there is none."""
    numbers = {n: value._asdict() if isinstance(value, Interval) else value for n, value in vars(found).items()}
    numbers["pictures"] = numbers.pop("images")
    return plain({**vars(found.verdict), **numbers, "progress": found.progress})


def judge(difference: Interval, centre: Interval, rewards: Sequence[str], one_step: float) -> Verdict:
    """The verdict on `first early, second late`, from the interval of the difference of their centres alone.

    supports: the whole interval is above 0. does not support: it is below 0, or it holds 0 and excludes a difference of
    one step. undecided: anything else.
    """
    (first, second), (early, late) = rewards[:2], centre.estimate[:2].tolist()
    low, high, gap = float(difference.low), float(difference.high), _gap(difference)
    places = f"{first} is decided at progress {early:.3f} on average, {second} at {late:.3f}"
    if not (low == low and high == high):
        return Verdict("undecided", f"{places}; with a single subject there is no interval, so nothing is shown.")
    if low > 0:
        size = ", though by less than one step" if high < one_step else ""
        return Verdict("supports", f"{places}: {second} is decided later {gap}{size}.")
    if high < 0:
        return Verdict("does not support", f"{places}: {second} is decided earlier {gap}, the opposite order.")
    if high < one_step:
        return Verdict("does not support", f"{places}: a difference of one step ({one_step:.3f}) is excluded {gap}.")
    return Verdict("undecided", f"{places}: the interval of the difference holds 0 and more than one step {gap}.")


def _gap(difference: Interval) -> str:
    value, low, high = (float(bound) for bound in difference)
    return f"({value:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})"


def _cosines(steps: Sequence[Branches], random: torch.Generator) -> tuple[Interval, Interval]:
    """(S,) intervals of the cosine of all pairs of subjects, and of pairs of different subjects."""
    grams = [branches.gram for branches in steps if branches.gram is not None]
    subjects = len(grams[0])
    drawn = torch.randint(subjects, (RESAMPLES, subjects), generator=random)
    counts = torch.zeros(RESAMPLES, subjects).scatter_add_(1, drawn, torch.ones(RESAMPLES, subjects))
    counts = torch.cat([torch.ones(1, subjects), counts])
    if subjects < 2:
        counts[1:] = torch.nan
    found = []
    for across in (False, True):
        both = torch.stack([gradient_cosine(gram, counts, across=across) for gram in grams], dim=1)
        if subjects > 1:
            # A ratio whose denominator may well be 0 says nothing, not even its estimate.
            both[:, both[1:].isfinite().double().mean(dim=0) < FEWEST_DEFINED] = torch.nan
        found.append(_interval(both))
    return found[0], found[1]


def _interval(both: Tensor) -> Interval:
    """Row 0 the estimate, the other rows its resamples."""
    return interval(both[0], both[1:])


def _share(variance: Tensor) -> Tensor:
    """Of the sum over steps: (..., S, K); NaN for a reward that did not move."""
    return variance / variance.sum(dim=-2, keepdim=True)


def _check_moved(variances: Tensor, rewards: Sequence[str]) -> None:
    """variances: (P, S + 1, K)."""
    for k, name in enumerate(rewards):
        column = variances[:, :-1, k]
        if not bool((column > 0).any()):
            why = "could not be scored" if bool(column.isnan().all()) else "is the same on all branches"
            raise UserError(
                f"The reward '{name}' {why}, so no step decides it; check the reward, or raise the noise of "
                f"rollout.dynamics."
            )
