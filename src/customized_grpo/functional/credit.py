"""What of the rewards a trained step is credited with. Pure.

Notation: P prompts, G generations per prompt, K rewards, S trained steps.

A credit is `(before, after, final)`: raw rewards (P, G, S, K) of the images predicted before and after each
trained step, and (P, G, K) of the final images; NaN where a reward could not score. It returns (P, G, S, K), raw units.
"""

from torch import Tensor

__all__ = ["final", "stepwise"]
"""What a configuration can name as `method.credit`."""


def final(before: Tensor, after: Tensor, final: Tensor) -> Tensor:
    """Every step gets the reward of the final image. It is the one credit for which nothing is predicted."""
    return final.unsqueeze(2).expand_as(after)


def stepwise(before: Tensor, after: Tensor, final: Tensor) -> Tensor:
    """Every step gets what it adds to the reward of the predicted image.

    Source: Stepwise-Flow-GRPO (arXiv 2603.28718), gain = reward after - reward before, of x0 = x - sigma v.
    """
    return after - before
