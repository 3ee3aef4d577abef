"""Rebuild the packaged weights from nothing: `pretrain(PretrainSettings())`.

One component after the other, each with its own budget, checkpoint and seed; then a report of what they are worth.
"""

from customized_grpo.toyworld.pretrain.loop import Budget, OnProgress, Progress
from customized_grpo.toyworld.pretrain.run import COMPONENTS, PretrainSettings, pretrain

__all__ = ["COMPONENTS", "Budget", "OnProgress", "PretrainSettings", "Progress", "pretrain"]
