"""Settings of the data."""

from typing import Annotated

from customized_grpo.settings import Role, Settings, Spec


class DataSettings(Settings):
    """Examples for training, and held-out examples for evaluation."""

    train: Annotated[str | Spec, Role.APPLIED] = "toyworld"
    """`toyworld`, a JSONL file, or {use: package.module:name, ...} for any sequence of examples."""
    eval: Annotated[str | Spec | None, Role.APPLIED] = None
    """As `train`. Default: for the toy world, its held-out split; for a JSONL file, its lines with "split": "eval", or
    if there are none, a tenth of the subjects."""
