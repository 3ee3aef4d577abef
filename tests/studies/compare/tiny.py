"""What the processes of a tiny grid name by import path, as `compare.tiny:NAME`."""

import os
import time
from collections.abc import Sequence

import torch
from torch import Tensor

import fakes
from customized_grpo.structures import Example

CONFIG = {
    "policy": {"use": "fakes:LinearPolicy"},
    "rewards": {"prompt": {"use": "fakes:red"}, "identity": {"use": "fakes:dark"}},
    "metrics": {"oracle_prompt": {"use": "fakes:red"}, "oracle_subject": {"use": "studies.compare.tiny:pale"}},
    "data": {"train": {"use": "studies.compare.tiny:Examples"}, "eval": {"use": "studies.compare.tiny:Examples"}},
    "rollout": {"num_generations": 4, "num_inference_steps": 5},
    "training": {"iterations": 4, "prompts_per_iteration": 2, "optimizer": {"use": "AdamW", "lr": 0.01}},
    "evaluation": {"examples": 6, "replicates": 2, "every": 2},
    "checkpoint": {"every": 1},
    "tracking": {"log_with": []},
}


class Examples(Sequence[Example]):
    def __init__(self) -> None:
        self.items = fakes.examples()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def pale(images: Tensor, examples: Sequence[Example]) -> Tensor:
    return images.mean((1, 2, 3))


class HungryPolicy(fakes.LinearPolicy):
    """Trains only with gradient checkpointing."""

    RUNTIME = ("gradient_checkpointing",)

    def __init__(self, scale: float = 1.0, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing

    def velocity(self, latents, sigma, conditioning):
        if torch.is_grad_enabled() and not self.gradient_checkpointing:
            raise torch.OutOfMemoryError("the memory of a test")
        return super().velocity(latents, sigma, conditioning)


class SlowPolicy(fakes.LinearPolicy):
    """Waits to be killed when it has encoded as many examples as the environment says."""

    def encode(self, examples):
        if self.encoded >= float(os.environ.get("COMPARE_WAITS_AFTER", "inf")):
            time.sleep(60)
        return super().encode(examples)
