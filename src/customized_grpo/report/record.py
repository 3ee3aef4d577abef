"""A run folder as numbers. Whatever a killed or unfinished run left is read; what could not be read is said."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from customized_grpo.errors import UserError
from customized_grpo.store.run import RunFolder


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on the held-out tasks, with the same noise at every iteration."""

    iteration: int
    metrics: tuple[str, ...]
    """The rewards that were trained on, and measures that were not."""
    rewards: tuple[str, ...]
    """Those of `metrics` that were trained on."""
    tasks: tuple[str, ...]
    subjects: tuple[str, ...]
    """The subject of each task: intervals resample subjects, not pictures."""
    values: np.ndarray
    """(replicates, tasks, metrics) float64; NaN where a metric could not score."""

    def per_task(self, metric: str) -> np.ndarray:
        """(tasks,) mean over the scored replicates; NaN where there is none, or no such metric."""
        if metric not in self.metrics:
            return np.full(len(self.tasks), np.nan)
        column = self.values[:, :, self.metrics.index(metric)]
        scored = np.isfinite(column)
        count = scored.sum(axis=0)
        total = np.where(scored, column, 0.0).sum(axis=0)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)


@dataclass(frozen=True)
class RunRecord:
    """Everything a run folder holds, read once."""

    folder: Path
    info: dict[str, Any]
    """run.json; empty if there is none."""
    config: str
    """config.yaml as text; empty if there is none."""
    rows: tuple[dict[str, Any], ...]
    """metrics.jsonl, one per iteration, ascending."""
    evaluations: tuple[Evaluation, ...]
    """Ascending by iteration."""
    problems: tuple[str, ...]
    """One sentence for each thing that is there but could not be read."""

    @property
    def name(self) -> str:
        return str(self.info.get("name") or self.folder.name)

    @property
    def status(self) -> str:
        """running, finished, interrupted, failed, unknown, or killed: its process ended without a word."""
        return str(self.info.get("status") or "unknown")

    @property
    def summary(self) -> dict[str, Any]:
        return _mapping(self.info.get("summary"))

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names in column order, from whichever file knows them."""
        if names := self.summary.get("rewards"):
            return tuple(str(name) for name in names)
        if self.evaluations:
            return self.evaluations[-1].rewards
        logged = (re.fullmatch(r"reward/(.+)/mean", key) for row in self.rows for key in row)
        return tuple(dict.fromkeys(match[1] for match in logged if match))

    @property
    def metrics(self) -> tuple[str, ...]:
        """All evaluated metrics, rewards first."""
        known = (metric for evaluation in self.evaluations for metric in evaluation.metrics)
        return tuple(dict.fromkeys((*self.rewards, *known)))

    @property
    def iterations(self) -> np.ndarray:
        """(rows,) int64."""
        return np.array([row["iteration"] for row in self.rows], dtype=np.int64)

    def series(self, key: str) -> np.ndarray:
        """(rows,) float64 of one logged metric; NaN where it was not logged."""
        return np.array([_number(row.get(key)) for row in self.rows], dtype=np.float64)

    def held_out(self, metric: str) -> np.ndarray:
        """(n,) every held-out value of one metric, over all evaluations; NaN where it could not score."""
        columns = [e.values[:, :, e.metrics.index(metric)].ravel() for e in self.evaluations if metric in e.metrics]
        return np.concatenate(columns) if columns else np.empty(0)

    @property
    def planned_iterations(self) -> int | None:
        import yaml

        try:
            config = yaml.safe_load(self.config)
        except yaml.YAMLError:
            return None
        planned = _mapping(_mapping(config).get("training")).get("iterations")
        return planned if isinstance(planned, int) else None


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: if there is no such folder or it holds no run. A damaged file is no error: see `problems`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; give the folder of a run, such as runs/NAME.")
    if not any((folder / name).is_file() for name in ("run.json", "config.yaml", "metrics.jsonl")):
        raise UserError(
            f"{folder} is not a run: it holds none of run.json, config.yaml and metrics.jsonl; "
            "give the folder that `cgrpo train` wrote."
        )
    problems: list[str] = []
    info = _read_info(folder / "run.json", problems)
    config = _read_text(folder / "config.yaml", problems)
    run = RunFolder(folder)
    if info.get("status") == "running":
        info["status"] = run.status
    rows = _read_rows(run, problems)
    evaluations = _read_evaluations(folder / "evaluations", problems)
    return RunRecord(folder, info, config, rows, evaluations, tuple(problems))


def _read_text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        problems.append(f"There is no {path.name}.")
    except OSError as error:
        problems.append(f"{path.name} could not be read ({error.strerror}).")
    return ""


def _read_info(path: Path, problems: list[str]) -> dict[str, Any]:
    text = _read_text(path, problems)
    try:
        return _mapping(json.loads(text)) if text else {}
    except json.JSONDecodeError:
        problems.append(f"{path.name} is damaged: it is not JSON.")
        return {}


def _read_rows(run: RunFolder, problems: list[str]) -> tuple[dict[str, Any], ...]:
    """The last line of an iteration counts: a resumed run writes again what it had not saved."""
    try:
        lines = run.metric_lines()
    except OSError as error:
        problems.append(f"{run.metrics.name} could not be read ({error.strerror}).")
        return ()
    if not run.metrics.exists():
        problems.append(f"There is no {run.metrics.name}.")
    rows = {row["iteration"]: row for row in lines.rows}
    if list(lines.damaged) == [lines.count]:
        problems.append(
            f"The last line of {run.metrics.name} is cut off (the run was stopped while writing it); it is left out."
        )
    elif lines.damaged:
        numbers = ", ".join(map(str, [*lines.damaged][:5])) + (", ..." if len(lines.damaged) > 5 else "")
        problems.append(
            f"{len(lines.damaged)} of {lines.count} lines of {run.metrics.name} are damaged and left out "
            f"(line {numbers})."
        )
    return tuple(rows[iteration] for iteration in sorted(rows))


def _read_evaluations(folder: Path, problems: list[str]) -> tuple[Evaluation, ...]:
    found: dict[int, Evaluation] = {}
    for path in sorted(folder.glob("iteration-*.json")):
        try:
            evaluation = read_evaluation(path)
        except (OSError, ValueError):
            problems.append(f"{folder.name}/{path.name} is damaged and left out.")
        else:
            found[evaluation.iteration] = evaluation
    return tuple(found[iteration] for iteration in sorted(found))


def read_evaluation(path: Path) -> Evaluation:
    """One evaluation file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged.
    """
    text = path.read_text(encoding="utf-8")
    try:
        return _parse_evaluation(json.loads(text))
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError) as error:
        raise ValueError(f"'{path}' is damaged ({type(error).__name__}: {error})") from error


def _parse_evaluation(content: dict[str, Any]) -> Evaluation:
    metrics, tasks = tuple(content["metrics"]), content["tasks"]
    values = np.array([[[_number(x) for x in task] for task in replicate] for replicate in content["values"]])
    if values.shape[1:] != (len(tasks), len(metrics)):
        raise ValueError(f"values have shape {values.shape}, expected (replicates, {len(tasks)}, {len(metrics)})")
    return Evaluation(
        iteration=int(content["iteration"]),
        metrics=metrics,
        rewards=tuple(content.get("rewards", metrics)),
        tasks=tuple(str(task["id"]) for task in tasks),
        subjects=tuple(str(task.get("subject") or task["id"]) for task in tasks),
        values=values,
    )


def _number(value: Any) -> float:
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
