"""Reinforcement learning for subject-driven image generation, where rewards compete.

    from customized_grpo import Trainer, TrainerConfig, FluxKontextPolicy, ClipReward, DinoReward, ToyWorld

Names are imported when they are first used: importing the package imports neither torch, diffusers nor transformers.
"""

from customized_grpo import moved
from customized_grpo.stubs import attach

moved.install()
__getattr__, __dir__, __all__ = attach(__name__, __file__)
