import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from customized_grpo.data.images import to_tensor
from customized_grpo.errors import UserError
from customized_grpo.rewards import EditReward, Hpsv3Reward
from rewards import tiny

HERE = Path(__file__).parent


def test_without_its_package_it_says_what_to_do():
    with pytest.raises(UserError, match=r"needs the hpsv3 package.*RemoteReward"):
        Hpsv3Reward()
    with pytest.raises(UserError, match=r"needs the EditReward package.*use: EditReward}"):
        EditReward("checkpoint")


def pattern(seed, width, height):
    """The pictures of the record."""
    y, x = np.mgrid[:height, :width]
    channels = (x * (seed + 1)) % 256, (y * (seed + 3)) % 256, (x + y * seed) % 256
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def test_editreward_is_asked_as_its_authors_ask_it(monkeypatch):
    monkeypatch.syspath_prepend(HERE / "far")
    rows = json.loads((HERE / "parity" / "editreward.json").read_text(encoding="utf-8"))["rows"]
    reward = EditReward("checkpoint", device="cpu", batch_size=2)
    assert reward.inferencer.checkpoint_path == "checkpoint"
    assert reward.inferencer.config_path.endswith("EditReward/config/EditReward-MiMo-VL-7B-SFT-2508.yaml")
    assert EditReward("checkpoint", config="mine.yaml", device="cpu").inferencer.config_path == "mine.yaml"
    examples = [
        tiny.Example("e", row["prompt"], (pattern(*row["source"]["pattern"]), tiny.picture()), subject="dog")
        for row in rows
    ]
    images = torch.stack([to_tensor(pattern(*row["edited"]["pattern"])) for row in rows])
    assert reward(images, examples).tolist() == pytest.approx([row["logits"][0] for row in rows])
