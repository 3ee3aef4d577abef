"""Try rewards on a handful of pictures before a run relies on them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor

from customized_grpo.data.images import to_tensor
from customized_grpo.errors import UserError
from customized_grpo.rewards.contract import Reward, call_reward, check_reward
from customized_grpo.structures import Example

SIDE = 512
"""Width and height of images that are made from references, in pixels."""


@dataclass(frozen=True)
class RewardTrial:
    """The result of trying one reward."""

    name: str
    scores: tuple[float, ...]
    """One for each picture, in the reward's units; NaN where it could not score."""
    seconds_per_image: float
    """Seconds of the second call, because the first one warms up."""
    device: str
    """Where it runs: a device, a process or an address; "" if it does not say."""
    memory: float | None
    """MiB: at most in use on its GPU, else of its weights, or of its process; None if it does not say."""
    violation: str
    """Why it cannot be used: a rule of the contract that it breaks, or that it scored no image; "" if it can."""


def check_rewards(
    makers: Mapping[str, Callable[[], Reward]],
    examples: Sequence[Example],
    images: Tensor | None = None,
) -> list[RewardTrial]:
    """Construct every reward, so that a wrong path fails at once, then try each of them.

    Args:
        makers: by name, a function that makes the reward.
        examples: two or more.
        images: a picture for each, shape (B, 3, H, W) in [0, 1]; None takes each example's first reference, so that
            identity is near its best and the prompt mostly unmet.

    Returns:
        One trial for each reward, in order.

    Raises:
        UserError: naming the reward, if one cannot be made or called.
    """
    pictures = references_as_images(examples, SIDE) if images is None else images
    rewards: dict[str, Reward] = {}
    try:
        for name, make in makers.items():
            rewards[name] = _named_errors(name, make)
        return [
            _named_errors(name, partial(_try, name, reward, pictures, examples)) for name, reward in rewards.items()
        ]
    finally:
        for reward in rewards.values():
            getattr(reward, "close", lambda: None)()


def references_as_images(examples: Sequence[Example], side: int) -> Tensor:
    """The middle of each example's first reference, shape (B, 3, side, side)."""
    return torch.stack([to_tensor(ImageOps.fit(example.references[0], (side, side))) for example in examples])


def _try(name: str, reward: Reward, images: Tensor, examples: Sequence[Example]) -> RewardTrial:
    if getattr(reward, "whole_groups", False):  # all images as those of one example, so that it can compare them
        examples = [examples[0]] * len(examples)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    call_reward(reward, images, examples)
    start = time.perf_counter()
    scores = call_reward(reward, images, examples).tolist()
    seconds = (time.perf_counter() - start) / len(examples)
    try:
        check_reward(reward, images, examples)
        violation = ""
    except UserError as error:
        violation = str(error)
    if all(map(math.isnan, scores)):
        violation = f"It scored none of the {len(scores)} images ({getattr(reward, 'unscored', '') or 'all are NaN'})."
    device, memory = _where(reward)
    return RewardTrial(name, tuple(scores), seconds, device, memory, violation)


def _where(reward: Any) -> tuple[str, float | None]:
    """Device and memory as the reward reports them, else those of its model."""
    if hasattr(reward, "where"):
        return str(reward.where), getattr(reward, "memory", None)
    model = getattr(reward, "model", None)
    if not isinstance(model, torch.nn.Module):
        return "", None
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device
    if device.type == "cuda":
        return str(device), torch.cuda.max_memory_allocated(device) / 2**20
    return str(device), sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def _named_errors(name: str, do: Callable[[], Any]) -> Any:
    try:
        return do()
    except UserError as error:
        raise UserError(f"reward '{name}': {error}") from error
    except Exception as error:
        raise UserError(f"reward '{name}' failed: {type(error).__name__}: {error}") from error
