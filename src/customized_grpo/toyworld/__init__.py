"""The toy world: drawn creatures, the tiny models trained on them, and the truth about every picture."""

import os
from pathlib import Path
from typing import Literal, get_args

from customized_grpo.errors import UserError

Component = Literal["pipeline", "clip", "dino", "oracle", "clip_2", "dino_2"]
HELD_OUT: tuple[Component, ...] = ("clip_2", "dino_2")
"""Encoders of another seed, never trained on: what they see too is no quirk of the rewards. Always packaged."""

WEIGHTS_VARIABLE = "CGRPO_TOYWORLD_WEIGHTS"
"""Environment variable with a folder to use instead of the packaged weights, such as the output of `make pretrain`."""


def weights_path(component: Component) -> Path:
    """Folder of the packaged weights of one component, for `from_pretrained`.

    Raises:
        UserError: if there is no such component, or its folder is missing.
    """
    if component not in get_args(Component):
        raise UserError(
            f"There is no toy-world component '{component}'; expected one of {', '.join(get_args(Component))}."
        )
    override = None if component in HELD_OUT else os.environ.get(WEIGHTS_VARIABLE)
    path = (Path(override) if override else Path(__file__).parent / "weights") / component
    if not path.is_dir():
        raise UserError(
            f"No toy-world weights at {path}; reinstall the package, or point {WEIGHTS_VARIABLE} at a folder."
        )
    return path


__all__ = ["WEIGHTS_VARIABLE", "Component", "weights_path"]
