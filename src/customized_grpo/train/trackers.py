"""Trackers besides metrics.jsonl, and what a number needs beside it: versions, hardware, memory."""

import os
import platform
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from customized_grpo.errors import UserError, nearest
from customized_grpo.shell import program
from customized_grpo.store.folder import now
from customized_grpo.store.run import RunFolder
from customized_grpo.store.scores import Scores
from customized_grpo.train.settings import TrackingSettings

TAKE_IMAGES = ("tensorboard", "wandb", "swanlab", "clearml")
"""Trackers to which accelerate hands lists of images."""


def check_trackers(settings: TrackingSettings) -> None:
    """Raise UserError if a tracker is unknown or not installed."""
    known = [tracker.value for tracker in LoggerType if tracker.value != "all"]
    for name in settings.log_with:
        if name not in known:
            raise UserError(f"tracking.log_with names '{name}'; there are {', '.join(known)}.{nearest(name, known)}")
        if LoggerType(name) not in get_available_trackers():
            raise UserError(
                f"tracking.log_with names '{name}', which is not installed; {program('pip')} install {name}."
            )


def start_trackers(accelerator: Accelerator, settings: TrackingSettings, run: RunFolder) -> None:
    """Start the trackers that the settings name, in the run folder.

    Raises:
        UserError: if one does not start, such as W&B where nobody is logged in.
    """
    if not settings.log_with:
        return
    accelerator.project_configuration.set_directories(str(run.path))
    accelerator.log_with = filter_trackers(list(settings.log_with), str(run.path))
    try:
        accelerator.init_trackers(settings.project, config={})
    except Exception as error:
        accelerator.trackers = []
        raise UserError(
            f"tracking.log_with is {list(settings.log_with)}, and a tracker did not start ({_brief(error)}); log in to "
            f"it, or leave it out."
        ) from error


def track(accelerator: Accelerator, record: Mapping[str, float]) -> None:
    """Hand a line of metrics.jsonl to the trackers. If one fails, the run goes on without them."""
    values = {k: v for k, v in record.items() if k != "iteration"}
    _deliver(accelerator, lambda: accelerator.log(values, step=int(record["iteration"])))


def track_evaluation(accelerator: Accelerator, scores: Scores, grid: Path) -> None:
    """Hand the means of a held-out evaluation to the trackers, in all and by kind, and its sample grid as an image.

    Args:
        accelerator: with the trackers.
        scores: of the evaluation.
        grid: file of the sample grid; there may be none.
    """
    means = {f"held_out/{metric}": value for metric, value in scores.means().items()}
    for kind in scores.distinct_kinds():
        for metric, value in scores.of_kind(kind).means().items():
            means[f"held_out/{kind or 'no kind'}/{metric}"] = value

    def send() -> None:
        accelerator.log({name: value for name, value in means.items() if np.isfinite(value)}, step=scores.iteration)
        if not grid.is_file():
            return
        with Image.open(grid) as opened:
            images = np.asarray(opened.convert("RGB"))[None]
        for tracker in accelerator.trackers:
            if tracker.name in TAKE_IMAGES:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": images}, step=scores.iteration, **layout)  # pyright: ignore[reportAttributeAccessIssue]

    _deliver(accelerator, send)


def _deliver(accelerator: Accelerator, send: Callable[[], None]) -> None:
    try:
        send()
    except Exception as error:
        accelerator.trackers = []
        warnings.warn(
            f"A tracker failed ({_brief(error)}); the run goes on without trackers, and metrics.jsonl has everything.",
            stacklevel=1,
        )


def end_training(accelerator: Accelerator) -> None:
    """Finish the trackers and leave the process group."""
    try:
        accelerator.end_training()
    except Exception as error:
        accelerator.trackers = []
        warnings.warn(f"A tracker did not finish ({_brief(error)}); metrics.jsonl has everything.", stacklevel=1)
        accelerator.end_training()


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def provenance() -> dict[str, Any]:
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
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": versions,
        "hardware": hardware,
        "started": now(),
    }


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
