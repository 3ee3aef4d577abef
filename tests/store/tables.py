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
