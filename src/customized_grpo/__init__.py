"""Reinforcement learning for subject-driven image generation, where rewards compete."""

from customized_grpo._version import __version__

__all__ = ["__version__"]
