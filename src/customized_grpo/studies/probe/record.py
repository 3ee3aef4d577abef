"""The probe folder: probe.json, config.yaml, a file for each finished step. A kill loses one step at most."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.policies.contract import Policy
from customized_grpo.settings.identity import result_settings
from customized_grpo.store import Folder
from customized_grpo.studies.probe.measure import Branches, Probe
from customized_grpo.train.evaluation import cluster


class ProbeFolder(Folder):
    """PROBE/: probe.json, config.yaml, steps/, findings.json, time_weights.json, probe.html, plots/."""

    KIND, MARKER, INFO, COMMAND = "probe", "probe.json", "probe.json", "cgrpo probe"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.config = self.path / "config.yaml"
        self.steps = self.path / "steps"
        self.findings = self.path / "findings.json"
        self.time_weights = self.path / "time_weights.json"

    def described(self) -> dict[str, Any]:
        """probe.json.

        Raises:
            UserError: if it is damaged.
        """
        return _read_json(self.info)

    def save(self, branches: Branches) -> None:
        """Write one finished measurement, whole or not at all."""
        content = {
            "steps": branches.steps,
            "rewards": to_json(branches.rewards),
            "gram": None if branches.gram is None else to_json(branches.gram),
            "seconds": round(branches.seconds, 3),
        }
        self.write(f"steps/{branches.name}.json", json.dumps(content))

    def finished(self) -> dict[tuple[int, ...], Branches]:
        """What has been measured so far, by its stochastic steps.

        Raises:
            UserError: if a file is damaged.
        """
        found: dict[tuple[int, ...], Branches] = {}
        for path in sorted(self.steps.glob("*.json")):
            content = _read_json(path)
            try:
                gram = content["gram"]
                branches = Branches(
                    tuple(content["steps"]),
                    from_json(content["rewards"], torch.float32),
                    None if gram is None else from_json(gram, torch.float64),
                    content["seconds"],
                )
                assert branches.rewards.ndim == 3
            except (KeyError, TypeError, ValueError, AssertionError):
                raise _damaged(path) from None
            found[branches.steps] = branches
        return found


@dataclass(frozen=True)
class Identity:
    """What a probe measures. Steps of probes that differ in any of it must not be mixed."""

    rewards: list[str]
    examples: list[dict[str, str]]
    """id, subject and prompt of each."""
    settings: dict[str, Any]
    num_inference_steps: int
    sigmas: list[float]
    weights: str
    """Digest of the policy's trainable tensors."""

    @classmethod
    def of(cls, probe: Probe) -> "Identity":
        examples = [{"id": e.id, "subject": cluster(e), "prompt": e.prompt} for e in probe.examples]
        sigmas = probe.trajectories()[0].sigmas.tolist()
        return cls(
            list(probe.rewards), examples, result_settings(probe.settings), probe.num_inference_steps, sigmas,
            fingerprint(probe.policy),
        )  # fmt: skip


def fingerprint(policy: Policy) -> str:
    """A digest of the trainable tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(policy.trainable_state().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def to_json(values: Tensor) -> Any:
    """Nested lists; a number that is not finite becomes null."""
    return _nested(values.tolist())


def from_json(values: Any, dtype: torch.dtype) -> Tensor:
    """Inverse of `to_json`; null becomes NaN."""

    def filled(value: Any) -> Any:
        return [filled(v) for v in value] if isinstance(value, list) else math.nan if value is None else value

    return torch.tensor(filled(values), dtype=dtype)


def _nested(value: Any) -> Any:
    if isinstance(value, Sequence):
        return [_nested(v) for v in value]
    return value if math.isfinite(value) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _damaged(path) from None
    if not isinstance(content, dict):
        raise _damaged(path)
    return content


def _damaged(path: Path) -> UserError:
    return UserError(f"'{path}' is damaged; remove it and go on with cgrpo probe --resume, which measures it again.")
