"""Data sets of the `datasets` package (a folder it saved, parquet files, a hub id), and WebDataset shards."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from customized_grpo.data.decode import read_picture
from customized_grpo.data.examples import PhotoExample, check_kinds, short_kind
from customized_grpo.data.shards import Shards
from customized_grpo.errors import UserError, nearest
from customized_grpo.libraries import library_problem
from customized_grpo.shell import install
from customized_grpo.sources import hub_problem
from customized_grpo.structures import Example, LazyExamples


class HubDataset(LazyExamples[Example]):
    """Columns of a data set as examples, read when asked for.

    Args:
        path: a folder that `datasets` saved, parquet files (or their folder), or a hub id; or WebDataset shards (their
            folder, or a pattern such as `shards/train-*.tar`), whose columns are the endings of the members.
        split: which of its splits.
        prompt: the column with the prompts.
        references: the columns with pictures, or lists of pictures, of the subject.
        subject: the column with the class noun, if there is one.
        id: the column with unique ids; None numbers the rows.
        subject_id: the column that tells subjects apart, because two dogs are two subjects; None takes rows with the
            same first image for one subject.
        kind: the column with the kind of prompt, if there is one.
        target: the column with a real image of what the prompt asks for, if there is one; a cell may be empty.

    Raises:
        UserError: if `datasets` is not installed, cannot read the path, a column is missing, or there are more than 20
            kinds; for a row, if it has no prompt or no image, or cannot be decoded.
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
        subject_id: str | None = None,
        kind: str | None = None,
        target: str | None = None,
    ) -> None:
        self.rows, self.path = open_dataset(path, split), path
        self.prompt, self.subject, self.id, self.subject_id = prompt, subject, id, subject_id
        self.kind, self.target = kind, target
        self.references = [references] if isinstance(references, str) else list(references)
        known = list(self.rows.column_names)
        for column in (prompt, *self.references, subject, id, subject_id, kind, target):
            if column is not None and column not in known:
                raise UserError(f"'{path}' has no column '{column}', only {', '.join(known)}.{nearest(column, known)}")
        if kind is not None:
            check_kinds((str(name or "") for name in self.rows.unique(kind)), path)

    def __len__(self) -> int:
        return len(self.rows)

    def outlines(self) -> Iterator[Example]:
        """The first hundred examples; see `JsonlDataset.outlines`."""
        return map(self.example, range(min(100, len(self))))

    def example(self, index: int) -> Example:
        where = f"Row {index} of '{self.path}'"
        try:
            row = self.rows[index]
        except IndexError:
            raise
        except Exception as error:  # the package decodes images in its own way
            reason = " ".join(str(error).split())[:150]
            raise UserError(f"{where} cannot be read ({type(error).__name__}: {reason}); leave it out.") from error
        prompt = row[self.prompt]
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{where}: column '{self.prompt}' has no prompt; leave the row out.")
        read = [picture for column in self.references for picture in _pictures(row, column, where)]
        if not read:
            raise UserError(f"{where} has no image in {', '.join(self.references)}; leave it out.")
        pictures, masks = zip(*read, strict=True)
        who = str(row[self.subject_id]) if self.subject_id else hashlib.blake2b(pictures[0].tobytes()).hexdigest()
        return PhotoExample(
            id=str(row[self.id]) if self.id else str(index),
            prompt=prompt,
            references=pictures,
            subject=str(row[self.subject] or "") if self.subject else "",
            masks=masks if any(masks) else (),
            subject_id=who,
            kind=self._kind(row[self.kind] if self.kind else "", where),
            target=next((picture for picture, _ in _pictures(row, self.target, where)), None),
        )

    def all_kinds(self) -> list[str]:
        names = self.rows[self.kind] if self.kind else [""] * len(self)
        return [self._kind(name, f"Row {index} of '{self.path}'") for index, name in enumerate(names)]

    def _kind(self, name: Any, where: str) -> str:
        try:
            return short_kind(str(name or ""))
        except ValueError as error:
            raise UserError(f"{where}, column '{self.kind}': {error}.") from None


def _pictures(row: Mapping[str, Any], column: str | None, where: str) -> list[tuple[Image.Image, Image.Image | None]]:
    """The pictures of a cell, which may hold none, one or a list."""
    cell = row[column] if column else None
    values = cell if isinstance(cell, list) else [cell]
    return [as_picture(value, f"{where}, column '{column}'") for value in values if value is not None]


def open_dataset(source: str | Path, split: str = "train") -> Any:
    """WebDataset shards, or one split of a data set of `datasets`: a folder it saved, parquet files, or a hub id.

    Raises:
        UserError: if the package is missing, or the source cannot be read.
    """
    place = Path(source).expanduser()
    if shards := _shards(place):
        return Shards(shards)
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        missing = UserError(f"Reading '{source}' needs the datasets package; {install('data')}.")
        raise library_problem(error) or missing from error
    try:
        if was_saved(place):
            saved = datasets.load_from_disk(str(place))
            return saved[split] if isinstance(saved, dict) else saved
        if place.exists():
            files = sorted(map(str, place.rglob("*.parquet"))) if place.is_dir() else [str(place)]
            return datasets.load_dataset("parquet", data_files={split: files}, split=split)
        return datasets.load_dataset(str(source), split=split)
    except Exception as error:
        if problem := hub_problem(f"datasets/{source}", error):
            raise UserError(f"Could not read '{source}': {problem}.") from error
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"Could not read split '{split}' of '{source}' ({type(error).__name__}: {reason}).") from error


def was_saved(place: Path) -> bool:
    """Whether a folder is one that `datasets` saved."""
    return (place / "dataset_info.json").is_file() or (place / "dataset_dict.json").is_file()


def _shards(place: Path) -> list[Path]:
    if place.suffix == ".tar":
        return sorted(place.parent.glob(place.name)) or [place]
    return sorted(place.glob("*.tar"))


def as_picture(value: Any, name: str) -> tuple[Image.Image, Image.Image | None]:
    """RGB and perhaps a mask, as `read_picture`, of anything that `datasets` has for an image.

    Args:
        value: a decoded image, a path, the content of a file, or a mapping with `bytes` or `path`.
        name: begins the error sentences.

    Raises:
        UserError: if it is none of these, or not an image.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    value = Path(value) if isinstance(value, str) else value
    if not isinstance(value, Path | bytes | Image.Image):
        raise UserError(f"{name} is {type(value).__name__}; expected an image, its bytes or its path.")
    return read_picture(value, name)
