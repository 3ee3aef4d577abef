"""Data sets of the `datasets` package: a folder it saved, parquet files, or a hub id."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from customized_grpo.errors import UserError, nearest
from customized_grpo.lazy import LazyExamples
from customized_grpo.types import Example


class HubDataset(LazyExamples[Example]):
    """Columns of a data set as examples, read when asked for.

    Args:
        path: a folder that `datasets` saved, parquet files (or their folder), or a hub id.
        split: which of its splits.
        prompt: the column with the prompts.
        references: the columns with pictures, or lists of pictures, of the subject.
        subject: the column with the class noun, if there is one.
        id: the column with unique ids; None numbers the rows.

    Raises:
        UserError: if `datasets` is not installed, cannot read the path, or a column is missing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "train",
        prompt: str = "prompt",
        references: str | Sequence[str] = "image",
        subject: str | None = None,
        id: str | None = None,
    ) -> None:
        self.rows = open_dataset(path, split)
        self.prompt, self.subject, self.id = prompt, subject, id
        self.references = [references] if isinstance(references, str) else list(references)
        known = list(self.rows.column_names)
        for column in (prompt, *self.references, subject, id):
            if column is not None and column not in known:
                raise UserError(f"'{path}' has no column '{column}', only {', '.join(known)}.{nearest(column, known)}")

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> Example:
        row = self.rows[index]
        pictures: list[Any] = []
        for column in self.references:
            pictures += row[column] if isinstance(row[column], list) else [row[column]]
        return Example(
            id=str(row[self.id]) if self.id else str(index),
            prompt=str(row[self.prompt]),
            references=tuple(as_picture(picture) for picture in pictures if picture is not None),
            subject=str(row[self.subject] or "") if self.subject else "",
        )


def open_dataset(source: str | Path, split: str = "train") -> Any:
    """One split of a data set through the `datasets` package: a folder it saved, parquet files, or a hub id.

    Raises:
        UserError: if the package is missing, or it cannot read the source.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"Reading '{source}' needs the datasets package; pip install datasets.") from error
    place = Path(source).expanduser()
    try:
        if (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(place))
            return saved[split] if isinstance(saved, dict) else saved
        if place.exists():
            files = sorted(map(str, place.rglob("*.parquet"))) if place.is_dir() else [str(place)]
            return datasets.load_dataset("parquet", data_files={split: files}, split=split)
        return datasets.load_dataset(str(source), split=split)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"Could not read split '{split}' of '{source}' ({type(error).__name__}: {reason}).") from error


def as_picture(value: Any) -> Image.Image:
    """RGB, of a decoded picture or of the mapping with `bytes` that parquet files hold."""
    if isinstance(value, Mapping):
        value = Image.open(io.BytesIO(value["bytes"]))
    return value.convert("RGB")
