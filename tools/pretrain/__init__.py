"""Train the packaged weights from scratch: `pretrain(PretrainSettings())`.

Trains one component after the other, each with its own budget and checkpoint, then measures them and writes a report.
"""

from tools.pretrain.loop import Budget, OnProgress, Progress
from tools.pretrain.run import COMPONENTS, PretrainSettings, pretrain

__all__ = ["COMPONENTS", "Budget", "OnProgress", "PretrainSettings", "Progress", "pretrain"]
