"""How sure a comparison is. Pure: scores in, intervals out.

Shapes: R resamples; scores are (seeds, tasks) or (seeds, tasks, M), M methods or metrics; NaN is a missing score.
A task belongs to a cluster, its subject: pictures of one subject are alike, so subjects are resampled, not pictures.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST_CLUSTERS = 4096
"""More clusters than this are first put together at random, into this many: the method of random groups. The relative
error of an interval's width is then about 1 %, less than 2000 resamples have of their own."""


class Interval(NamedTuple):
    """Point estimate and bounds of a percentile interval, all of one shape."""

    estimate: Tensor
    low: Tensor
    high: Tensor


def bootstrap(
    values: Tensor,
    clusters: Sequence[Hashable],
    generator: torch.Generator,
    *,
    resamples: int = 2000,
    few_seeds: bool = False,
) -> tuple[Tensor, Tensor]:
    """The mean over seeds and tasks, and what it would have been with other seeds and other subjects.

    Seeds and clusters are each resampled with replacement. All M columns share every resample, so differences and other
    combinations of columns are paired: compute them on the result, then take `interval`. A seed without any score in a
    column is none of that column's seeds: columns with the same seeds share them, and all columns share the clusters.

    Args:
        values: shape (seeds, tasks) or (seeds, tasks, M); NaN is left out.
        clusters: one name or number per task.
        generator: on the CPU.
        resamples: R.
        few_seeds: spread the seeds further apart, as much as Student's t asks for at 95 %. Resampling 5 seeds as they
            are makes intervals that cover the truth 4 times in 5, not 19 in 20, where seeds are what varies. A column
            that has one of several seeds says nothing of how they vary: its resamples are NaN. Ours.

    Returns:
        The mean, shape () or (M,), and its resamples, shape (R,) or (R, M). With a single seed only the clusters vary.

    Raises:
        ValueError: if shapes do not fit or there is nothing to resample.
    """
    scores = _scores(values)
    index = _cluster_index(clusters, scores)
    mean, draws = (scores.new_full((*shape, scores.shape[-1]), torch.nan) for shape in ((), (resamples,)))
    scored = scores.isfinite().any(dim=1)
    shared = _seed(generator)
    for seeds in {tuple(map(bool, column)): column for column in scored.unbind(dim=1)}.values():
        n, columns = int(seeds.sum()), (scored == seeds[:, None]).all(dim=0)
        if n == 0:
            continue
        totals = _by_cluster(scores[seeds][:, :, columns], index)
        random = torch.Generator().manual_seed(shared)
        mean[columns], found = _resample(*totals, [n], resamples, random, _student(n) if few_seeds else 1.0)
        if n > 1 or len(scores) == 1 or not few_seeds:
            draws[:, columns] = found
    return (mean, draws) if values.ndim == 3 else (mean[0], draws[:, 0])


def interval(estimate: Tensor, draws: Tensor, *, level: float = 0.95) -> Interval:
    """Percentile interval of the draws that are not NaN.

    Args:
        estimate: shape (...).
        draws: shape (R, ...); NaN where a resample caught only missing scores.
        level: coverage.
    """
    if draws.shape[1:] != estimate.shape:
        raise ValueError(f"expected draws of shape (R, {tuple(estimate.shape)}), got {tuple(draws.shape)}.")
    tail = (1 - level) / 2
    low, high = torch.nanquantile(draws, torch.tensor([tail, 1 - tail], dtype=draws.dtype), dim=0)
    return Interval(estimate, low, high)


def mean_interval(
    values: Tensor,
    clusters: Sequence[Hashable],
    generator: torch.Generator,
    *,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Mean over seeds and tasks with its `bootstrap` interval: shape () or (M,)."""
    return interval(*bootstrap(values, clusters, generator, resamples=resamples), level=level)


def gradient_cosine(gram: Tensor, counts: Tensor, *, across: bool = False) -> Tensor:
    """Cosine of the summed gradients of rewards 0 and 1, for every resample of subjects.

    Args:
        gram: shape (U, K, U, K), inner products.
        counts: shape (R, U), how often each subject is in a resample.
        across: only from pairs of different subjects. Both gradients of one subject have the same noise, weighted by
            two rewards; the cosine of noise alone would be the correlation of these rewards. Different subjects share
            no noise, so their inner products estimate those of the expected gradients without bias.

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


def paired_difference(
    values: Tensor,
    baseline: Tensor,
    clusters: Sequence[Hashable],
    generator: torch.Generator,
    *,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Mean of values - baseline over the seeds and tasks that both have scored.

    Args:
        values: shape (seeds, tasks) or (seeds, tasks, M).
        baseline: the same shape, or broadcastable to it: one seed of a base model, one column for all methods.
        clusters, generator, resamples, level: as in `mean_interval`.
    """
    return mean_interval(values - baseline, clusters, generator, resamples=resamples, level=level)


def probability_of_improvement(
    values: Tensor,
    baseline: Tensor,
    clusters: Sequence[Hashable],
    generator: torch.Generator,
    *,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """How likely a random seed of the method beats a random seed of the baseline on a random task; a tie is half a win.

    Args:
        values: shape (seeds, tasks) or (seeds, tasks, M).
        baseline: shape (seeds', tasks) or (seeds', tasks, M); seeds' may differ.
        clusters, generator, resamples, level: as in `mean_interval`.

    Source: rliable (arXiv 2108.13264).
    """
    ours, theirs = _scores(values), _scores(baseline)
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"expected the same tasks on both sides, got {ours.shape[1]} and {theirs.shape[1]}.")
    index = _cluster_index(clusters, ours)
    # One pair of seeds at a time: all of them at once would be seeds * seeds' copies of the scores.
    pairs = [_by_cluster(_wins(a, b).unsqueeze(0), index) for a in ours for b in theirs]
    sums, counts = (torch.cat([pair[n] for pair in pairs]) for n in (0, 1))
    mean, draws = _resample(sums, counts, [len(ours), len(theirs)], resamples, generator)
    draws = draws.clamp(0, 1)  # of float32, whose rounding reaches beyond
    return interval(mean, draws, level=level) if values.ndim == 3 else interval(mean[0], draws[:, 0], level=level)


def pareto_front(points: Tensor) -> Tensor:
    """Which points no other point beats or equals in everything and beats in something. (n, d) to bool (n,).

    Higher is better. Equal points stand or fall together; a point with NaN is never on the front.
    """
    if points.ndim != 2:
        raise ValueError(f"expected points of shape (n, d), got {tuple(points.shape)}.")
    a, b = points.unsqueeze(0), points.unsqueeze(1)
    beaten = ((a >= b).all(dim=-1) & (a > b).any(dim=-1)).any(dim=1)
    return ~beaten & ~points.isnan().any(dim=-1)


def hypervolume(points: Tensor, reference: Tensor) -> Tensor:
    """Area that the points dominate above the reference point: the size of the trade-off they offer.

    Args:
        points: shape (..., n, 2), higher is better; leading axes are for resamples.
        reference: shape (2,), such as the base model's scores; points that do not exceed it in both count nothing.

    Returns:
        Shape (...), in the product of both units.
    """
    if points.ndim < 2 or points.shape[-1] != 2 or reference.shape != (2,):
        raise ValueError(f"expected points (..., n, 2) and reference (2,), got {points.shape} and {reference.shape}.")
    above = (points - reference).clamp(min=0)
    x, order = above[..., 0].sort(dim=-1, descending=True)
    y = above[..., 1].gather(-1, order).cummax(dim=-1).values
    widths = x - torch.nn.functional.pad(x[..., 1:], (0, 1))
    return (widths * y).sum(dim=-1)


def _scores(values: Tensor) -> Tensor:
    if values.ndim not in (2, 3):
        raise ValueError(f"expected scores of shape (seeds, tasks) or (seeds, tasks, M), got {tuple(values.shape)}.")
    if values.shape[0] == 0 or values.shape[1] == 0:
        raise ValueError(f"there is nothing to resample in {values.shape[0]} seeds and {values.shape[1]} tasks.")
    return values.double() if values.ndim == 3 else values.double().unsqueeze(-1)


def _wins(a: Tensor, b: Tensor) -> Tensor:
    """1 where a > b, 1/2 where they tie, 0 where a < b, NaN where either is missing."""
    return torch.where(a.isnan() | b.isnan(), torch.nan, ((a - b).sign() + 1) / 2)


def _cluster_index(clusters: Sequence[Hashable], scores: Tensor) -> Tensor:
    """The number of every task's cluster, counted from 0: (tasks,)."""
    if len(clusters) != scores.shape[1]:
        raise ValueError(f"expected one cluster per task, got {len(clusters)} for {scores.shape[1]} tasks.")
    number = {name: n for n, name in enumerate(dict.fromkeys(clusters))}
    return torch.tensor([number[name] for name in clusters])


def _by_cluster(scores: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the scores of every cluster: (U, tasks, M) to twice (U, C, M)."""
    empty = scores.new_zeros(len(scores), int(index.max()) + 1, scores.shape[-1])
    scored = scores.isfinite()
    sums = empty.index_add(1, index, torch.where(scored, scores, 0.0))
    return sums, empty.index_add(1, index, scored.to(scores))


STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles for 1 to 10 degrees of freedom."""


def _student(n: int) -> float:
    """What the bootstrap's deviation of a mean of n has to be multiplied by to reach as far as Student's interval."""
    if n < 2:
        return 1.0
    degrees = n - 1
    quantile = STUDENT_T[degrees - 1] if degrees <= len(STUDENT_T) else 1.96 + 2.37 / degrees + 2.8 / degrees**2
    return math.sqrt(n / degrees) * quantile / 1.96


def _resample(
    sums: Tensor,
    counts: Tensor,
    seeds: list[int],
    resamples: int,
    generator: torch.Generator,
    widening: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mean (M,) and resampled means (R, M) of (U, C, M) sums; U runs over all combinations of the `seeds` axes."""
    mean = sums.sum(dim=(0, 1)) / counts.sum(dim=(0, 1))
    if sums.shape[1] > MOST_CLUSTERS:
        group = torch.randperm(sums.shape[1], generator=generator) % MOST_CLUSTERS
        sums, counts = (x.new_zeros(len(x), MOST_CLUSTERS, x.shape[-1]).index_add(1, group, x) for x in (sums, counts))
    # From the mean, so that float32, at half the time, costs digits of the spread and not of the value.
    sums = sums - counts * mean
    # A power of two, which changes no digit: float32 ends at 3e38.
    scale = torch.ldexp(torch.ones_like(mean), torch.frexp(sums.abs().amax(dim=(0, 1))).exponent)
    sums = (sums / scale).float()
    if bool((counts == counts[:1, :, :1]).all()):
        counts = counts[:1, :, :1]  # Nothing is missing: one column of counts serves all.
    counts = counts.float()
    weights, of_seeds = torch.ones(resamples, 1), torch.Generator().manual_seed(_seed(generator))
    for n in seeds:
        weights = (weights.unsqueeze(-1) * _multiplicities(resamples, n, of_seeds).unsqueeze(1)).flatten(1)
    num_clusters = sums.shape[1]
    at_once = max(1, 2**24 // num_clusters)  # resamples whose counts fit in 64 MiB
    draws: list[Tensor] = []
    for start in range(0, resamples, at_once):
        seed_weights = weights[start : start + at_once]
        cluster_weights = _multiplicities(len(seed_weights), num_clusters, generator)
        total = _contract(1 + widening * (seed_weights - 1), cluster_weights, sums)
        number = _contract(seed_weights, cluster_weights, counts)
        draws.append(mean + scale * total.double() / number)
    return mean, torch.cat(draws)


def _seed(generator: torch.Generator) -> int:
    """For a generator of its own, so that what one part draws does not depend on how much another did."""
    return int(torch.randint(2**62, (), generator=generator))


def _multiplicities(resamples: int, n: int, generator: torch.Generator) -> Tensor:
    """How often each of n items is drawn in n draws with replacement: shape (resamples, n)."""
    drawn = torch.randint(n, (resamples, n), generator=generator)
    return torch.zeros(resamples, n).scatter_add_(1, drawn, torch.ones(()).expand_as(drawn))


def _contract(seed_weights: Tensor, cluster_weights: Tensor, x: Tensor) -> Tensor:
    """Weighted sum of (U, C, M) over U and C for every resample: (R, M). The clusters go first, being one matmul."""
    per_seed = (cluster_weights @ x.transpose(0, 1).flatten(1)).view(-1, len(x), x.shape[-1])
    return (seed_weights.unsqueeze(-1) * per_seed).sum(dim=1)
