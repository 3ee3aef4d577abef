"""What an evaluation says, with its uncertainty: means and paired changes, resampled by subject."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from customized_grpo.page.blocks import Estimate
from customized_grpo.report.record import Evaluation


class Change(NamedTuple):
    """One metric at two evaluations of the same tasks with the same noise."""

    metric: str
    before: Estimate
    after: Estimate
    difference: Estimate
    tasks: int
    """How many tasks are scored in both."""
    subjects: int
    unscored: int
    """How many tasks are not."""


def level(evaluation: Evaluation, metric: str) -> Estimate:
    """Mean of a metric over the scored tasks of one evaluation."""
    return _estimate(evaluation.per_task(metric), evaluation.subjects)


def since_first(evaluations: Sequence[Evaluation], metric: str) -> list[Estimate]:
    """The level at every evaluation, with the interval of its paired change since the first one around it.

    Subjects differ far more from each other than from themselves, so this, not the interval of the level, shows what
    training did. The first evaluation has no interval, unless it is the only one.
    """
    if len(evaluations) == 1:
        return [level(evaluations[0], metric)]
    found = []
    for evaluation in evaluations:
        value = level(evaluation, metric).value
        moved = change(evaluations[0], evaluation, metric).difference
        width = (
            (np.nan, np.nan) if evaluation is evaluations[0] else (moved.low - moved.value, moved.high - moved.value)
        )
        found.append(Estimate(value, value + width[0], value + width[1]))
    return found


def change(before: Evaluation, after: Evaluation, metric: str) -> Change:
    """Paired change of a metric, over the tasks that both evaluations scored."""
    later = dict(zip(after.tasks, after.per_task(metric), strict=True))
    first = before.per_task(metric)
    last = np.array([later.get(task, np.nan) for task in before.tasks])
    both = np.isfinite(first) & np.isfinite(last)
    first, last = np.where(both, first, np.nan), np.where(both, last, np.nan)
    return Change(
        metric=metric,
        before=_estimate(first, before.subjects),
        after=_estimate(last, before.subjects),
        difference=_estimate(last - first, before.subjects),
        tasks=int(both.sum()),
        subjects=len({subject for subject, kept in zip(before.subjects, both, strict=True) if kept}),
        unscored=int((~both).sum()),
    )


def _estimate(values: np.ndarray, subjects: tuple[str, ...]) -> Estimate:
    """Mean of the finite values and its interval over subjects, from the same resamples every time."""
    import torch

    from customized_grpo.functional.statistics import mean_interval

    scored = np.isfinite(values)
    if not scored.any():
        return Estimate(np.nan, np.nan, np.nan)
    clusters = [subject for subject, kept in zip(subjects, scored, strict=True) if kept]
    generator = torch.Generator().manual_seed(0)
    estimate, low, high = mean_interval(torch.from_numpy(values[scored])[None], clusters, generator)
    if len(set(clusters)) < 2:
        return Estimate(float(estimate), np.nan, np.nan)
    return Estimate(float(estimate), float(low), float(high))
