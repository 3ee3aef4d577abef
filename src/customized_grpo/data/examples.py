"""Examples from a JSONL manifest, pictures read when asked for.

One object per line: {"id", "prompt", "references": [paths], "subject"?, "masks"?: [paths or null],
"mask_labels"?, "split"?}. Paths are
relative to the manifest.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pydantic import ConfigDict, Field, ValidationError, field_validator

from customized_grpo.errors import UserError, nearest
from customized_grpo.lazy import LazyExamples
from customized_grpo.masks import Warn, hides, subject_mask
from customized_grpo.settings import Settings, expectation
from customized_grpo.types import Example

EVAL = frozenset({"eval", "evaluation", "validation", "valid", "val", "dev", "test", "testing"})
"""Names of the split that is held out."""


class Record(Settings):
    """One line of a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    id: str = Field(min_length=1)
    prompt: str
    references: tuple[str, ...] = Field(min_length=1)
    subject: str = ""
    masks: tuple[str | None, ...] = ()
    mask_labels: tuple[int | str | None, ...] = ()
    split: str = ""

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return prompt

    @field_validator("split")
    @classmethod
    def _known_split(cls, split: str) -> str:
        """A split that is not known must not be trained on."""
        name = split.strip().lower()
        if name in EVAL:
            return "eval"
        if name not in ("", "train", "training"):
            raise ValueError(f"'{split}' is not a known split; write train, or one of {', '.join(sorted(EVAL))}")
        return "train" if name else ""


@dataclass(frozen=True)
class PhotoExample(Example):
    """An example of a manifest, which knows whose picture it is: two dogs are two subjects."""

    subject_id: str = ""


def parse_line(line: str, where: str) -> Record:
    """One line of a manifest; `where` begins its errors.

    Raises:
        UserError: if it is not JSON, or a field is missing, unknown or of the wrong type.
    """
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where}: expected a JSON object with id, prompt and references, got {line[:40]}.")
    if isinstance(fields.get("references"), str):
        fields["references"] = [fields["references"]]
    try:
        record = Record(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "too_short":
            raise UserError(f"{where}: field '{name}' is empty; give at least one picture of the subject.") from None
        if first["type"] == "extra_forbidden":
            raise UserError(f"{where}: unknown field '{name}'.{nearest(name, Record.model_fields)}") from None
        if first["type"] == "missing":
            raise UserError(f"{where}: there is no field '{name}'.") from None
        said = first.get("ctx", {}).get("error")
        wrong = f"expected {expectation(first)}" if said is None else str(said)
        raise UserError(f"{where}: field '{name}': {wrong}.") from None
    if record.masks and len(record.masks) != len(record.references):
        raise UserError(
            f"{where}: {len(record.masks)} masks for {len(record.references)} references; give one each, or null."
        )
    if record.mask_labels and len(record.mask_labels) != len(record.masks):
        raise UserError(
            f"{where}: {len(record.mask_labels)} mask_labels for {len(record.masks)} masks; give one each, or null."
        )
    return record


class JsonlDataset(LazyExamples[Example]):
    """A manifest as a sequence of examples.

    Raises:
        UserError: for a missing file, a bad line (with its number), a repeated id, or a picture that is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise UserError(f"There is no data file '{path}'; give a JSONL file with one example per line.")
        self.records = self._read()
        self.subjects = identities([record.references[0] for record in self.records])

    def _only(self, places: Iterable[int]) -> "JsonlDataset":
        dataset, places = type(self).__new__(type(self)), list(places)
        dataset.path, dataset.records = self.path, [self.records[n] for n in places]
        dataset.subjects = [self.subjects[n] for n in places]
        return dataset

    def _read(self) -> list[Record]:
        records: list[Record] = []
        seen: dict[str, int] = {}
        try:
            lines = self.path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"'{self.path}' is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = parse_line(line, f"{self.path}, line {number}")
            if record.id in seen:
                raise UserError(
                    f"{self.path}, line {number}: the id '{record.id}' is already on line {seen[record.id]}; "
                    f"ids must be unique."
                )
            seen[record.id] = number
            for name in (*record.references, *(mask for mask in record.masks if mask)):
                if not (self.path.parent / name).is_file():
                    raise UserError(f"{self.path}, line {number}: there is no picture '{self.path.parent / name}'.")
            records.append(record)
        if not records:
            raise UserError(f"'{self.path}' holds no example; write one JSON object per line.")
        return records

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int) -> Example:
        record = self.records[index]
        pictures = [read_picture(self.path.parent / name) for name in record.references]
        none = (None,) * len(pictures)
        masks = [
            read_mask(self.path.parent / name, picture.size, label) if name else alpha
            for name, label, (picture, alpha) in zip(
                record.masks or none, record.mask_labels or none, pictures, strict=True
            )
        ]
        return PhotoExample(
            id=record.id,
            prompt=record.prompt,
            references=tuple(picture for picture, _ in pictures),
            subject=record.subject,
            masks=tuple(masks) if any(masks) else (),
            subject_id=self.subjects[index],
        )

    @property
    def has_splits(self) -> bool:
        return any(record.split for record in self.records)

    def split(self, name: str) -> "JsonlDataset":
        """The examples of one split; lines without a split belong to "train"."""
        chosen = [n for n, record in enumerate(self.records) if (record.split or "train") == name]
        if not chosen:
            known = sorted({record.split or "train" for record in self.records})
            raise UserError(f"'{self.path}' has no example with split '{name}'; it has {', '.join(known)}.")
        return self._only(chosen)

    def spread(self) -> "JsonlDataset":
        """An example of each subject in turn: the first few, which evaluation takes, are of many subjects."""
        own: dict[str, list[int]] = {}
        for place, subject in enumerate(self.subjects):
            own.setdefault(subject, []).append(place)
        rounds = chain.from_iterable(zip_longest(*own.values()))
        return self._only(place for place in rounds if place is not None)

    def held_out(self) -> tuple["JsonlDataset", "JsonlDataset | None"]:
        """Training and evaluation examples without a subject in common.

        Split "eval" where the manifest has it; else the last tenth of the subjects (in order of appearance). With a
        single subject nothing can be held out: None.
        """
        if any(record.split == "eval" for record in self.records):
            return self.split("train"), self.split("eval")
        subjects = list(dict.fromkeys(self.subjects))
        if len(subjects) < 2:
            return self, None
        held = set(subjects[-max(1, len(subjects) // 10) :])
        train = [n for n, subject in enumerate(self.subjects) if subject not in held]
        rest = [n for n, subject in enumerate(self.subjects) if subject in held]
        return self._only(train), self._only(rest)


def identities(references: Sequence[str]) -> list[str]:
    """Who is pictured, by the first reference of each record, because two dogs are two subjects.

    It is the picture's folder; if all pictures share one folder, the picture itself.
    """
    folders = [str(Path(reference).parent) for reference in references]
    return folders if len(set(folders)) > 1 else list(references)


def read_picture(path: Path) -> tuple[Image.Image, Image.Image | None]:
    """An RGB picture the right way up, and its alpha channel as a mask if it says anything.

    16-bit and float pictures are scaled to 8 bits, transparent ones laid on white; of an animation it is the first
    frame.

    Raises:
        UserError: if the file is empty, damaged, or not a picture.
    """
    image = _eight_bit(_open(path))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=alpha)
        return white, subject_mask(alpha, f"The alpha channel of '{path}'") if hides(alpha) else None
    return image.convert("RGB"), None


def read_mask(
    path: Path, size: tuple[int, int], label: int | str | None = None, warn: Warn | None = None
) -> Image.Image:
    """An "L" image, 255 on the subject, of the given (width, height). See `subject_mask`.

    Raises:
        UserError: if it cannot be read, does not say what the subject is, or is of another size.
    """
    image = _open(path)
    if image.size != size:
        raise UserError(
            f"The mask '{path}' is {image.size[0]} x {image.size[1]}, its picture {size[0]} x {size[1]}; "
            f"make them one size."
        )
    return subject_mask(image, f"The mask '{path}'", label, warn)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
            image.format = file.format
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"The picture '{path}' cannot be read ({type(error).__name__}: {error}); replace it or drop its line."
        ) from error


def _eight_bit(image: Image.Image) -> Image.Image:
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    pixels = np.asarray(image, dtype=np.float32)
    highest = float(pixels.max(initial=0))
    if image.mode == "F" and highest <= 1:
        scale = 255.0
    else:
        scale = 255 / 65535 if highest > 255 or image.mode.startswith("I;16") else 1.0
    return Image.fromarray((pixels * scale).round().clip(0, 255).astype(np.uint8))
