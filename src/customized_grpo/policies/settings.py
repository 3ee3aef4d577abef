"""Settings of policies."""

from pydantic import Field

from customized_grpo.settings import Settings


class LoraSettings(Settings):
    """A low-rank adapter on the linear layers of the transformer's blocks.

    There is no dropout: its mask would differ between sampling and training, and so would the log-probs.
    """

    rank: int = Field(default=16, ge=1)
    """Rank of the update of each layer."""
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Scale numerator; the update is alpha / rank * B A. None is alpha = rank."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Ends of module names that get an adapter, as peft's `target_modules`, inside transformer blocks only; None is
    every attention and feed-forward layer of the family."""
