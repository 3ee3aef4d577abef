"""Score images with all rewards."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.rewards.contract import call_reward, reward_name
from customized_grpo.structures import Example, Rewards

RewardFunction = Callable[[Tensor, Sequence[Example]], Tensor]


def named(rewards: Sequence[RewardFunction] | Mapping[str, RewardFunction]) -> dict[str, RewardFunction]:
    """Rewards by name, in column order.

    Raises:
        UserError: if there is none, or two have one name.
    """
    if isinstance(rewards, Mapping):
        by_name = dict(rewards)
    else:
        names = [reward_name(reward) for reward in rewards]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"Two rewards are called '{twice[0]}'; give them as a mapping name -> reward.")
        by_name = dict(zip(names, rewards, strict=True))
    if not by_name:
        raise UserError("No reward is given; name at least one under rewards.")
    return by_name


def score(images: Tensor, examples: Sequence[Example], rewards: Mapping[str, RewardFunction]) -> Tensor:
    """Every reward on every image.

    Args:
        images: shape (B, 3, H, W), float32 in [0, 1].
        examples: B of them, row by row.
        rewards: K of them.

    Returns:
        Shape (B, K), float32 on the CPU; NaN where a reward could not score.

    Raises:
        UserError: from `call_reward`, naming the reward.
    """
    return torch.stack([call_reward(reward, images, examples) for reward in rewards.values()], dim=-1)


def score_groups(
    images: Tensor, examples: Sequence[Example], rewards: Mapping[str, RewardFunction], num_generations: int
) -> Rewards:
    """`score` for P groups: images (P * G, 3, H, W), P examples."""
    by_row = [example for example in examples for _ in range(num_generations)]
    values = score(images, by_row, rewards)
    return Rewards(values.view(len(examples), num_generations, -1), tuple(rewards))
