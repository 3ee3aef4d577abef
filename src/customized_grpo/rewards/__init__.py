"""Rewards: plain functions or classes `(images, examples) -> Tensor (B,)`. Loaded when first asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from customized_grpo.rewards.clip import ClipImageReward, ClipReward, Hpsv2Reward, PickScoreReward
    from customized_grpo.rewards.contract import Reward, RewardUnavailable, check_reward
    from customized_grpo.rewards.dino import DinoReward
    from customized_grpo.rewards.hps import Hpsv3Reward
    from customized_grpo.rewards.remote import RemoteReward
    from customized_grpo.rewards.vlm import VlmJudge

_HOME = {
    "ClipImageReward": "clip",
    "ClipReward": "clip",
    "DinoReward": "dino",
    "Hpsv2Reward": "clip",
    "Hpsv3Reward": "hps",
    "PickScoreReward": "clip",
    "RemoteReward": "remote",
    "Reward": "contract",
    "RewardUnavailable": "contract",
    "VlmJudge": "vlm",
    "check_reward": "contract",
}

__all__ = [
    "ClipImageReward",
    "ClipReward",
    "DinoReward",
    "Hpsv2Reward",
    "Hpsv3Reward",
    "PickScoreReward",
    "RemoteReward",
    "Reward",
    "RewardUnavailable",
    "VlmJudge",
    "check_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
