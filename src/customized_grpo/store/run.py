"""The run folder: what was configured, measured and drawn, on disk from the first second on."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from customized_grpo.store import files
from customized_grpo.store.files import Lines
from customized_grpo.store.folder import Folder


class RunFolder(Folder):
    """RUN/: config.yaml, run.json, metrics.jsonl, evaluations/, samples/, checkpoints/, report.html."""

    KIND, MARKER, INFO, COMMAND = "run", "config.yaml", "run.json", "cgrpo train"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.evaluations = self.path / "evaluations"
        self.metrics = self.path / "metrics.jsonl"
        self.config = self.path / self.MARKER

    def adopt(self, config_yaml: str, iteration: int) -> None:
        """Let a resumed run have other settings: config.yaml always holds those in force.

        What held until `iteration` stays as config-until-NNNNNN.yaml. Where the folder lies is no change.
        """
        text = self.config.read_text(encoding="utf-8")
        before = yaml.safe_load(text)
        after = {**before, **yaml.safe_load(config_yaml)}
        if {**after, "output": None} == {**before, "output": None}:
            return
        kept = f"config-until-{iteration:06d}.yaml"
        if not (self.path / kept).exists():
            self.write(kept, text)
        self.write(self.MARKER, yaml.safe_dump(after, sort_keys=False, width=100))

    def log(self, record: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl; numbers that are not finite become null."""
        self.append(self.metrics.name, record)

    def metric_lines(self) -> Lines:
        """metrics.jsonl; a line that is damaged or names no iteration does not hide the others."""
        return self.lines(self.metrics.name, iteration=int)

    def records(self) -> list[dict[str, Any]]:
        """The rows of `metric_lines`."""
        return self.metric_lines().rows

    def rewind(self, iteration: int) -> None:
        """Drop what was logged after `iteration`, because a resumed run will do those iterations again.

        Damaged lines go to metrics-damaged.jsonl: they may be of iterations that are kept.
        """
        found = self.metric_lines()
        kept = [row for row in found.rows if row["iteration"] <= iteration]
        if found.damaged:
            aside = self.path / "metrics-damaged.jsonl"
            before = aside.read_bytes() if aside.exists() else b""
            files.write(aside, before + b"".join(line + b"\n" for line in found.damaged.values()))
        if found.damaged or len(kept) < len(found.rows):
            self.write(self.metrics.name, "".join(json.dumps(row) + "\n" for row in kept))
        pictures = iteration_files(self.samples, ".png"), iteration_files(self.samples / "cells", ".png", "*-")
        for some in (iteration_files(self.evaluations, ".json"), *pictures):
            for number, path in some:
                if number > iteration:
                    path.unlink()

    def evaluation(self, iteration: int) -> Path:
        return self.evaluations / f"iteration-{iteration:06d}.json"


def iteration_files(folder: Path, suffix: str, prefix: str = "") -> Iterator[tuple[int, Path]]:
    """(iteration, path) of every file `PREFIXiteration-000010SUFFIX` in `folder`, ascending."""
    for path in sorted(folder.glob(f"{prefix}iteration-*{suffix}")):
        if match := re.search(r"iteration-(\d+)$", path.name.removesuffix(suffix)):
            yield int(match[1]), path
