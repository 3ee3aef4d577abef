"""Checkpoints: complete or absent. A kill at any moment leaves the last good one."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.policies.contract import METADATA, Policy
from customized_grpo.store.files import DRAFT, checksum
from customized_grpo.train.sharding import holding, is_sharded

FORMAT = 1
"""Of state.json. Checkpoints of earlier versions have none, and no checksums."""
REPLACED = ".replaced"
"""Ending of a checkpoint while another takes its place."""


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
    objective: Mapping[str, Tensor] = field(default_factory=dict)
    """What the objective keeps, such as the weights of the old policy; empty if nothing."""


def save(
    folder: Path, state: TrainingState, policy: Policy, config_yaml: str, worst_reward_gain: float | None = None
) -> Path:
    """Write `folder/iteration-NNNNNN`, complete before it gets its name.

    The adapter in `adapter/` holds the averaged weights where there is an average: it is what evaluation measured. Its
    training.json says the iteration, and the held-out worst-reward gain if it is known.

    Raises:
        UserError: if it cannot be written, such as onto a full disk; the checkpoints before it are as they were.
    """
    final = folder / f"iteration-{state.iteration:06d}"
    draft, replaced = folder / f".{final.name}{DRAFT}", folder / f".{final.name}{REPLACED}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        _write(draft, state, policy, config_yaml, worst_reward_gain)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)  # `checkpoints` finds it under this name until the new one is in its place
        draft.rename(final)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is each of them, by who finds out
        shutil.rmtree(draft, ignore_errors=True)
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free / 2**20
        raise UserError(
            f"The checkpoint '{final}' could not be written ({' '.join(str(error).split())[:150]}; {free:,.0f} MiB are "
            f"free); make room or permit it. Checkpoints before it are as they were."
        ) from error
    _flush(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _write(draft: Path, state: TrainingState, policy: Policy, config_yaml: str, gain: float | None) -> None:
    draft.mkdir(parents=True)
    save_file(_portable(state.trainable), draft / "trainable.safetensors")
    if state.objective:
        save_file(_portable(state.objective), draft / "objective.safetensors")
    if state.ema is not None:
        save_file(_portable(state.ema), draft / "ema.safetensors")
    with _saved_weights(policy, state, draft):
        policy.save(draft / "adapter")
    facts = {"iteration": state.iteration, "worst_reward_gain": gain}
    (draft / "adapter" / METADATA).write_text(json.dumps(facts), encoding="utf-8")
    torch.save({"optimizer": state.optimizer, "scheduler": state.scheduler}, draft / "optimizer.pt")
    (draft / "config.yaml").write_text(config_yaml, encoding="utf-8")
    files = [path for path in sorted(draft.rglob("*")) if path.is_file()]
    content = {
        "format": FORMAT,
        "iteration": state.iteration,
        "progress": dict(state.progress),
        "files": {path.relative_to(draft).as_posix(): digest for path, digest in _digests(files)},
    }
    (draft / "state.json").write_text(json.dumps({**content, "sha256": checksum(content)}, indent=1), encoding="utf-8")
    for path in [*draft.rglob("*"), draft]:
        _flush(path)


@contextmanager
def _saved_weights(policy: Policy, state: TrainingState, draft: Path) -> Iterator[None]:
    """Inside it the policy has the averaged weights where there is an average, and of a sharded policy whole ones."""
    if is_sharded(policy):
        with holding(policy, state.ema or state.trainable):
            yield
        return
    try:
        if state.ema is not None:
            policy.load_trainable_state(state.ema)
        yield
    finally:
        if state.ema is not None:
            policy.load_trainable_state(load_file(draft / "trainable.safetensors"))


def load(checkpoint: Path) -> TrainingState:
    """Read a checkpoint. Nothing in it is unpickled beyond plain tensors and containers.

    Raises:
        UserError: if a file is missing, or any byte differs from what was written.
    """
    iteration, progress = verify(checkpoint, lambda name: not name.startswith("adapter/"))
    try:
        rest = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        ema, objective = checkpoint / "ema.safetensors", checkpoint / "objective.safetensors"
        return TrainingState(
            iteration=iteration,
            progress=progress,
            optimizer=rest["optimizer"],
            scheduler=rest["scheduler"],
            trainable=load_file(checkpoint / "trainable.safetensors"),
            ema=load_file(ema) if ema.exists() else None,
            objective=load_file(objective) if objective.exists() else {},
        )
    except Exception as error:  # without checksums, damage shows in whatever reads it
        raise damaged(checkpoint, f"{type(error).__name__}: {error}") from error


def verify(checkpoint: Path, wanted: Callable[[str], bool]) -> tuple[int, dict[str, Any]]:
    """Check the files of a checkpoint against the checksums in state.json, which earlier versions did not write.

    Args:
        checkpoint: the folder.
        wanted: whether to read a file, by its name relative to the folder.

    Returns:
        The iteration and the counters of the trainer.

    Raises:
        UserError: if a file is missing or changed.
    """
    try:
        content = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if not content.keys() & {"format", "files", "sha256"}:  # an earlier version's
            return int(content.pop("iteration")), content
        if content.pop("sha256") != checksum(content):
            raise ValueError("state.json is not as it was written")
        if content["format"] != FORMAT:
            raise UserError(
                f"The checkpoint '{checkpoint}' has format {content['format']}, and this version reads {FORMAT}; use "
                f"the version of customized-grpo that wrote it."
            )
        listed = {name: digest for name, digest in content["files"].items() if wanted(name)}
        for path, digest in _digests([checkpoint / name for name in listed]):
            name = path.relative_to(checkpoint).as_posix()
            if digest != listed[name]:
                raise ValueError(f"{name} is not as it was written")
        return content["iteration"], content["progress"]
    except UserError:
        raise
    except Exception as error:
        raise damaged(checkpoint, f"{type(error).__name__}: {error}") from error


def damaged(checkpoint: Path, reason: str) -> UserError:
    """What to say of a checkpoint that cannot be used."""
    return UserError(
        f"The checkpoint '{checkpoint}' is incomplete or damaged ({' '.join(reason.split())[:200]}); remove that "
        f"folder to go on from the one before it."
    )


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in a folder, oldest first."""
    found = {path.name: path for path in folder.glob(f".iteration-*{REPLACED}")}
    found = {name.removeprefix(".").removesuffix(REPLACED): path for name, path in found.items()}
    found |= {path.name: path for path in folder.glob("iteration-*") if path.is_dir()}
    return [found[name] for name in sorted(found)]


def iteration_of(checkpoint: Path) -> int:
    """The iteration in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix(".").removesuffix(REPLACED).split("-")[1])


def prune(folder: Path, keep: int, spare: int | None = None) -> None:
    """Remove what a kill left behind and, unless keep is 0, all but the newest `keep` checkpoints and `spare`."""
    found = checkpoints(folder)
    for left in folder.glob(".iteration-*"):
        if left not in found:
            shutil.rmtree(left, ignore_errors=True)
    for old in [path for path in found[:-keep] if iteration_of(path) != spare] if keep else []:
        hidden = old.rename(folder / f".{old.name.removeprefix('.')}{DRAFT}")  # half-removed it must not look whole
        shutil.rmtree(hidden, ignore_errors=True)


def _digests(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """SHA-256 of files, several at a time: hashing lets other threads run."""
    with ThreadPoolExecutor(4) as pool:
        yield from zip(paths, pool.map(_digest, paths), strict=True)


def _digest(path: Path) -> str:
    found, buffer = hashlib.sha256(), bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(memoryview(buffer)[:count])
    return found.hexdigest()


def _portable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _flush(path: Path) -> None:
    """Force a file, or the list of files in a folder, to the disk, so that a rename cannot overtake the contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
