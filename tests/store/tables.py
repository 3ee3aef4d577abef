"""Small tables of scores."""

from typing import Any

import numpy as np

from customized_grpo.store.scores import Scores

TASKS = ("a-0", "a-1", "b-0", "b-1", "c-0")
SUBJECTS = tuple(task[0] for task in TASKS)
BASE = np.array([0.1, 0.2, 0.3, 0.4, 0.5])


def table(iteration: int, *columns: Any, metrics: tuple[str, ...] = ("prompt", "identity")) -> Scores:
    """One replicate; a column is the scores of one metric on TASKS."""
    values = np.stack([np.asarray(column, dtype=float) for column in columns], axis=-1)[None]
    blank = ("",) * len(TASKS)
    return Scores(values, metrics, metrics[:2], TASKS, SUBJECTS, blank, ("a cat",) * len(TASKS), iteration)


def by_kind(iteration: int, metrics: tuple[str, ...], **kinds: Any) -> Scores:
    """One replicate; of each kind a column for each metric, or one number for all. Every task is of its own subject."""
    values, names = [], []
    for kind, columns in kinds.items():
        size = max(np.size(column) for column in columns)
        values.append(np.stack([np.broadcast_to(np.asarray(column, dtype=float), size) for column in columns], axis=-1))
        names += [f"{kind} {n}" for n in range(size)]
    of = tuple(name.split()[0] for name in names)
    blank = ("a cat",) * len(names)
    return Scores(np.concatenate(values)[None], metrics, metrics[:2], tuple(names), tuple(names), of, blank, iteration)


def ones(right: int, of: int) -> np.ndarray:
    """Images of which so many are right."""
    return np.arange(of) < right
