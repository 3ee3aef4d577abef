"""The run folder: what was configured, measured and drawn, on disk from the first second on."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from accelerate.utils import LoggerType
from pydantic import field_validator

from customized_grpo.errors import UserError, nearest
from customized_grpo.settings import Role, Settings


class TrackingSettings(Settings):
    """Where metrics go besides metrics.jsonl."""

    log_with: Annotated[tuple[str, ...], Role.RUNTIME] = ("tensorboard",)
    """Trackers by accelerate's names: tensorboard, wandb, swanlab, trackio, ... One, a list, or [] for none."""
    project: Annotated[str, Role.RUNTIME] = "customized-grpo"
    """Project name shown by the tracker."""

    @field_validator("log_with", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def folder_by_time(home: str) -> Path:
    """A folder in `home` that does not exist yet, named by the time."""
    stem = datetime.now().strftime("%Y%m%d-%H%M%S")
    return next(p for i in range(1000) if not (p := Path(home) / (stem + (f"-{i}" if i else ""))).exists())


def check_empty(path: Path, is_a_file: str, go_on: str) -> None:
    """Raise UserError if something new cannot go there: what to say of a file, and of a folder that is in use."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{is_a_file}; name a folder that does not exist yet.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"The folder '{path}' holds something already; {go_on}")


def check_made(mark: Path, kind: str, command: str) -> None:
    """Raise UserError if a folder has not the file that marks it as a `kind`, which `command` makes."""
    if not mark.is_file():
        seen = f"has no {mark.name}" if mark.parent.is_dir() else "does not exist"
        raise UserError(
            f"'{mark.parent}' is not a {kind} folder: it {seen}. `{command}` makes one and prints its name."
        )


class RunFolder:
    """RUN/: config.yaml, run.json, metrics.jsonl, evaluations/, samples/, checkpoints/, report.html."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.yaml"
        self.info = path / "run.json"

    @classmethod
    def create(cls, path: Path | None) -> "RunFolder":
        """A new folder; None names it by the time under runs/.

        Raises:
            UserError: if the folder holds anything already, or cannot be written.
        """
        path = path or folder_by_time("runs")
        cls.check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise UserError if a new run cannot go there."""
        go_on = f"name another output, or go on with the run in it: cgrpo train --resume {path}"
        check_empty(path, f"output is '{path}', which is a file", go_on)

    @classmethod
    def existing(cls, path: str | Path) -> "RunFolder":
        """The folder of a run.

        Raises:
            UserError: if there is none.
        """
        folder = cls(Path(path))
        check_made(folder.config, "run", "cgrpo train")
        return folder

    def adopt(self, config_yaml: str, iteration: int) -> None:
        """Let a resumed run have other settings: config.yaml always holds those in force.

        What held until `iteration` stays as config-until-NNNNNN.yaml. Where the folder lies is no change.
        """
        text = self.config.read_text(encoding="utf-8")
        before = yaml.safe_load(text)
        after = {**before, **yaml.safe_load(config_yaml)}
        if {**after, "output": None} == {**before, "output": None}:
            return
        kept = self.path / f"config-until-{iteration:06d}.yaml"
        if not kept.exists():
            write_text(kept, text)
        write_text(self.config, yaml.safe_dump(after, sort_keys=False, width=100))

    def facts(self) -> dict[str, Any]:
        """What run.json says; nothing if it is missing or damaged."""
        try:
            found = json.loads(self.info.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def describe(self, **fields: Any) -> None:
        """Merge fields into run.json; a damaged one is kept as run-damaged.json."""
        known = self.facts()
        if not known and self.info.exists():
            self.info.replace(self.path / "run-damaged.json")
        write_text(self.info, json.dumps({**known, **fields}, indent=1, default=str))

    def log(self, record: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl; numbers that are not finite become null."""
        line = json.dumps({k: (v if v == v and abs(v) != float("inf") else None) for k, v in record.items()})
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def records(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl; a kill may leave the last one cut."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def rewind(self, iteration: int) -> None:
        """Drop what was logged after `iteration`, because a resumed run will do those iterations again."""
        kept = [record for record in self.records() if record["iteration"] <= iteration]
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        for path in [*self.evaluations.glob("iteration-*.json"), *self.samples.glob("iteration-*.png")]:
            if int(path.stem.split("-")[1]) > iteration:
                path.unlink()

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    def evaluation(self, iteration: int) -> Path:
        return self.evaluations / f"iteration-{iteration:06d}.json"


def check_trackers(settings: TrackingSettings) -> None:
    """Raise UserError if a tracker is unknown or not installed."""
    known = [tracker.value for tracker in LoggerType if tracker.value != "all"]
    for name in settings.log_with:
        if name not in known:
            raise UserError(f"tracking.log_with names '{name}'; there are {', '.join(known)}.{nearest(name, known)}")
        if not filter_trackers([name], "."):
            raise UserError(f"tracking.log_with names '{name}', which is not installed; pip install {name}.")


def start_trackers(accelerator: Accelerator, settings: TrackingSettings, run: RunFolder) -> None:
    """Start the trackers that the settings name, in the run folder."""
    if not settings.log_with:
        return
    accelerator.project_configuration.set_directories(str(run.path))
    accelerator.log_with = filter_trackers(list(settings.log_with), str(run.path))
    accelerator.init_trackers(settings.project, config={})


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that a kill leaves the old or the new one."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def provenance(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Versions, hardware and command line: what a number needs beside it."""
    packages = ("customized-grpo", "torch", "diffusers", "transformers", "accelerate", "peft")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "?"
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    else:
        hardware = f"{os.cpu_count()} CPU cores, {_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "command": list(command if command is not None else [Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions,
        "hardware": hardware,
        "started": now(),
        "finished": None,
        "status": "running",
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
