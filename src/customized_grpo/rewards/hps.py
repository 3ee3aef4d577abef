"""Prompt following and quality by HPSv3, through its own package."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.data.images import to_pil
from customized_grpo.errors import UserError
from customized_grpo.libraries import library_problem
from customized_grpo.settings import AtLeastOne
from customized_grpo.structures import Example


class Hpsv3Reward:
    """Human Preference Score v3: the mean of the predicted score, unbounded; generated pictures about 0 to 15.

    The `hpsv3` package pins an older transformers than this package needs. Give it an environment of its own:
    `{use: RemoteReward, reward: {use: Hpsv3Reward}, python: path/to/its/venv/bin/python}`.

    Args:
        checkpoint: HPSv3.safetensors; None downloads the released one, MizzenAI/HPSv3.
        config: its YAML; None is the package's own.
        device: where it runs; None is the fastest device there is.
        batch_size: images scored at once.

    Raises:
        UserError: if the package is not installed.
    """

    name = "prompt"
    RUNTIME = ("device", "batch_size")

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        config: str | Path | None = None,
        device: str | int | None = None,
        batch_size: AtLeastOne = 8,
    ) -> None:
        try:
            from hpsv3 import HPSv3RewardInferencer  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise library_problem(error) or UserError(
                f"Hpsv3Reward needs the hpsv3 package ({error}); install it in an environment of its own and use "
                f"{{use: RemoteReward, reward: {{use: Hpsv3Reward}}, python: that/environment/bin/python}}."
            ) from error
        self.batch_size = batch_size
        fastest = "cuda" if torch.cuda.is_available() else "cpu"
        self.inferencer: Any = HPSv3RewardInferencer(
            config_path=None if config is None else str(config),
            checkpoint_path=None if checkpoint is None else str(checkpoint),
            device=fastest if device is None else device,
        )
        self.images = _name_of_images(self.inferencer.reward)

    @torch.no_grad()
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Shape (B,). Source: Ma et al. 2025, HPSv3; its output is (mean, log of spread), of which this is the mean."""
        scores = []
        for start in range(0, len(examples), self.batch_size):
            rows = slice(start, start + self.batch_size)
            pictures = {self.images: [to_pil(image) for image in images[rows]]}
            scores.append(self.inferencer.reward(prompts=[e.prompt for e in examples[rows]], **pictures)[:, 0])
        return torch.cat(scores).float()


def _name_of_images(reward: Any) -> str:
    """Releases differ in the order of the arguments, so they go by name."""
    names = [name for name in inspect.signature(reward).parameters if name != "prompts"]
    return next((name for name in names if "image" in name), "image_paths")
