"""Checkpoints: complete or absent. A kill at any moment leaves the last good one."""

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.policies.contract import Policy
from customized_grpo.settings import Role, Settings


class CheckpointSettings(Settings):
    """When checkpoints are written. The last iteration always is."""

    every: Annotated[int, Role.RUNTIME] = Field(default=10, ge=1)
    """Iterations between two checkpoints."""
    keep: Annotated[int, Role.RUNTIME] = Field(default=2, ge=0)
    """Newest checkpoints to keep; 0 keeps all."""


@dataclass(frozen=True)
class TrainingState:
    """What a resumed run needs to go on bit by bit."""

    iteration: int
    """Finished iterations. All random draws are functions of it, and so is the position in the data."""
    progress: Mapping[str, Any]
    """Counters of the trainer, as JSON."""
    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    trainable: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    rng: list[Tensor]
    """State of torch's global generator on every process: no draw of ours uses it, a plug-in's might."""


def save(folder: Path, state: TrainingState, policy: Policy, config_yaml: str) -> Path:
    """Write `folder/iteration-NNNNNN`, complete before it gets its name.

    The adapter in `adapter/` holds the averaged weights where there is an average: it is what evaluation measured.

    Raises:
        UserError: if it cannot be written, such as onto a full disk; the checkpoints before it are as they were.
    """
    final = folder / f"iteration-{state.iteration:06d}"
    draft = folder / f".{final.name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        _write(draft, state, policy, config_yaml)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is each of them, by who finds out
        shutil.rmtree(draft, ignore_errors=True)
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free / 2**20
        raise UserError(
            f"The checkpoint '{final}' could not be written ({' '.join(str(error).split())[:150]}; {free:,.0f} MiB are "
            f"free); make room or permit it. Checkpoints before it are as they were."
        ) from error
    if final.exists():
        shutil.rmtree(final)
    draft.rename(final)
    _flush(folder)
    return final


def _write(draft: Path, state: TrainingState, policy: Policy, config_yaml: str) -> None:
    draft.mkdir(parents=True)
    save_file(_portable(state.trainable), draft / "trainable.safetensors")
    if state.ema is not None:
        save_file(_portable(state.ema), draft / "ema.safetensors")
        policy.load_trainable_state(state.ema)
    try:
        policy.save(draft / "adapter")
    finally:
        if state.ema is not None:
            policy.load_trainable_state(load_file(draft / "trainable.safetensors"))
    torch.save({"optimizer": state.optimizer, "scheduler": state.scheduler, "rng": state.rng}, draft / "optimizer.pt")
    (draft / "config.yaml").write_text(config_yaml, encoding="utf-8")
    progress = {"iteration": state.iteration, **state.progress}
    (draft / "state.json").write_text(json.dumps(progress, indent=1), encoding="utf-8")
    _flush(draft)


def load(checkpoint: Path) -> TrainingState:
    """Read a checkpoint. Nothing in it is unpickled beyond plain tensors and containers.

    Raises:
        UserError: if a file is missing or damaged.
    """
    try:
        progress = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        rest = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        ema = checkpoint / "ema.safetensors"
        return TrainingState(
            iteration=progress.pop("iteration"),
            progress=progress,
            optimizer=rest["optimizer"],
            scheduler=rest["scheduler"],
            rng=rest["rng"],
            trainable=load_file(checkpoint / "trainable.safetensors"),
            ema=load_file(ema) if ema.exists() else None,
        )
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"The checkpoint '{checkpoint}' is incomplete or damaged ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); remove that folder to go on from the one before it."
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("iteration-*") if p.is_dir()) if folder.is_dir() else []


def prune(folder: Path, keep: int) -> None:
    """Remove drafts that a kill left behind and, unless keep is 0, all but the newest `keep` checkpoints."""
    for draft in folder.glob(".iteration-*.partial"):
        shutil.rmtree(draft, ignore_errors=True)
    for old in checkpoints(folder)[: -keep or None] if keep else []:
        shutil.rmtree(old)


def _portable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _flush(folder: Path) -> None:
    """Force the folder and its files to disk, so that the rename cannot overtake the contents."""
    for path in [*(p for p in folder.rglob("*") if p.is_file() and ".partial" in str(p)), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
