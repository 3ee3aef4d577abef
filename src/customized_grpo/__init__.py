"""Reinforcement learning for subject-driven image generation, where rewards compete.

    from customized_grpo import Trainer, TrainerConfig, FluxKontextPolicy, ClipReward, DinoReward, ToyWorld

Names are loaded when first asked for: importing the package imports neither torch, diffusers nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from customized_grpo._version import __version__

if TYPE_CHECKING:
    from customized_grpo.config import Config, TrainerConfig, load_config
    from customized_grpo.data import JsonlDataset
    from customized_grpo.errors import TrainingError, UserError
    from customized_grpo.policies import FluxKontextPolicy, LoraSettings, Policy, check_policy
    from customized_grpo.rewards import ClipReward, DinoReward, Reward, check_reward
    from customized_grpo.toyworld.dataset import ToyWorld
    from customized_grpo.trainer import Observer, Trainer
    from customized_grpo.types import Example, Rewards, Rollout

_HOME = {
    "ClipReward": "rewards", "DinoReward": "rewards", "Reward": "rewards", "check_reward": "rewards",
    "FluxKontextPolicy": "policies", "LoraSettings": "policies", "Policy": "policies", "check_policy": "policies",
    "Config": "config", "TrainerConfig": "config", "load_config": "config",
    "JsonlDataset": "data", "ToyWorld": "toyworld.dataset",
    "Observer": "trainer", "Trainer": "trainer",
    "Example": "types", "Rewards": "types", "Rollout": "types",
    "TrainingError": "errors", "UserError": "errors",
}  # fmt: skip

__all__ = [
    "ClipReward",
    "Config",
    "DinoReward",
    "Example",
    "FluxKontextPolicy",
    "JsonlDataset",
    "LoraSettings",
    "Observer",
    "Policy",
    "Reward",
    "Rewards",
    "Rollout",
    "ToyWorld",
    "Trainer",
    "TrainerConfig",
    "TrainingError",
    "UserError",
    "__version__",
    "check_policy",
    "check_reward",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
