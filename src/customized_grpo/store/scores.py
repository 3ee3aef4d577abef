"""Scores of fixed tasks: the table, its file, and means and changes with 95 % intervals.

A task is a subject with a prompt. Images of one subject are similar, so intervals resample subjects, not images.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from customized_grpo.store.files import plain, replacing, write

FORMAT = 1
"""Version of the files that `write_scores` writes. Earlier files have no version and no kinds."""
PROMPT, IDENTITY = re.compile(r"prompt|clip_t|right"), re.compile(r"identity|subject|clip_i|dino")
"""Names of metrics of the prompt, and of identity."""


@dataclass(frozen=True)
class Scores:
    """Scores of one policy state. Each (replicate, task) has the same noise in every state, so states can be paired.

    Raises:
        ValueError: if the shapes do not fit together.
    """

    values: np.ndarray
    """(replicates, tasks, metrics) float64; NaN where a metric could not score."""
    metrics: tuple[str, ...]
    rewards: tuple[str, ...]
    """The metrics that are trained on."""
    tasks: tuple[str, ...]
    """The id of each task."""
    subjects: tuple[str, ...]
    """The subject of each task."""
    kinds: tuple[str, ...]
    """The kind of prompt of each task; "" where it is unknown."""
    prompts: tuple[str, ...]
    """The prompt of each task; "" where it is unknown."""
    iteration: int = 0
    """Iteration of the policy; 0 is the base policy."""
    permitted: np.ndarray | None = None
    """(tasks, metrics) scores of the examples' targets, which are as close to the reference as the prompt permits. NaN
    without a target and in metrics other than identity. None if they were not measured."""

    def __post_init__(self) -> None:
        expected = (len(self.tasks), len(self.metrics))
        if self.values.shape[1:] != expected:
            raise ValueError(f"expected values of shape (replicates, {expected[0]}, {expected[1]}), "
                             f"got {self.values.shape}.")  # fmt: skip
        if any(len(column) != len(self.tasks) for column in (self.subjects, self.kinds, self.prompts)):
            raise ValueError(f"expected a subject, a kind and a prompt for each of {len(self.tasks)} tasks.")

    def column(self, metric: str) -> np.ndarray:
        """(replicates, tasks) scores of one metric; NaN if it was not measured."""
        if metric not in self.metrics:
            return np.full(self.values.shape[:2], np.nan)
        return self.values[:, :, self.metrics.index(metric)]

    def per_task(self, metric: str) -> np.ndarray:
        """(tasks,) mean over the scored replicates; NaN where there is none."""
        return finite_mean(self.column(metric), axis=0)

    def complete(self, metric: str) -> np.ndarray:
        """(tasks,) share of the scored replicates with a score of exactly 1; NaN where there is none."""
        column = self.column(metric)
        return finite_mean(np.where(np.isfinite(column), column == 1, np.nan), axis=0)

    def select(self, chosen: Sequence[bool]) -> "Scores":
        """The chosen tasks."""
        keep = np.flatnonzero(np.asarray(chosen))
        names = {n: tuple(getattr(self, n)[t] for t in keep) for n in ("tasks", "subjects", "kinds", "prompts")}
        permitted = None if self.permitted is None else self.permitted[keep]
        return replace(self, values=self.values[:, keep], permitted=permitted, **names)

    def distinct_kinds(self) -> list[str]:
        """The kinds of prompt in the order of their tasks; empty where all tasks are of one kind."""
        found = list(dict.fromkeys(self.kinds))
        return found if len(found) > 1 else []

    def of_kind(self, kind: str) -> "Scores":
        """The tasks of one kind."""
        return self.select([other == kind for other in self.kinds])

    def means(self) -> dict[str, float]:
        """Mean of each metric over the images that it scored."""
        return {metric: float(finite_mean(self.column(metric))) for metric in self.metrics}

    def unscored(self, metric: str) -> int:
        """How many images a metric could not score."""
        return int((~np.isfinite(self.column(metric))).sum())


def finite_mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean of the finite values; NaN where there is none."""
    finite = np.isfinite(values)
    count = finite.sum(axis)
    return np.where(count > 0, np.where(finite, values, 0.0).sum(axis) / np.maximum(count, 1), np.nan)


# ---- the file


def write_scores(path: Path, scores: Scores) -> Path:
    """Write {"format", "iteration", "metrics", "rewards", "tasks", "values": [replicate][task][metric]} as JSON.

    A task is {"id", "subject", "kind", "prompt"}; a missing score is null. "permitted" is [task][metric], if known.

    Raises:
        UserError: if the file cannot be written.
    """
    columns = zip(scores.tasks, scores.subjects, scores.kinds, scores.prompts, strict=True)
    content = {
        "format": FORMAT, "iteration": scores.iteration, "metrics": scores.metrics, "rewards": scores.rewards,
        "tasks": [dict(zip(("id", "subject", "kind", "prompt"), task, strict=True)) for task in columns],
        "values": [[[v if math.isfinite(v) else None for v in row] for row in rep] for rep in scores.values.tolist()],
    }  # fmt: skip
    if scores.permitted is not None:
        content["permitted"] = plain(scores.permitted)
    return write(path, json.dumps(content))


def write_table(path: Path, scores: Scores, more: Sequence[Mapping[str, Any]]) -> Path:
    """Write a row for each image to PATH.parquet, or to PATH.csv where pyarrow is not installed.

    Args:
        path: without a suffix.
        scores: one replicate is one image of a task.
        more: additional columns of each image, task by task.

    Raises:
        UserError: if the file cannot be written.
    """
    text = "prompt_text" if "prompt" in scores.metrics else "prompt"  # a metric may be called prompt
    columns = zip(scores.tasks, scores.subjects, scores.kinds, scores.prompts, strict=True)
    names = ("task", "subject", "prompt_kind", text, "n")
    images = [(*column, n) for column in columns for n in range(len(scores.values))]
    values = scores.values.swapaxes(0, 1).reshape(len(images), -1).tolist()
    rows = [
        {**dict(zip(names, image, strict=True)), **extra, **dict(zip(scores.metrics, row, strict=True))}
        for image, extra, row in zip(images, more, values, strict=True)
    ]
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        with replacing(path.with_suffix(".csv")) as draft, draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: "" if v != v else v for k, v in row.items()} for row in rows)
        return path.with_suffix(".csv")
    with replacing(path.with_suffix(".parquet")) as draft:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), draft)
    return path.with_suffix(".parquet")


def read_scores(path: Path) -> Scores:
    """Read a file of `write_scores`, of this or an earlier version.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged, or of a later format.
    """
    text = path.read_text(encoding="utf-8")
    try:
        return _parse(json.loads(text))
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError) as error:
        raise ValueError(f"'{path}' is damaged ({type(error).__name__}: {error}).") from error


def _parse(content: dict[str, Any]) -> Scores:
    if (found := content.get("format", FORMAT)) > FORMAT:
        raise ValueError(f"expected scores of format {FORMAT}, got format {found}; update customized-grpo.")
    metrics, tasks, permitted = tuple(content["metrics"]), content["tasks"], content.get("permitted")
    return Scores(
        values=np.array([[[to_number(x) for x in task] for task in replicate] for replicate in content["values"]]),
        metrics=metrics,
        rewards=tuple(content.get("rewards", metrics)),
        tasks=tuple(str(task["id"]) for task in tasks),
        subjects=tuple(str(task.get("subject") or task["id"]) for task in tasks),
        kinds=tuple(str(task.get("kind") or "") for task in tasks),
        prompts=tuple(str(task.get("prompt") or "") for task in tasks),
        iteration=int(content["iteration"]),
        permitted=np.array([[to_number(x) for x in task] for task in permitted]) if permitted else None,
    )


def to_number(value: Any) -> float:
    """A number from JSON; NaN for null and for anything that is not a number."""
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan


# ---- intervals


class Estimate(NamedTuple):
    """A mean and its 95 % interval; `low` and `high` are NaN where one subject or none was scored."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """For a change: rose, fell, or unclear if the interval contains 0 or there is no interval."""
        rounding = 1e-6 * (self.high - self.low)  # the bootstrap is exact to float32
        return "rose" if self.low > rounding else "fell" if self.high < -rounding else "unclear"

    @property
    def tone(self) -> str:
        """The colour in tables: rose or fell. It differs from `verdict` where less is better."""
        return self.verdict

    @property
    def plain(self) -> bool:
        """Whether it is a level, shown without sign and colour, not a change."""
        return False


def estimates(interval: Iterable[Any]) -> list[Estimate]:
    """The elements of an `Interval` of vectors."""
    return [Estimate(*bounds) for bounds in zip(*(vector.tolist() for vector in interval), strict=True)]


class Change(NamedTuple):
    """One metric of two policy states on the same tasks with the same noise."""

    metric: str
    before: Estimate
    after: Estimate
    difference: Estimate
    tasks: int
    """Number of tasks that are scored in both."""
    subjects: int
    unscored: int
    """Number of tasks that are not scored in both."""
    complete: tuple[int, int] = (0, 0)
    """Number of images with a score of exactly 1, before and after."""
    images: tuple[int, int] = (0, 0)
    """Number of scored images, before and after."""
    completed: Estimate = Estimate(np.nan, np.nan, np.nan)
    """The paired change of the share of images with a score of exactly 1."""


def estimate(values: np.ndarray, subjects: Sequence[str]) -> Estimate:
    """Mean of the finite values (tasks,), and its interval over subjects. The resamples are the same in every call."""
    return _estimate_columns(values[:, None], subjects)[0]


def _estimate_columns(values: np.ndarray, subjects: Sequence[str]) -> list[Estimate]:
    """`estimate` for each column of (tasks, columns), which are finite for the same tasks and share the resamples."""
    import torch

    from customized_grpo.functional.statistics import mean_interval

    scored = np.isfinite(values).min(axis=1)
    if not scored.any():
        return [Estimate(np.nan, np.nan, np.nan)] * values.shape[1]
    clusters = [subject for subject, kept in zip(subjects, scored, strict=True) if kept]
    generator = torch.Generator().manual_seed(0)
    interval = torch.stack(mean_interval(torch.from_numpy(values[scored])[None], clusters, generator))
    bounded = len(set(clusters)) > 1
    return [Estimate(v, *_snapped(low, high)) if bounded else Estimate(v, np.nan, np.nan)
            for v, low, high in interval.T.tolist()]  # fmt: skip


def _snapped(low: float, high: float) -> tuple[float, float]:
    """The bounds, with 0 in place of a bound that differs from 0 only by float32 rounding."""
    rounding = 1e-6 * (high - low)
    return (0.0 if abs(low) < rounding else low), (0.0 if abs(high) < rounding else high)


def level(scores: Scores, metric: str) -> Estimate:
    """Mean of a metric over the scored tasks."""
    return estimate(scores.per_task(metric), scores.subjects)


def change(before: Scores, after: Scores, metric: str) -> Change:
    """Paired change of a metric, over the tasks that are scored in both."""
    first, last = _paired(before, after, Scores.per_task, metric)
    fewer, more = _paired(before, after, Scores.complete, metric)
    both = np.isfinite(first)
    kept = {task for task, scored in zip(before.tasks, both, strict=True) if scored}
    columns = np.stack([first, last, last - first, more - fewer], axis=1)
    earlier, later, moved, completed = _estimate_columns(columns, before.subjects)
    images = [s.column(metric)[:, [task in kept for task in s.tasks]] for s in (before, after)]
    return Change(
        metric=metric,
        before=earlier,
        after=later,
        difference=moved,
        tasks=int(both.sum()),
        subjects=len({subject for subject, kept in zip(before.subjects, both, strict=True) if kept}),
        unscored=int((~both).sum()),
        complete=(int((images[0] == 1).sum()), int((images[1] == 1).sum())),
        images=(int(np.isfinite(images[0]).sum()), int(np.isfinite(images[1]).sum())),
        completed=completed,
    )


def _paired(
    before: Scores, after: Scores, per_task: Callable[[Scores, str], np.ndarray], metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """(tasks,) values before and after, NaN in both where a task is not scored in both."""
    later = dict(zip(after.tasks, per_task(after, metric), strict=True))
    first = per_task(before, metric)
    last = np.array([later.get(task, np.nan) for task in before.tasks])
    both = np.isfinite(first) & np.isfinite(last)
    return np.where(both, first, np.nan), np.where(both, last, np.nan)


def worst_gain(before: Scores, after: Scores) -> float:
    """The smallest change of a reward, in standard deviations over the tasks before; NaN if none is defined."""
    gains = []
    for reward in before.rewards:
        first, last = _paired(before, after, Scores.per_task, reward)
        if np.isfinite(first).any() and (spread := np.nanstd(before.per_task(reward))) > 0:
            gains.append(np.nanmean(last - first) / spread)
    return float(min(gains, default=np.nan))


def is_share(evaluations: Sequence[Scores], metric: str) -> bool:
    """Whether every score of a metric lies between 0 and 1."""
    found = _finite(evaluations, metric)
    return bool(len(found) and ((found >= 0) & (found <= 1)).all())


def is_yes_or_no(evaluations: Sequence[Scores], metric: str) -> bool:
    """Whether every score of a metric is 0 or 1, so that images can be counted."""
    found = _finite(evaluations, metric)
    return bool(len(found) and np.isin(found, (0, 1)).all())


def _finite(evaluations: Sequence[Scores], metric: str) -> np.ndarray:
    found = np.concatenate([scores.column(metric).ravel() for scores in evaluations] or [np.empty(0)])
    return found[np.isfinite(found)]


def since_first(evaluations: Sequence[Scores], metric: str) -> list[Estimate]:
    """The level at every evaluation, surrounded by the interval of its paired change since the first one.

    Subjects differ far more from each other than over training, so this interval, not that of the level, shows what
    training did. The first evaluation has no interval, unless it is the only one. If all scores are between 0 and 1,
    so is the interval.
    """
    if len(evaluations) == 1:
        return [level(evaluations[0], metric)]
    found = [Estimate(float(finite_mean(scores.per_task(metric))), np.nan, np.nan) for scores in evaluations]
    bounds = (0.0, 1.0) if is_share(evaluations, metric) else (-np.inf, np.inf)
    for n, scores in enumerate(evaluations[1:], start=1):
        first, last = _paired(evaluations[0], scores, Scores.per_task, metric)
        value, moved = found[n].value, estimate(last - first, evaluations[0].subjects)
        low, high = np.clip([value + (moved.low - moved.value), value + (moved.high - moved.value)], *bounds)
        found[n] = Estimate(value, float(low), float(high))
    return found
