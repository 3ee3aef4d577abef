"""Examples from a JSONL manifest, whose images are read when they are needed.

One object per line: {"id", "prompt", "references": [paths], "subject"?, "subject_id"?, "masks"?: [paths or null],
"mask_labels"?, "split"?, "kind"?, "target"?: path, "weights"?: {reward: factor}}. Paths are relative to the manifest.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import ConfigDict, Field, ValidationError, field_validator

from customized_grpo.data.decode import image_size, read_mask, read_picture
from customized_grpo.errors import UserError, nearest
from customized_grpo.settings import Settings, expectation
from customized_grpo.store import is_file, parse_json, read_text
from customized_grpo.structures import Example, LazyExamples

EVAL = frozenset({"eval", "evaluation", "validation", "valid", "val", "dev", "test", "testing"})
"""Names of the split that is held out."""
LONGEST_KIND, MOST_KINDS = 40, 20
"""Characters in the name of a kind of prompt, and kinds in a data set: a table by kind has to stay readable."""
OUTLINES = 10_000
"""Most examples with different references that `JsonlDataset.outlines` looks at."""


class Record(Settings):
    """One line of a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    id: str = Field(min_length=1)
    prompt: str
    references: tuple[str, ...] = Field(min_length=1)
    subject: str = ""
    subject_id: str = ""
    masks: tuple[str | None, ...] = ()
    mask_labels: tuple[int | str | None, ...] = ()
    split: str = ""
    kind: str = ""
    target: str = ""
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(default={})

    @property
    def pictures(self) -> tuple[str, ...]:
        """The references, and the target if there is one."""
        return self.references + ((self.target,) if self.target else ())

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return prompt

    @field_validator("kind")
    @classmethod
    def _short(cls, kind: str) -> str:
        return short_kind(kind)

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
    """An example that knows who its subject is: two dogs are two subjects."""

    subject_id: str = ""


def short_kind(kind: str) -> str:
    """The name of a kind without blanks around it. Raises ValueError if it is too long."""
    kind = " ".join(kind.split())
    if len(kind) > LONGEST_KIND:
        raise ValueError(f"'{kind[:20]}...' has {len(kind)} characters; name a kind with at most {LONGEST_KIND}")
    return kind


def check_kinds(kinds: Iterable[str], where: str | Path) -> None:
    """Raise UserError if there are too many kinds of prompt to compare."""
    found = list(dict.fromkeys(kind for kind in kinds if kind))
    if len(found) > MOST_KINDS:
        raise UserError(
            f"'{where}' has {len(found)} kinds of prompt, such as {', '.join(found[:3])}; use at most {MOST_KINDS}, or "
            f"leave the kinds out."
        )


def parse_line(line: str, where: str) -> Record:
    """One line of a manifest; `where` begins its errors.

    Raises:
        UserError: if it is not JSON, or a field is missing, unknown or of the wrong type.
    """
    fields = parse_json(line, where)
    if not isinstance(fields, dict):
        raise UserError(f"{where}: expected a JSON object with id, prompt and references, got {line[:40]}.")
    if isinstance(fields.get("references"), str):
        fields["references"] = [fields["references"]]
    return make_record(fields, where)


def make_record(fields: Mapping[str, Any], where: str) -> Record:
    """A record of its fields; raise UserError, which `where` begins, if one is missing, unknown or of a wrong type."""
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
        if not is_file(self.path):
            raise UserError(f"There is no data file '{str(path)[:100]}'; give a JSONL file with one example per line.")
        self.records = self._read()
        self.subjects = identities(self.records)

    def _only(self, places: Iterable[int]) -> "JsonlDataset":
        dataset, places = type(self).__new__(type(self)), list(places)
        dataset.path, dataset.records = self.path, [self.records[n] for n in places]
        dataset.subjects = [self.subjects[n] for n in places]
        return dataset

    def _read(self) -> list[Record]:
        records: list[Record] = []
        seen: dict[str, int] = {}
        for number, line in enumerate(read_text(self.path).split("\n"), start=1):
            if not line.strip():
                continue
            record = parse_line(line, f"{self.path}, line {number}")
            if record.id in seen:
                raise UserError(
                    f"{self.path}, line {number}: the id '{record.id}' is already on line {seen[record.id]}; "
                    f"ids must be unique."
                )
            seen[record.id] = number
            for name in (*record.pictures, *(mask for mask in record.masks if mask)):
                if not is_file(self.path.parent / name):
                    raise UserError(f"{self.path}, line {number}: there is no image '{self.path.parent / name}'.")
            records.append(record)
        if not records:
            raise UserError(f"'{self.path}' holds no example; write one JSON object per line.")
        check_kinds((record.kind for record in records), self.path)
        return records

    def __len__(self) -> int:
        return len(self.records)

    def all_kinds(self) -> list[str]:
        return [record.kind for record in self.records]

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
            kind=record.kind,
            target=read_picture(self.path.parent / record.target)[0] if record.target else None,
            weights=record.weights,
            subject_id=self.subjects[index],
        )

    def outlines(self) -> Iterator[Example]:
        """The examples with images of the right sizes and nothing in them, one for each set of references and
        of weighted rewards.

        Only the heads of the files are read, of up to 10,000 sets.

        Raises:
            UserError: if a reference is not an image.
        """
        distinct = {(record.references, *record.weights): record for record in reversed(self.records)}
        for record in list(reversed(distinct.values()))[:OUTLINES]:
            sizes = [image_size(self.path.parent / name) for name in record.references]
            blank = tuple(_blank(size) for size in sizes)
            yield Example(record.id, record.prompt, blank, record.subject, weights=record.weights)

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
        """An example of each subject in turn: the first few, which evaluation takes, are of many subjects and kinds."""
        own: dict[str, dict[str, list[int]]] = {}
        for place, (subject, record) in enumerate(zip(self.subjects, self.records, strict=True)):
            own.setdefault(subject, {}).setdefault(record.kind, []).append(place)
        turns = []
        for number, by_kind in enumerate(own.values()):
            groups = list(by_kind.values())
            start = number % len(groups)
            turns.append(in_turn(groups[start:] + groups[:start]))
        return self._only(in_turn(turns))

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


def identities(records: Sequence[Record]) -> list[str]:
    """Who the subject of each record is, because two dogs are two subjects.

    It is the record's `subject_id`; without one, the folder of its first reference; if all are in one folder, the first
    reference itself.
    """
    folders = [str(Path(record.references[0]).parent) for record in records]
    flat = len(set(folders)) == 1
    return [
        record.subject_id or (record.references[0] if flat else folder)
        for record, folder in zip(records, folders, strict=True)
    ]


def in_turn(groups: Sequence[Sequence[int]]) -> list[int]:
    """The first of each group, then the second of each, and so on."""
    return [place for place in chain.from_iterable(zip_longest(*groups)) if place is not None]


@lru_cache(maxsize=8)
def _blank(size: tuple[int, int]) -> Image.Image:
    return Image.new("1", size)
