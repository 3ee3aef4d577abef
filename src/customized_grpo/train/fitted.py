"""Time weights from a file, such as that of `cgrpo probe`: `method.time_weights: {use: from_file, path: ...}`."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.functional.time_weights import tabulated
from customized_grpo.settings.recipes import find_recipe
from customized_grpo.shell import command
from customized_grpo.store import is_file, read_json, write

__all__ = ["from_file"]
"""Names that a configuration can use as `method.time_weights`."""


def from_file(progress: Tensor, *, path: str | Path) -> Tensor:
    """`tabulated` weights read from JSON. (S,) to (S, K), where K is the length of a row in the file.

    Args:
        progress: shape (S,).
        path: a file written by `save_time_weights`; only `grid` and `weights` are used.

    Raises:
        UserError: if the file is missing or does not contain an ascending grid with one row of weights per point.
    """
    content = read_time_weights(path)
    return tabulated(progress, grid=content["grid"], weights=content["weights"])


def read_time_weights(path: str | Path) -> dict[str, Any]:
    """Read and validate time weights: {"grid": [...], "weights": [[...], ...], "rewards": [...], "provenance": {...}}.

    Raises:
        UserError: as `from_file`.
    """
    file = find_recipe(path)
    if not is_file(file):
        raise UserError(
            f"There is no file of time weights '{str(file)[:100]}'; `{command('probe')}` writes one, named "
            f"time_weights.json."
        )
    content = read_json(file)
    problem = _problem(content)
    if problem:
        raise UserError(
            f"'{file}' does not contain time weights: {problem}; "
            f'expected {{"grid": [progress, ...], "weights": [[weight per reward], ...]}}.'
        )
    return content


def save_time_weights(
    path: Path,
    grid: Sequence[float],
    weights: Sequence[Sequence[float]],
    rewards: Sequence[str],
    provenance: Mapping[str, Any],
) -> Path:
    """Write a file for `from_file`. grid: ascending progress; weights: a row of K per grid point; rewards: K names."""
    content = {"grid": list(grid), "weights": [list(row) for row in weights], "rewards": list(rewards)}
    write(path, json.dumps({**content, "provenance": dict(provenance)}, indent=1, default=str))
    return path


def _problem(content: Any) -> str:
    """The problem with the content of a file, or an empty string."""
    if not isinstance(content, Mapping) or not isinstance(content.get("grid"), list):
        return "it has no list 'grid'"
    grid, weights = content["grid"], content.get("weights")
    if not isinstance(weights, list) or len(weights) != len(grid) or not all(isinstance(row, list) for row in weights):
        return f"'weights' is not a list of {len(grid)} rows, one per grid point"
    if not grid or len({len(row) for row in weights}) != 1 or not weights[0]:
        return "the rows of 'weights' are empty or differ in length"
    if not all(_is_finite(x) for x in [*grid, *(x for row in weights for x in row)]):
        return "it contains a value that is not a finite number"
    if any(b <= a for a, b in itertools.pairwise(grid)):
        return "'grid' does not ascend"
    return "a weight is negative" if any(x < 0 for row in weights for x in row) else ""


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
