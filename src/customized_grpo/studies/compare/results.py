"""A grid's folder as numbers. Only whole cells of the grid count; what is missing or left out is said."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from customized_grpo.config import load_config
from customized_grpo.errors import UserError
from customized_grpo.store.run import RunRecord, read_run
from customized_grpo.store.scores import Scores, read_scores
from customized_grpo.studies.compare.cells import State, state
from customized_grpo.studies.compare.grid import Grid, base_config, base_evaluation, cells, differences, open_grid
from customized_grpo.studies.compare.methods import BASE, find_method


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison's folder holds, read once."""

    folder: Path
    grid: Grid
    base: Scores
    runs: dict[str, dict[int, RunRecord]]
    """Method to seed to finished run; methods in the grid's order, without those that have no finished run."""
    states: dict[str, State]
    """Of all cells, by name."""
    problems: tuple[str, ...]
    """One sentence for each thing that is left out."""

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(self.runs)

    @property
    def rewards(self) -> tuple[str, ...]:
        return self.base.rewards

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.base.metrics

    @property
    def iterations(self) -> tuple[int, ...]:
        """Evaluated in every run, ascending; the first is 0, the base policy."""
        each = [{e.iteration for e in run.evaluations} for seeds in self.runs.values() for run in seeds.values()]
        return tuple(sorted(set.intersection(*each) | {0}))

    def title(self, method: str) -> str:
        return find_method(method, self.grid.own_methods).title or method

    def base_scores(self) -> np.ndarray:
        """(tasks, metrics) means over the scored replicates; NaN where there is none."""
        return np.stack([self.base.per_task(metric) for metric in self.metrics], axis=-1)

    def scores(self) -> np.ndarray:
        """(seeds, tasks, methods, iterations, metrics); NaN where a cell is not finished or a metric could not score.

        Seeds, methods and iterations in the order of `grid.seeds`, `methods` and `iterations`.
        """
        shape = (len(self.grid.seeds), len(self.base.tasks), len(self.methods), len(self.iterations), len(self.metrics))
        values = np.full(shape, np.nan)
        base = self.base_scores()
        for m, runs in enumerate(self.runs.values()):
            for s, seed in enumerate(self.grid.seeds):
                if seed not in runs:
                    continue
                at = {evaluation.iteration: evaluation for evaluation in runs[seed].evaluations}
                for i, iteration in enumerate(self.iterations):
                    if iteration == 0:
                        values[s, :, m, i] = base
                        continue
                    for k, metric in enumerate(self.metrics):
                        values[s, :, m, i, k] = at[iteration].per_task(metric)
        return values


def read_comparison(folder: Path, *, trust_code: bool = False) -> Comparison:
    """Read the folder of a comparison. `trust_code` runs a step plan of someone else's, to count gradient steps.

    Raises:
        UserError: if it is none, nothing in it is finished, or it holds runs that do not compare.
    """
    grid = open_grid(folder, trust_code=trust_code)
    base = _read_base(grid, folder)
    states: dict[str, State] = {}
    runs: dict[str, dict[int, RunRecord]] = {}
    problems: list[str] = []
    waiting: list[str] = []
    found = cells(grid, folder)
    for cell in found:
        states[cell.name] = where = state(cell)
        if where.status == "waiting" and not where.iteration and not where.note:
            waiting.append(cell.name)
            continue
        if where.status != "finished":
            reason = f" ({where.note})" if where.note else f" after iteration {where.iteration}"
            problems.append(f"{cell.name} is {where.status}{reason} and left out.")
            continue
        run = read_run(cell.folder)
        _check_pairs(cell.name, run, base)
        problems += [f"{cell.name}: {problem}" for problem in run.problems]
        runs.setdefault(cell.method, {})[cell.seed] = run
    if not runs:
        raise UserError(
            f"No cell of '{folder}' is finished yet; `cgrpo compare --status {folder}` shows where it stands."
        )
    known = {cell.folder for cell in found}
    others = sorted(path for path in (folder / "cells").glob("*/seed-*") if path not in known)
    problems += _together(waiting, "has not begun", "have not begun")
    problems += _together(
        [str(path.relative_to(folder)) for path in others], "is not in the grid", "are not in the grid"
    )
    ordered = {name: runs[name] for name in grid.methods if name in runs}
    return Comparison(folder, grid, base, ordered, states, tuple(problems))


def _together(names: list[str], one: str, many: str) -> list[str]:
    """One sentence for all runs that are left out for the same reason."""
    if len(names) < 2:
        return [f"{name} {one} and is left out." for name in names]
    return [f"{len(names)} runs {many} and are left out: {', '.join(names)}."]


def _read_base(grid: Grid, folder: Path) -> Scores:
    path = base_evaluation(folder)
    try:
        base = read_scores(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The base evaluation '{path}' is missing or damaged; remove '{path.parent}' and run "
            f"`cgrpo compare` on the grid again to measure it anew."
        ) from error
    config = path.parent / "config.yaml"
    if config.is_file() and (differ := differences(base_config(grid, folder), load_config(config))):
        raise UserError(f"The base evaluation in '{path.parent}' is not of this grid: {differ[0]}; move it away.")
    return base


def _check_pairs(name: str, run: RunRecord, base: Scores) -> None:
    """Raise UserError unless every evaluation is of the base's tasks, metrics and replicates."""
    for evaluation in run.evaluations:
        for what in ("tasks", "metrics", "rewards"):
            if getattr(evaluation, what) != getattr(base, what):
                raise UserError(
                    f"{name} was evaluated on other {what} than the base policy (iteration {evaluation.iteration}), "
                    f"so its scores do not pair; move '{run.folder}' away and run the grid again."
                )
        if len(evaluation.values) != len(base.values):
            raise UserError(f"{name} has {len(evaluation.values)} replicates, the base policy {len(base.values)}.")


__all__ = ["BASE", "Comparison", "read_comparison"]
