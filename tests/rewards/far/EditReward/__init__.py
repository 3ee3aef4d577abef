"""A stand-in with the interface of the EditReward package. It knows only what was recorded of it."""

import hashlib
import json
from pathlib import Path

import torch

RECORD = json.loads((Path(__file__).parents[2] / "parity" / "editreward.json").read_text(encoding="utf-8"))


def sha256(picture):
    return hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()


class EditRewardInferencer:
    def __init__(self, config_path=None, checkpoint_path=None, **arguments):
        self.config_path, self.checkpoint_path = config_path, checkpoint_path
        assert arguments == RECORD["arguments"]

    def reward(self, prompts, image_src, image_paths):
        known = {
            (row["prompt"], row["source"]["sha256"], row["edited"]["sha256"]): row["logits"] for row in RECORD["rows"]
        }
        asked = zip(prompts, map(sha256, image_src), map(sha256, image_paths), strict=True)
        return torch.tensor([known[row] for row in asked])
