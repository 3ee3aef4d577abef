"""The run folder, which exists from the first second of a run, and its content as numbers.

Runs that were killed or are unfinished can be read too. Files that could not be read are named.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from customized_grpo.errors import UserError
from customized_grpo.store import files
from customized_grpo.store.files import Lines
from customized_grpo.store.folder import Folder
from customized_grpo.store.scores import Scores, read_scores, to_number, worst_gain
from customized_grpo.store.yaml_text import dump_yaml, parse_yaml


class RunFolder(Folder):
    """RUN/: config.yaml, run.json, metrics.jsonl, evaluations/, samples/, checkpoints/, report.html."""

    KIND, MARKER, INFO, COMMAND = "run", "config.yaml", "run.json", "train"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.evaluations = self.path / "evaluations"
        self.metrics = self.path / "metrics.jsonl"
        self.config = self.path / self.MARKER

    def adopt(self, config_yaml: str, iteration: int) -> None:
        """Record the settings of a resumed run: config.yaml always contains those in force.

        The settings until `iteration` are kept as config-until-NNNNNN.yaml. Another `output` is not a change.
        """
        text = files.read_text(self.config)
        before = parse_yaml(text, f"'{self.config}'") or {}
        after = {**before, **parse_yaml(config_yaml, "The configuration")}
        if {**after, "output": None} == {**before, "output": None}:
            return
        kept = f"config-until-{iteration:06d}.yaml"
        if not (self.path / kept).exists():
            self.write(kept, text)
        self.write(self.MARKER, dump_yaml(after))

    def log(self, record: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl; numbers that are not finite become null."""
        self.append(self.metrics.name, record)

    def metric_lines(self) -> Lines:
        """The lines of metrics.jsonl. A line that is damaged or has no iteration does not hide the others."""
        return self.lines(self.metrics.name, iteration=int)

    def records(self) -> list[dict[str, Any]]:
        """The rows of `metric_lines`."""
        return self.metric_lines().rows

    def rewind(self, iteration: int) -> None:
        """Remove what was logged after `iteration`, because a resumed run repeats those iterations.

        Damaged lines are moved to metrics-damaged.jsonl, because they may belong to iterations that are kept.
        """
        found = self.metric_lines()
        kept = [row for row in found.rows if row["iteration"] <= iteration]
        if found.damaged:
            aside = self.path / "metrics-damaged.jsonl"
            before = aside.read_bytes() if aside.exists() else b""
            files.write(aside, before + b"".join(line + b"\n" for line in found.damaged.values()))
        if found.damaged or len(kept) < len(found.rows):
            self.write(self.metrics.name, "".join(json.dumps(row) + "\n" for row in kept))
        cells = self.samples / "cells"
        images = iteration_files(self.samples, ".png"), iteration_files(cells, ".png", "*-")
        marks = iteration_files(cells, ".json", "*-"), iteration_files(cells, ".jpg", "*-")
        groups = (iteration_files(self.samples / "groups", *ending) for ending in ((".json",), (".jpg", "*-")))
        for some in (iteration_files(self.evaluations, ".json"), *images, *marks, *groups):
            for number, path in some:
                if number > iteration:
                    path.unlink()

    def evaluation(self, iteration: int) -> Path:
        return self.evaluations / f"iteration-{iteration:06d}.json"

    def best(self, iterations: Iterable[int]) -> tuple[int, float] | None:
        """The iteration with the largest held-out worst-reward gain, and that gain.

        None if none of these iterations was evaluated, or the base policy was not.
        """
        gains = self.gains(iterations)
        return max(gains.items(), key=lambda item: item[1], default=None)

    def gains(self, iterations: Iterable[int]) -> dict[int, float]:
        """The held-out worst-reward gain of each of these iterations that was evaluated."""
        gains: dict[int, float] = {}
        with suppress(OSError, ValueError):  # missing or damaged
            before = read_scores(self.evaluation(0))
            for iteration in iterations:
                with suppress(OSError, ValueError):
                    gain = worst_gain(before, read_scores(self.evaluation(iteration)))
                    gains |= {iteration: gain} if np.isfinite(gain) else {}
        return gains


def seconds(rows: Iterable[Mapping[str, Any]]) -> float:
    """The time of all stages in rows of metrics.jsonl."""
    return sum(value for row in rows for key, value in row.items() if key.startswith("seconds/") and value)


def iteration_files(folder: Path, suffix: str, prefix: str = "") -> Iterator[tuple[int, Path]]:
    """(iteration, path) of every file `PREFIXiteration-000010SUFFIX` in `folder`, ascending."""
    for path in sorted(folder.glob(f"{prefix}iteration-*{suffix}")):
        if match := re.search(r"iteration-(\d+)$", path.name.removesuffix(suffix)):
            yield int(match[1]), path


def image_of(cells: Path, task: int, what: str) -> Path:
    """An image of a task that `save_grid` wrote: as large as it was, or small."""
    large = cells / f"{task:03d}-{what}.png"
    return large if large.exists() else large.with_suffix(".jpg")


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder, read once."""

    folder: Path
    info: dict[str, Any]
    """run.json; empty if there is none."""
    config: str
    """config.yaml as text; empty if there is none."""
    rows: tuple[dict[str, Any], ...]
    """metrics.jsonl, one per iteration, ascending."""
    evaluations: tuple[Scores, ...]
    """Ascending by iteration."""
    problems: tuple[str, ...]
    """One sentence for each file that could not be read."""

    @property
    def name(self) -> str:
        return str(self.info.get("name") or self.folder.name)

    @property
    def status(self) -> str:
        """As `Folder.status`."""
        return str(self.info.get("status") or "unknown")

    @property
    def summary(self) -> dict[str, Any]:
        return _mapping(self.info.get("summary"))

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names in column order, from the first file that has them."""
        if names := self.summary.get("rewards"):
            return tuple(str(name) for name in names)
        if self.evaluations:
            return self.evaluations[-1].rewards
        logged = (re.fullmatch(r"reward/(.+)/mean", key) for row in self.rows for key in row)
        return tuple(dict.fromkeys(match[1] for match in logged if match))

    @property
    def metrics(self) -> tuple[str, ...]:
        """All evaluated metrics, rewards first."""
        known = (metric for scores in self.evaluations for metric in scores.metrics)
        return tuple(dict.fromkeys((*self.rewards, *known)))

    @property
    def iterations(self) -> np.ndarray:
        """(rows,) int64."""
        return np.array([row["iteration"] for row in self.rows], dtype=np.int64)

    def series(self, key: str) -> np.ndarray:
        """(rows,) float64: one logged metric; NaN where it was not logged."""
        return np.array([to_number(row.get(key)) for row in self.rows], dtype=np.float64)

    def held_out(self, metric: str) -> np.ndarray:
        """(n,) all held-out scores of one metric in all evaluations; NaN where it could not score."""
        columns = [scores.column(metric).ravel() for scores in self.evaluations if metric in scores.metrics]
        return np.concatenate(columns) if columns else np.empty(0)

    @property
    def planned_iterations(self) -> int | None:
        try:
            config = parse_yaml(self.config, "config.yaml")
        except UserError:
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
    run = RunFolder(folder)
    info = _read_info(run.info, problems)
    config = _read_text(run.config, problems)
    if info.get("status") == "running":
        info["status"] = run.status
    rows = _read_rows(run, problems)
    return RunRecord(folder, info, config, rows, _read_evaluations(run, problems), tuple(problems))


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
    except (ValueError, RecursionError):
        problems.append(f"{path.name} is damaged: it is not JSON.")
        return {}


def _read_rows(run: RunFolder, problems: list[str]) -> tuple[dict[str, Any], ...]:
    """The rows by iteration. The last one of an iteration counts, because a resumed run repeats unsaved iterations."""
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


def _read_evaluations(run: RunFolder, problems: list[str]) -> tuple[Scores, ...]:
    found: dict[int, Scores] = {}
    for path in sorted(run.evaluations.glob("iteration-*.json")):
        try:
            scores = read_scores(path)
        except (OSError, ValueError):
            problems.append(f"{run.evaluations.name}/{path.name} is damaged and left out.")
        else:
            found[scores.iteration] = scores
    return tuple(found[iteration] for iteration in sorted(found))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
