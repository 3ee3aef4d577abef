"""The folder of a probe. Each finished step has a file, so that a kill loses at most one step."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from customized_grpo.policies.contract import Policy
from customized_grpo.settings.identity import result_settings
from customized_grpo.store import Folder, plain
from customized_grpo.studies.probe.measure import Branches, Probe
from customized_grpo.train.evaluation import cluster


class ProbeFolder(Folder):
    """PROBE/: probe.json, config.yaml, steps/, findings.json, time_weights.json, probe.html, probe.md, plots/."""

    KIND, MARKER, INFO, COMMAND = "probe", "probe.json", "probe.json", "probe"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.config, self.time_weights = self.path / "config.yaml", self.path / "time_weights.json"

    def save(self, branches: Branches) -> None:
        self.write(f"steps/{branches.name}.json", json.dumps(plain(vars(branches))))

    def finished(self) -> dict[tuple[int, ...], Branches]:
        """The finished measurements by their stochastic steps. Damaged files are ignored."""
        rows = self.rows("steps/*.json", steps=list, rewards=list, seconds=float)
        measured = (
            Branches(tuple(row["steps"]), _tensor(row["rewards"]).float(), _tensor(row.get("gram")), row["seconds"])
            for row in rows
        )
        return {branches.steps: branches for branches in measured}


def _tensor(values: Any) -> Any:
    """Nested lists of JSON as float64, NaN for null; None for None."""
    return None if values is None else torch.from_numpy(np.array(values, dtype=np.float64))


def identity(probe: Probe) -> dict[str, Any]:
    """What identifies a probe. Steps of probes that differ in any of this must not be mixed."""
    return {
        "rewards": list(probe.rewards),
        "examples": [{"id": e.id, "subject": cluster(e), "prompt": e.prompt} for e in probe.examples],
        "settings": result_settings(probe.settings),
        "num_inference_steps": probe.num_inference_steps,
        "sigmas": probe.trajectories[0].sigmas.tolist(),
        "weights": fingerprint(probe.policy),
    }


def fingerprint(policy: Policy) -> str:
    """A digest of the trainable tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(policy.trainable_state().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
