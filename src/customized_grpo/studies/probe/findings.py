"""What the branches say: shares of variance, correlations, gradient cosines, a verdict, fitted weights; with intervals.

Notation: P examples, M branches, K rewards, S probed steps, U subjects, R resamples. The claim under test is that the
first reward (prompt) is decided earlier along the trajectory than the second (identity).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.functional.statistics import Interval, bootstrap, interval
from customized_grpo.studies.probe.measure import Branches
from customized_grpo.studies.probe.record import to_json

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
    """(S, K) variance / sum over steps, of the mean variance: an example that varies more weighs more. Sums to 1."""
    centre: Interval
    """(K,) mean progress of each reward, weighted by its shares."""
    difference: Interval
    """() centre of the second reward minus centre of the first: positive if the first is decided earlier."""
    shares_each: Interval
    """(S, K) variance / sum over steps in each example on its own, then averaged: every example weighs alike, as in
    training, where rewards are standardized within each group. Sums to 1."""
    centre_each: Interval
    """(K,) as `centre`, from `shares_each`."""
    difference_each: Interval
    """() as `difference`, from `shares_each`."""
    correlation: Interval
    """(S,) of the first two rewards within groups, mean over groups."""
    cosine: Interval | None
    """(S,) of the summed gradients of the first two rewards: what an optimizer step on these samples would see."""
    cosine_across: Interval | None
    """(S,) the same from pairs of different subjects only, so that the noise they share drops out."""
    weights: Interval
    """(S, K) fitted time weights, see `fitted_weights`."""
    unscored: int
    """Pictures that a reward could not score."""
    pictures: int
    subjects: int

    @property
    def progress(self) -> list[float]:
        """Of the S probed steps: step / T."""
        return [step / self.num_inference_steps for step in self.steps]

    @property
    def verdict(self) -> "Verdict":
        """What both ways of weighing the examples agree on; undecided if they do not."""
        by_variance = judge(self.difference, self.centre, self.rewards, 1 / self.num_inference_steps)
        alike = judge(self.difference_each, self.centre_each, self.rewards, 1 / self.num_inference_steps)
        if by_variance.answer == alike.answer:
            sentence = f"{alike.sentence} Weighing examples by their variance says the same {_gap(self.difference)}."
            return Verdict(alike.answer, sentence)
        sentence = (
            f"with every example weighing alike the data say: {alike.answer} {_gap(self.difference_each)}; "
            f"with examples weighing as they vary: {by_variance.answer} {_gap(self.difference)}. "
            f"A few examples make the difference."
        )
        return Verdict("undecided", sentence)


@dataclass(frozen=True)
class Verdict:
    """What the data say to `the first reward is decided early, the second late`."""

    answer: Answer
    sentence: str


def conclude(
    measured: Sequence[Branches],
    rewards: Sequence[str],
    subjects: Sequence[Hashable],
    num_inference_steps: int,
    *,
    smoothing: int = 1,
    floor: float = 0.2,
    seed: int = 0,
) -> Findings:
    """All numbers with their intervals, from the same resamples, so that ratios and differences are paired.

    Args:
        measured: one for each step, ascending, and last the one with all steps.
        rewards: K names.
        subjects: of the P examples.
        num_inference_steps: T.
        smoothing, floor: of `fitted_weights`.
        seed: of the resampling.

    Raises:
        UserError: if a reward did not move at all.
    """
    steps, names = [branches for branches in measured if len(branches.steps) == 1], tuple(rewards)
    variances = torch.stack([group_variance(b.rewards) for b in [*steps, measured[-1]]], dim=1)  # (P, S + 1, K)
    correlations = torch.stack([group_correlation(b.rewards) for b in steps], dim=1)  # (P, S)
    _check_moved(variances, names)
    each = _share(variances[:, :-1])
    each = torch.where(each.isnan().any(dim=2).any(dim=1)[:, None, None], torch.nan, each)
    columns = torch.cat([variances.flatten(1), each.flatten(1), correlations], dim=1)
    random = torch.Generator().manual_seed(seed)
    mean, draws = bootstrap(columns[None], subjects, random, resamples=RESAMPLES)
    if len(set(subjects)) < 2:
        draws = torch.full_like(draws, torch.nan)

    both = torch.cat([mean[None], draws])  # row 0 is the estimate, the others are its resamples
    sizes = [variances[0].numel(), each[0].numel(), len(steps)]
    everything, share_each, correlation = both.split(sizes, dim=1)
    everything, share_each = everything.unflatten(1, variances.shape[1:]), share_each.unflatten(1, each.shape[1:])
    variance, total = everything[:, :-1], everything[:, -1]
    share = _share(variance)
    progress = torch.tensor([b.steps[0] / num_inference_steps for b in steps], dtype=share.dtype)
    centre, centre_each = (torch.einsum("rsk,s->rk", x, progress) for x in (share, share_each))
    weights = fitted_weights(share_each, smoothing=smoothing, floor=floor)
    cosine, across = _cosines(steps, random) if steps[0].gram is not None else (None, None)
    values = torch.stack([b.rewards for b in measured])
    return Findings(
        rewards=names,
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
        weights=_interval(weights),
        unscored=int(values.isnan().any(dim=-1).sum()),
        pictures=values[..., 0].numel(),
        subjects=len(set(subjects)),
    )


def group_variance(rewards: Tensor) -> Tensor:
    """Unbiased variance of each reward among the branches of each example. (P, M, K) to (P, K), float64.

    Its mean over examples is the mean square within groups of a one-way analysis of variance: an unbiased estimate of
    E_example[Var(reward | trajectory before the step)]. NaN for an example with fewer than two scored branches.
    """
    scored = rewards.isfinite()
    count = scored.sum(dim=1)
    variance = _deviations(rewards, scored).square().sum(dim=1) / (count - 1).clamp(min=1)
    return torch.where(count >= 2, variance, torch.nan)


def group_correlation(rewards: Tensor) -> Tensor:
    """Correlation of the first two rewards among the branches of each example. (P, M, K) to (P,), float64.

    NaN for an example in which one of them does not vary.
    """
    pair = rewards[..., :2]
    a, b = _deviations(pair, pair.isfinite().all(dim=-1, keepdim=True).expand_as(pair)).unbind(dim=-1)
    norm = (a.square().sum(dim=1) * b.square().sum(dim=1)).sqrt()
    return torch.where(norm > 0, (a * b).sum(dim=1) / norm, torch.nan)


def fitted_weights(shares: Tensor, *, smoothing: int = 1, floor: float = 0.2) -> Tensor:
    """Time weights that follow what each step decides. (..., S, K) to (..., S, K), rows sum to 1.

    1. shares[s, k] sum to 1 over the steps: so no reward counts more for its units or its spread.
    2. smoothed over neighbouring steps, `smoothing` times with (1/4, 1/2, 1/4), the ends renormalised.
    3. weight[s, k] = share[s, k] / sum over rewards.
    4. no weight below `floor`: what a row exceeds the floor by is scaled so that the row sums to 1 again. With two
       rewards this is a clip to [floor, 1 - floor].

    Ours: the paper sets its weights by hand.

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


def to_dict(found: Findings) -> dict[str, Any]:
    """All numbers as JSON; an interval is {"estimate", "low", "high"}, null where there is none."""
    content: dict[str, Any] = {"answer": found.verdict.answer, "sentence": found.verdict.sentence}
    for name, value in vars(found).items():
        if isinstance(value, Interval):
            value = {bound: to_json(tensor) for bound, tensor in value._asdict().items()}
        content[name] = value
    return content | {"progress": found.progress}


def judge(difference: Interval, centre: Interval, rewards: Sequence[str], one_step: float) -> Verdict:
    """The verdict on `first early, second late`, from the interval of the difference of their centres alone.

    supports: the whole interval is above 0. does not support: it is below 0, or it holds 0 and excludes a difference of
    one step. undecided: anything else.
    """
    first, second = rewards[:2]
    low, high = float(difference.low), float(difference.high)
    places = (
        f"{first} is decided at progress {float(centre.estimate[0]):.3f} on average, {second} at "
        f"{float(centre.estimate[1]):.3f}"
    )
    gap = _gap(difference)
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


def gradient_cosine(gram: Tensor, counts: Tensor, *, across: bool = False) -> Tensor:
    """Cosine of the summed gradients of rewards 0 and 1, for every resample of subjects.

    Args:
        gram: shape (U, K, U, K), inner products.
        counts: shape (R, U), how often each subject is in a resample.
        across: only from pairs of different subjects. Both gradients of one subject are made of the same noise, weighed
            by two rewards; the cosine of noise alone would be the correlation of these rewards. Different subjects
            share no noise, so their inner products estimate those of the expected gradients without bias.

    Returns:
        Shape (R,); NaN where a squared length is not positive. With `across` it may leave [-1, 1]: it is a ratio of
        estimates.
    """
    blocks = gram[:, :2, :, :2].double()
    if across:
        blocks = blocks * (1 - torch.eye(len(gram), dtype=torch.float64))[:, None, :, None]
    products = torch.einsum("ru,ukvl,rv->rkl", counts.double(), blocks, counts.double())
    square = products[:, 0, 0].clamp(min=0) * products[:, 1, 1].clamp(min=0)
    return torch.where(square > 0, products[:, 0, 1] / square.sqrt(), torch.nan)


def _cosines(steps: Sequence[Branches], random: torch.Generator) -> tuple[Interval, Interval]:
    """(S,) intervals of the cosine with and without what samples share."""
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


def _deviations(rewards: Tensor, scored: Tensor) -> Tensor:
    """From the mean of the scored branches, 0 where not scored: (P, M, K) float64.

    All 0 for a group whose values differ by a few units in the last place: that is rounding, not reward.
    """
    low = torch.where(scored, rewards, torch.inf).amin(dim=1, keepdim=True)
    high = torch.where(scored, rewards, -torch.inf).amax(dim=1, keepdim=True)
    rounding = 8 * torch.finfo(rewards.dtype).eps * torch.maximum(low.abs(), high.abs())
    above = torch.where(scored, rewards.double() - low.double(), 0.0)
    mean = above.sum(dim=1, keepdim=True) / scored.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(scored & (high - low > rounding), above - mean, 0.0)


def _share(variance: Tensor) -> Tensor:
    """Of the sum over steps: (..., S, K); NaN for a reward that did not move."""
    return variance / variance.sum(dim=-2, keepdim=True)


def _smooth(share: Tensor) -> Tensor:
    """(1/4, 1/2, 1/4) along the steps, dividing by the weight that falls inside. (..., S, K)."""
    padded = torch.nn.functional.pad(share, (0, 0, 1, 1))
    ones = torch.nn.functional.pad(torch.ones_like(share), (0, 0, 1, 1))

    def blend(x: Tensor) -> Tensor:
        return 0.25 * x[..., :-2, :] + 0.5 * x[..., 1:-1, :] + 0.25 * x[..., 2:, :]

    return blend(padded) / blend(ones)


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
