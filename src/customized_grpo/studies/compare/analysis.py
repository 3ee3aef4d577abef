"""A comparison as numbers, with their uncertainty. All estimates share their resamples of seeds and subjects.

A gain is the change since the base policy, task by task. Where gains of two metrics are combined, each is in standard
deviations of its metric over the tasks of the base policy, because the metrics have different units.
"""

from collections.abc import Callable, Sequence
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.functional import statistics
from customized_grpo.page.formats import listed
from customized_grpo.shell import command
from customized_grpo.store.run import RunRecord, read_run
from customized_grpo.store.scores import Estimate, Scores, read_scores
from customized_grpo.studies.compare.cells import state
from customized_grpo.studies.compare.grid import Cell, cells, open_grid
from customized_grpo.studies.compare.methods import BASE, find_method

NOTHING = Estimate(np.nan, np.nan, np.nan)
Pair = tuple[str, str]
"""Two metrics that compete: prompt and identity, or their held-out proxies."""


class Comparison:
    """The finished cells of the grid in a folder, read once.

    Raises:
        UserError: if the folder is no comparison, nothing in it is finished, or it holds runs that do not compare.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.grid = folder, open_grid(folder)
        of_base, *self.cells = cells(self.grid, folder)
        self.states = {cell.name: state(cell) for cell in self.cells}
        self.base, self.problems = _read_base(of_base), list[str]()
        """Problems are sentences about what is left out."""
        self.runs = self._read_runs()
        """Method to seed to finished run, in the grid's order; methods without a finished run are left out."""

        self.methods, self.metrics, self.rewards = tuple(self.runs), self.base.metrics, self.base.rewards
        self.references = [m for m in (self.grid.baseline, self.grid.candidate) if m in self.runs]
        """The methods that the others are compared with."""
        line = self.grid.line or ()
        self.line: tuple[str, ...] = line if self.runs.keys() >= set(line) else ()
        """The two methods of the grid's `line`, if both have finished runs."""
        self.proxies = {r: self.grid.checks[r] for r in self.rewards if self.grid.checks.get(r) in self.metrics}
        """Reward to its held-out proxy, where that is measured."""
        pairs = {"rewards": self.rewards, "checks": tuple(self.proxies.values())}
        self.pairs: dict[str, Pair] = {k: (x[0], x[1]) for k, x in pairs.items() if len(x) == len(self.rewards) == 2}
        """The two rewards, and as `checks` their proxies if both are measured; empty unless there are two rewards."""
        self.judged = [*self.rewards, *self.pairs.get("checks", ())]
        """The rewards, and the proxies if there is one for each of two rewards."""
        evaluated = [{s.iteration for s in run.evaluations} for runs in self.runs.values() for run in runs.values()]
        self.iterations = tuple(sorted(set.intersection(*evaluated) | {0}))
        """Evaluated in every run, ascending; the first is 0, the base policy."""

        self.values, base = self._values(), _task_means(self.base)
        self.gains = self.values - base[:, None, None, :]
        levels, _ = statistics.bootstrap(base[None], self.base.subjects, _generator(), resamples=1)
        self.base_level = dict(zip(self.metrics, levels.tolist(), strict=True))
        """Mean of each metric over the tasks of the base policy."""
        scored = self.gains[:, :, :, -1].isfinite().any(dim=-1).any(dim=2)  # (seeds, tasks)
        self.num_seeds = int(scored.any(dim=1).sum())
        self.num_subjects = len({self.base.subjects[int(n)] for n in scored.any(dim=0).nonzero()})
        self.signs = torch.tensor([-1.0 if k in self.grid.lower_is_better else 1.0 for k in self.metrics]).double()
        """(metrics,) -1 where less is better, else 1."""
        deviations = torch.from_numpy(np.nanstd(base.numpy(), axis=0))
        self.scale = self.signs / torch.where(deviations > 0, deviations, torch.nan)
        """(metrics,) turns gains into standard deviations over the tasks of the base policy, positive where better."""
        self._made: dict[tuple[bool, ...], tuple[Tensor, Tensor]] = {}

    def title(self, method: str) -> str:
        return find_method(method, self.grid.own_methods).title or method

    def scores(self, method: str, seed: int, iteration: int) -> Scores:
        """One evaluation; the base policy's for iteration 0."""
        found = {s.iteration: s for s in self.runs[method][seed].evaluations} | {0: self.base}
        return found[iteration]

    def standardized(self, methods: Sequence[str], metrics: Sequence[str]) -> Tensor:
        """(seeds, tasks, methods, metrics) gains after training, in standard deviations and positive where better."""
        m, k = self._index(methods, metrics)
        return self.gains[:, :, m, -1][..., k] * self.scale[k]

    # ---- estimates

    def estimate(
        self,
        statistic: Callable[[Tensor], Tensor],
        methods: Sequence[str],
        metrics: Sequence[str],
        iterations: slice = slice(-1, None),
        *,
        standardized: bool = True,
    ) -> Estimate:
        """A statistic of the mean gains with its interval, on the seeds that all of the methods have finished.

        Args:
            statistic: (..., methods, iterations, metrics) to (...); computed of the means and of every resample.
            methods, metrics, iterations: of the gains.
            standardized: whether gains are in standard deviations and positive where better, or in their own units.
        """
        m, k = self._index(methods, metrics)
        scored = self.gains[:, :, m, -1][..., k].isfinite().any(dim=1)  # (seeds, methods, metrics)
        shared = scored.all(dim=(1, 2))
        if bool((scored == shared[:, None, None]).all()):
            shared = torch.ones_like(shared)  # each column is resampled over its own seeds anyway
        scale = self.scale[k] if standardized else torch.ones(len(k))
        return self._interval(*(statistic(x[..., m, iterations, :][..., k] * scale) for x in self._resampled(shared)))

    def gain(self, metric: str, method: str, iteration: int | None = None) -> Estimate:
        """A metric minus that of the base policy, in its own units."""
        i = len(self.iterations) - 1 if iteration is None else self.iterations.index(iteration)
        return self.estimate(lambda gains: gains[..., 0, 0, 0], [method], [metric], slice(i, i + 1), standardized=False)

    def gain_of_kind(self, metric: str, method: str, kind: str) -> Estimate:
        """As `gain` after training, over the tasks of one kind of prompt."""
        tasks = [n for n, found in enumerate(self.base.kinds) if found == kind]
        (m,), (k,) = self._index([method], [metric])
        return self._mean(self.gains[:, tasks, m, -1, k], [self.base.subjects[n] for n in tasks])

    def level(self, metric: str, method: str, iteration: int | None = None) -> Estimate:
        """A metric, with the interval of its gain around it."""
        return Estimate(*(self.base_level[metric] + x for x in self.gain(metric, method, iteration)))

    def difference(self, metric: str, method: str, reference: str) -> Estimate:
        """A metric of one method minus that of another, seed by seed and task by task."""
        return self._mean(self._final(metric, method) - self._final(metric, reference), self.base.subjects)

    def worst_gain(self, pair: Pair, method: str, reference: str | None = None) -> Estimate:
        """The smaller of two gains, which a balanced method raises; with a `reference`, minus that of the reference."""
        if reference is None:
            return self.estimate(lambda gains: _worst(gains)[..., 0], [method], pair)
        return self.estimate(lambda gains: _worst(gains)[..., 0] - _worst(gains)[..., 1], [method, reference], pair)

    def beyond(self, pair: Pair, method: str, reference: str | None = None) -> Estimate:
        """How far a method lies beyond the line, or beyond `reference` in the same direction.

        The direction is at right angles to the line, towards more of both metrics. Along the line, weights trade one
        metric for the other; a method on it does what some constant weights would have done. NaN without a line, and
        for the two methods that define it. Ours.
        """
        if not self.line or (reference is None and method in self.line):
            return NOTHING
        return self.estimate(_across, [*self.line, method, reference or self.line[0]], pair)

    def hacking_gap(self, reward: str, method: str) -> Estimate:
        """Gain of a reward minus that of its held-out proxy, in standard deviations; NaN without a proxy."""
        if reward not in self.proxies:
            return NOTHING
        metrics = [reward, self.proxies[reward]]
        return self.estimate(lambda gains: gains[..., 0, -1, 0] - gains[..., 0, -1, 1], [method], metrics)

    def hypervolume(self, pair: Pair, method: str) -> Estimate:
        """Area that the evaluations over training dominate above the base policy, in squared standard deviations."""
        origin = torch.zeros(2, dtype=torch.float64)
        return self.estimate(
            lambda gains: statistics.hypervolume(gains[..., 0, :, :], origin), [method], pair, slice(None)
        )

    def front(self, pair: Pair) -> dict[str, tuple[bool, float]]:
        """Whether no other method is as good in both metrics and better in one, and in what share of resamples."""
        _, k = self._index([], pair)
        everything = self._resampled(torch.ones(len(self.gains), dtype=torch.bool))
        mean, draws = (x[..., -1, :][..., k] * self.signs[k] for x in everything)
        shares = torch.stack([statistics.pareto_front(points) for points in draws]).double().mean(0)
        shares[draws.isnan().any(dim=-1).all(dim=0)] = torch.nan
        found = zip(statistics.pareto_front(mean).tolist(), shares.tolist(), strict=True)
        return dict(zip(self.methods, found, strict=True))

    def probability_of_improvement(self, metric: str, method: str, reference: str) -> Estimate:
        """How likely a seed of one method beats a seed of the other on a task."""
        both = (self._final(metric, m) * self.signs[self.metrics.index(metric)] for m in (method, reference))
        ours, theirs = (x[x.isfinite().any(dim=1)] for x in both)
        if not len(ours) or not len(theirs):
            return NOTHING
        found = statistics.probability_of_improvement(ours, theirs, self.base.subjects, _generator())
        return self._known(Estimate(*map(float, found)))

    def seeds_in_favour(self, pair: Pair, method: str, reference: str) -> tuple[int, int]:
        """On how many seeds the worst-reward gain of `method` is the larger one, and how many both have finished."""
        ours, theirs = self.standardized([method, reference], pair).nanmean(dim=1).amin(dim=-1).unbind(dim=1)
        both = ours.isfinite() & theirs.isfinite()
        return int((ours > theirs)[both].sum()), int(both.sum())

    def conflict(self, key: str, method: str) -> Estimate:
        """A conflict statistic of training, mean over iterations and seeds; the interval is over both."""
        series = [run.series(f"conflict/{key}") for run in self.runs[method].values()]
        padded = torch.tensor([*zip_longest(*series, fillvalue=np.nan)], dtype=torch.float64).T  # (seeds, iterations)
        return self._mean(padded, range(padded.shape[-1]))

    def unscored(self) -> list[tuple[str, str, int, int]]:
        """(method, metric, missing, all) for every metric that could not score some held-out image of a method.

        A task that a metric cannot score on the images of the base policy either is not counted, unless the metric is a
        reward: some metrics do not apply to some prompts.
        """
        silent = ~np.isfinite(self.base.values).all(axis=0) & ~np.isin(self.metrics, self.rewards)  # (tasks, metrics)
        tables = {BASE: self.base.values} | {
            m: np.concatenate([s.values for run in runs.values() for s in run.evaluations if s.iteration])
            for m, runs in self.runs.items()
        }
        missing = {m: (~np.isfinite(values) & ~silent).sum(axis=(0, 1)) for m, values in tables.items()}
        counts = {(m, k): int(n) for m in tables for k, n in zip(self.metrics, missing[m], strict=True)}
        return [(m, k, n, tables[m][..., 0].size) for (m, k), n in counts.items() if n]

    # ---- reading

    def _read_runs(self) -> dict[str, dict[int, RunRecord]]:
        runs: dict[str, dict[int, RunRecord]] = {name: {} for name in self.grid.methods}
        left_out: dict[str, list[str]] = {}
        for cell in self.cells:
            if (where := self.states[cell.name]).status == "finished":
                run = runs[cell.method][cell.seed] = read_run(cell.run.path)
                _check_pairs(cell.name, run, self.base)
                self.problems += [f"{cell.name}: {problem}" for problem in run.problems]
            else:
                left_out.setdefault(where.status, []).append(f"{cell.name}{where.reason}")
        others = (str(path.relative_to(self.folder / "cells")) for path in (self.folder / "cells").glob("*/seed-*"))
        left_out["not in the grid"] = sorted(name for name in others if name not in self.states)
        for why, names in left_out.items():
            is_ = "is" if len(names) == 1 else "are"
            self.problems += [f"{listed(names)} {is_} {why} and left out."] if names else []
        if not any(runs.values()):
            shown = f"`{command('compare', '--status', self.folder)}` shows the progress"
            raise UserError(f"No cell of '{self.folder}' is finished yet; {shown}.")
        return {method: finished for method, finished in runs.items() if finished}

    def _values(self) -> Tensor:
        """(seeds, tasks, methods, iterations, metrics) means over the scored replicates.

        Seeds, methods and iterations are in the order of `grid.seeds`, `runs` and `iterations`. NaN where a cell is not
        finished or a metric could not score.
        """
        seeds, shape = self.grid.seeds, (len(self.base.tasks), len(self.runs), len(self.iterations), len(self.metrics))
        values = torch.full((len(seeds), *shape), torch.nan, dtype=torch.float64)
        for m, (method, runs) in enumerate(self.runs.items()):
            for seed, (i, iteration) in product(runs, enumerate(self.iterations)):
                values[seeds.index(seed), :, m, i] = _task_means(self.scores(method, seed, iteration))
        return values

    # ---- the bootstrap

    def _index(self, methods: Sequence[str], metrics: Sequence[str]) -> tuple[list[int], list[int]]:
        return [self.methods.index(m) for m in methods], [self.metrics.index(k) for k in metrics]

    def _final(self, metric: str, method: str) -> Tensor:
        """(seeds, tasks) values after training."""
        return self.values[:, :, self.methods.index(method), -1, self.metrics.index(metric)]

    def _bootstrap(self, values: Tensor, clusters: Sequence[Any] = ()) -> tuple[Tensor, Tensor]:
        """The mean of (seeds, tasks) or (seeds, tasks, M), and 2000 resamples of it."""
        return statistics.bootstrap(values, clusters or self.base.subjects, _generator(), few_seeds=True)

    def _resampled(self, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (methods, iterations, metrics) and resamples (R, ...) of the gains on some of the seeds; made once."""
        key = tuple(seeds.tolist())
        if key not in self._made:
            gains = torch.where(seeds[:, None, None, None, None], self.gains, torch.nan)
            mean, draws = self._bootstrap(gains.flatten(2))
            self._made[key] = mean.view(gains.shape[2:]), draws.view(-1, *gains.shape[2:])
        return self._made[key]

    def _mean(self, values: Tensor, clusters: Sequence[Any]) -> Estimate:
        """The mean of (seeds, tasks)."""
        return self._interval(*self._bootstrap(values, clusters)) if bool(values.isfinite().any()) else NOTHING

    def _interval(self, mean: Tensor, draws: Tensor) -> Estimate:
        found = statistics.interval(mean, draws) if bool(mean.isfinite()) else NOTHING
        return self._known(Estimate(*map(float, found)))

    def _known(self, estimate: Estimate) -> Estimate:
        """Without its interval if one subject of one seed is all there is to resample."""
        return estimate if max(self.num_seeds, self.num_subjects) > 1 else Estimate(estimate.value, np.nan, np.nan)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _task_means(scores: Scores) -> Tensor:
    """(tasks, metrics) means over the scored replicates; NaN where there is none."""
    return torch.from_numpy(np.stack([scores.per_task(metric) for metric in scores.metrics], axis=-1))


def _worst(gains: Tensor) -> Tensor:
    """The smaller of the last gains of each method: (..., methods, iterations, 2) to (..., methods)."""
    return gains[..., -1, :].amin(dim=-1)


def _across(gains: Tensor) -> Tensor:
    """From the fourth method to the third, across the line through the first two."""
    points = gains[..., -1, :]
    along = points[..., 1, :] - points[..., 0, :]
    normal = torch.stack([along[..., 1], -along[..., 0]], dim=-1)
    normal = normal * normal.sum(dim=-1, keepdim=True).sign() / normal.norm(dim=-1, keepdim=True)
    return ((points[..., 2, :] - points[..., 3, :]) * normal).sum(dim=-1)


def _read_base(base: Cell) -> Scores:
    if (found := state(base)).status != "finished":
        raise UserError(
            f"The evaluation of the base policy in '{base.run.path}' is {found.status}{found.reason}; "
            f"`{command('compare', '--resume', base.root)}` makes it."
        )
    return read_scores(base.evaluation)


def _check_pairs(name: str, run: RunRecord, base: Scores) -> None:
    """Raise UserError unless every evaluation is of the base's tasks, metrics and replicates."""
    for scores in run.evaluations:
        same = {what: getattr(scores, what) == getattr(base, what) for what in ("tasks", "metrics", "rewards")}
        same["replicates"] = len(scores.values) == len(base.values)
        if different := [what for what, equal in same.items() if not equal]:
            raise UserError(
                f"{name} was evaluated on other {different[0]} than the base policy (iteration {scores.iteration}), so "
                f"its scores do not pair; move '{run.folder}' away and run the grid again."
            )
