"""Datasets from settings: the toy world, a JSONL manifest, or a class named by import path."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from customized_grpo.data.examples import JsonlDataset
from customized_grpo.data.settings import DataSettings
from customized_grpo.errors import UserError
from customized_grpo.settings import Spec
from customized_grpo.structures import Example


def load_datasets(settings: DataSettings) -> tuple[Sequence[Example], Sequence[Example] | None]:
    """The training examples and the held-out ones (None if there are none).

    Raises:
        UserError: if a file is missing, a line of it is wrong, or there is nothing to train on.
    """
    train = _load(settings.train, "train")
    if settings.eval is not None:
        held_out = _load(settings.eval, "eval")
        train = train.split("train") if _has_splits(train) else train
        held_out = held_out.split("eval") if _has_splits(held_out) else held_out
    elif settings.train == "toyworld":
        held_out = _load("toyworld", "eval")
    else:
        train, held_out = train.held_out() if isinstance(train, JsonlDataset) else (train, None)
    if len(train) == 0:
        raise UserError("The training data is empty; give at least one example.")
    return train, held_out.spread() if isinstance(held_out, JsonlDataset) else held_out


def _has_splits(dataset: Any) -> bool:
    return isinstance(dataset, JsonlDataset) and dataset.has_splits


def _load(source: str | Spec, split: str) -> Any:
    if isinstance(source, Spec):
        from customized_grpo.settings.build import construct

        made = construct(source, "dataset")
        if not (hasattr(made, "__len__") and hasattr(made, "__getitem__")):
            raise UserError(
                f"data.{split}: {source.use} gives a {type(made).__name__}; expected a sequence of examples."
            )
        return made
    if source == "toyworld":
        from customized_grpo.toyworld.dataset import ToyWorld

        return ToyWorld(split)  # pyright: ignore[reportArgumentType]
    if not Path(source).suffix:
        raise UserError(f"data.{split} is '{source}'; give 'toyworld', a .jsonl file, or {{use: package.module:name}}.")
    return JsonlDataset(source)
