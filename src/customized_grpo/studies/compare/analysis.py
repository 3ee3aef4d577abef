"""What a comparison says, with its uncertainty. All estimates share their resamples of seeds and subjects.

Gains are against the base policy, task by task. Where gains of different metrics meet (the lesser of two, an area, a
gap) each is in units of its metric's spread over the base policy's tasks, because their own units do not compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from customized_grpo.functional import statistics
from customized_grpo.store.scores import Estimate
from customized_grpo.studies.compare.results import Comparison

BOOTSTRAP: Any = {"resamples": 2000, "few_seeds": True}


@dataclass(frozen=True)
class Balance:
    """The pair of metrics whose lesser gain counts."""

    name: str
    """rewards, or checks: the untrained twins of the rewards."""
    metrics: tuple[str, str]
    """Prompt and identity, or their twins."""


class Analysis:
    """Numbers of a comparison, each computed from the same bootstrap.

    Args:
        comparison: what was measured.
        seed: of the resamples.
    """

    def __init__(self, comparison: Comparison, seed: int = 0) -> None:
        self.comparison, self.seed = comparison, seed
        self.methods, self.metrics = comparison.methods, comparison.metrics
        self.iterations, self.grid = comparison.iterations, comparison.grid
        self.values = torch.from_numpy(comparison.scores())
        """(seeds, tasks, methods, iterations, metrics)"""
        self.base = torch.from_numpy(comparison.base_scores())
        """(tasks, metrics)"""
        self.gains = self.values - self.base[:, None, None, :]
        spread = torch.from_numpy(np.nanstd(comparison.base_scores(), axis=0))
        self.spread = torch.where(spread > 0, spread, torch.nan)
        """(metrics,) standard deviation over the base policy's tasks."""
        scored = self.gains[:, :, :, -1].isfinite().any(dim=-1)
        subjects = {s for s, kept in zip(comparison.base.subjects, scored.any(dim=2).any(dim=0), strict=True) if kept}
        self.num_seeds, self.num_subjects = int(scored.any(dim=1).any(dim=1).sum()), len(subjects)
        self.certain = self.num_seeds > 1 or self.num_subjects > 1
        self._made: dict[tuple[bool, ...], tuple[Tensor, Tensor]] = {}

    @property
    def references(self) -> list[str]:
        """The methods that the others are compared with."""
        return [m for m in (self.grid.baseline, self.grid.candidate) if m in self.methods]

    # ---- the pairs that balance

    @cached_property
    def balances(self) -> list[Balance]:
        """The two rewards, and their twins where both are measured; empty unless there are two rewards."""
        rewards = self.comparison.rewards
        if len(rewards) != 2:
            return []
        found = [Balance("rewards", (rewards[0], rewards[1]))]
        twins = [self.grid.checks.get(name, "") for name in rewards]
        if all(twin in self.metrics for twin in twins):
            found.append(Balance("checks", (twins[0], twins[1])))
        return found

    # ---- estimates

    def level(self, method: str, metric: str, iteration: int = -1) -> Estimate:
        """A metric at an iteration, with the interval of its gain around it."""
        before, gain = self.base_level(metric).value, self.gain(method, metric, iteration)
        return Estimate(before + gain.value, before + gain.low, before + gain.high)

    def base_level(self, metric: str) -> Estimate:
        """A metric of the base policy, over subjects."""
        k = self.metrics.index(metric)
        return self._estimate(self._base[0][k], self._base[1][:, k])

    def gain(self, method: str, metric: str, iteration: int = -1) -> Estimate:
        """A metric less the base policy's, in its own units."""
        index = self._at(method, metric, iteration)
        return self._estimate(self._gain_mean[index], self._gain_draws[(slice(None), *index)])

    def difference(self, method: str, reference: str, metric: str) -> Estimate:
        """A metric of one method less that of another after training, seed by seed and task by task."""
        ours, theirs = (
            self.values[:, :, self.methods.index(m), -1, self.metrics.index(metric)] for m in (method, reference)
        )
        if not bool((ours - theirs).isfinite().any()):
            return _nothing()
        return self._of(statistics.bootstrap(ours - theirs, self._clusters, self._generator(), **BOOTSTRAP))

    def lesser_gain(self, method: str, balance: Balance) -> Estimate:
        """The smaller of two gains, in spreads: what a balanced method raises."""
        return self._estimate(*(x[..., 0, :].amin(dim=-1) for x in self._together([method], balance)))

    def lesser_gain_difference(self, method: str, reference: str, balance: Balance) -> Estimate:
        """The lesser gain of one method less that of another, on the seeds that both have finished."""
        lesser = (x.amin(dim=-1) for x in self._together([method, reference], balance))
        return self._estimate(*(x[..., 0] - x[..., 1] for x in lesser))

    @property
    def line(self) -> tuple[str, str] | None:
        """The two methods of the grid's `line`, if both have finished runs."""
        line = self.grid.line
        return line if line and set(line) <= set(self.methods) else None

    def beyond(self, method: str, balance: Balance, reference: str | None = None) -> Estimate:
        """How far a method lies beyond the line, or beyond `reference` in the same direction, in spreads.

        The direction is at right angles to the line, towards more of both metrics. Along the line weights trade one
        metric for the other; a method on it does what some constant weights would have done. NaN without a line, and
        for its own ends. Ours.
        """
        if self.line is None or (reference is None and method in self.line):
            return _nothing()
        return self._estimate(*map(_across, self._together([*self.line, method, reference or self.line[0]], balance)))

    def seeds_in_favour(self, method: str, reference: str, balance: Balance) -> tuple[int, int]:
        """On how many of the seeds that both have finished the lesser gain of `method` is the larger one."""
        ours, theirs = self._final([method, reference], balance).nanmean(dim=1).amin(dim=-1).unbind(dim=1)
        both = ours.isfinite() & theirs.isfinite()
        return int((ours > theirs)[both].sum()), int(both.sum())

    def hacking_gap(self, method: str, reward: str) -> Estimate:
        """Gain of a reward less the gain of its untrained twin, in spreads: above 0 the reward is hacked.

        NaN if the reward has no twin that is measured.
        """
        twin = self.grid.checks.get(reward, "")
        if twin not in self.metrics:
            return _nothing()
        a, b = self._in_spreads(method, reward), self._in_spreads(method, twin)
        return self._estimate(a[0] - b[0], a[1] - b[1])

    def probability_of_improvement(self, method: str, reference: str, metric: str) -> Estimate:
        """How likely a seed of one method beats a seed of the other on a task."""
        k = self.metrics.index(metric)
        pair = [self.values[:, :, self.methods.index(m), -1, k] for m in (method, reference)]
        ours, theirs = (values[values.isfinite().any(dim=1)] for values in pair)
        if not len(ours) or not len(theirs):
            return _nothing()
        if metric in self.grid.lower_is_better:
            ours, theirs = -ours, -theirs
        found = statistics.probability_of_improvement(ours, theirs, self._clusters, self._generator())
        return self._clear(Estimate(*(float(x) for x in found)))

    def hypervolume(self, method: str, balance: Balance) -> Estimate:
        """Area that the method's evaluations over training dominate above the base policy, in spreads squared."""
        m = self.methods.index(method)
        columns = [self.metrics.index(metric) for metric in balance.metrics]
        scale = self._per_spread[columns]
        origin = torch.zeros(2, dtype=scale.dtype)
        mean, draws = (x[..., m, :, :][..., columns] * scale for x in (self._gain_mean, self._gain_draws))
        return self._estimate(*(statistics.hypervolume(x, origin) for x in (mean, draws)))

    def front(self, balance: Balance) -> tuple[list[str], dict[str, float]]:
        """Methods that no other beats in both metrics, and the share of resamples in which each is one of them."""
        columns = [self.metrics.index(metric) for metric in balance.metrics]
        mean, draws = (x[..., -1, :][..., columns] for x in (self._gain_mean, self._gain_draws))
        shares = torch.stack([statistics.pareto_front(points) for points in draws]).double().mean(0)
        shares[draws.isnan().any(dim=-1).all(dim=0)] = torch.nan
        on = statistics.pareto_front(mean)
        return (
            [method for method, best in zip(self.methods, on, strict=True) if best],
            {method: float(share) for method, share in zip(self.methods, shares, strict=True)},
        )

    def conflict(self, method: str, key: str) -> Estimate:
        """A conflict statistic of training, mean over iterations and seeds; the interval is over both."""
        return self._series_mean([run.series(f"conflict/{key}") for run in self.comparison.runs[method].values()])

    def unscored(self) -> list[tuple[str, str, int, int]]:
        """(method, metric, missing, all) for every metric that could not score some held-out picture of a method.

        A task that a metric cannot score on the base policy's pictures either is not counted, unless it is a reward:
        some metrics say nothing about some prompts.
        """
        found: list[tuple[str, str, int, int]] = []
        sources = {"base": [self.comparison.base]} | {
            method: [e for run in runs.values() for e in run.evaluations if e.iteration]
            for method, runs in self.comparison.runs.items()
        }
        silent = np.asarray(~np.isfinite(self.comparison.base.values).all(axis=0))  # (tasks, metrics)
        silent[:, [k for k, metric in enumerate(self.metrics) if metric in self.comparison.rewards]] = False
        for method, evaluations in sources.items():
            for k, metric in enumerate(self.metrics):
                columns = [evaluation.values[:, :, k] for evaluation in evaluations]
                missing = sum(int((~np.isfinite(column) & ~silent[:, k]).sum()) for column in columns)
                if missing:
                    found.append((method, metric, missing, sum(column.size for column in columns)))
        return found

    # ---- the bootstrap

    @property
    def _clusters(self) -> Sequence[str]:
        return self.comparison.base.subjects

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _bootstrap(self, seeds: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
        """Mean (methods, iterations, metrics) and draws (R, ...) of the gains on some of the seeds; made once."""
        if seeds not in self._made:
            gains = torch.where(torch.tensor(seeds)[:, None, None, None, None], self.gains, torch.nan)
            mean, draws = statistics.bootstrap(gains.flatten(2), self._clusters, self._generator(), **BOOTSTRAP)
            shape = gains.shape[2:]
            self._made[seeds] = mean.view(shape), draws.view(-1, *shape)
        return self._made[seeds]

    @property
    def _gain_mean(self) -> Tensor:
        return self._bootstrap((True,) * len(self.gains))[0]

    @property
    def _gain_draws(self) -> Tensor:
        return self._bootstrap((True,) * len(self.gains))[1]

    @cached_property
    def _base(self) -> tuple[Tensor, Tensor]:
        return statistics.bootstrap(self.base[None], self._clusters, self._generator(), **BOOTSTRAP)

    @cached_property
    def _per_spread(self) -> Tensor:
        """(metrics,) what turns a gain into spreads of the base policy; negative where less is better."""
        signs = [-1.0 if metric in self.grid.lower_is_better else 1.0 for metric in self.metrics]
        return torch.tensor(signs, dtype=self.spread.dtype) / self.spread

    def _at(self, method: str, metric: str, iteration: int) -> tuple[int, int, int]:
        i = len(self.iterations) - 1 if iteration == -1 else self.iterations.index(iteration)
        return self.methods.index(method), i, self.metrics.index(metric)

    def _in_spreads(self, method: str, metric: str) -> tuple[Tensor, Tensor]:
        index = self._at(method, metric, -1)
        scale = self._per_spread[index[2]]
        return self._gain_mean[index] * scale, self._gain_draws[(slice(None), *index)] * scale

    def _final(self, methods: Sequence[str], balance: Balance) -> Tensor:
        """(seeds, tasks, methods, 2) gains after training, in spreads; NaN where a seed is not finished."""
        columns = [self.metrics.index(metric) for metric in balance.metrics]
        found = self.gains[:, :, [self.methods.index(m) for m in methods], -1]
        return found[..., columns] * self._per_spread[columns]

    def _together(self, methods: Sequence[str], balance: Balance) -> tuple[Tensor, Tensor]:
        """Mean (methods, 2) and draws (R, methods, 2) of the final gains in spreads, on the seeds that all have."""
        shared = self._final(methods, balance).isfinite().any(dim=1).all(dim=(1, 2))
        rows, columns = [self.methods.index(m) for m in methods], [self.metrics.index(m) for m in balance.metrics]
        mean, draws = (x[..., rows, -1, :][..., columns] for x in self._bootstrap(tuple(map(bool, shared))))
        return mean * self._per_spread[columns], draws * self._per_spread[columns]

    def _series_mean(self, series: Sequence[np.ndarray]) -> Estimate:
        length = max((len(values) for values in series), default=0)
        if not length or not any(np.isfinite(values).any() for values in series):
            return _nothing()
        padded = np.full((len(series), length), np.nan)
        for row, values in zip(padded, series, strict=True):
            row[: len(values)] = values
        return self._of(statistics.bootstrap(torch.from_numpy(padded), range(length), self._generator(), **BOOTSTRAP))

    def _of(self, bootstrapped: tuple[Tensor, Tensor]) -> Estimate:
        return self._estimate(*bootstrapped)

    def _estimate(self, mean: Tensor, draws: Tensor) -> Estimate:
        if not bool(mean.isfinite()):
            return _nothing()
        found = statistics.interval(mean, draws)
        return self._clear(Estimate(*(float(x) for x in found)))

    def _clear(self, estimate: Estimate) -> Estimate:
        """Without its interval where there is only one seed of one subject to resample."""
        return estimate if self.certain else Estimate(estimate.value, np.nan, np.nan)


def _across(points: Tensor) -> Tensor:
    """(..., 4, 2) to (...): from the fourth point to the third, across the line through the first two."""
    along = points[..., 1, :] - points[..., 0, :]
    normal = torch.stack([along[..., 1], -along[..., 0]], dim=-1)
    normal = normal * normal.sum(dim=-1, keepdim=True).sign() / normal.norm(dim=-1, keepdim=True)
    return ((points[..., 2, :] - points[..., 3, :]) * normal).sum(dim=-1)


def _nothing() -> Estimate:
    return Estimate(np.nan, np.nan, np.nan)
