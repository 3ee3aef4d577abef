"""Is a manifest fit to train on? Everything is read once, and everything that is wrong is told at once."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from customized_grpo.data.decode import as_rgb, open_image, read_mask
from customized_grpo.data.examples import Record, check_kinds, identities, parse_line
from customized_grpo.errors import UserError
from customized_grpo.store import is_file, read_text

Severity = Literal["error", "warning", "note"]
SEVERITY: dict[str, Severity] = {
    "bad line": "error",
    "empty prompt": "error",
    "repeated id": "error",
    "many kinds": "error",
    "missing picture": "error",
    "missing mask": "error",
    "corrupt": "error",
    "mask size": "error",
    "empty mask": "error",
    "unclear mask": "error",
    "inverted mask": "warning",
    "leaked picture": "error",
    "leaked subject": "warning",
    "tiny": "warning",
    "duplicate": "warning",
    "no mask": "note",
    "not RGB": "note",
    "rotated": "note",
}
"""What can be found. Errors make a manifest unusable; notes are dealt with when a picture is read."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: str
    """A key of SEVERITY."""
    where: str
    """A line or a picture."""
    message: str

    @property
    def severity(self) -> Severity:
        return SEVERITY[self.kind]


@dataclass(frozen=True)
class DataReport:
    """What `check_data` found."""

    manifest: Path
    examples: int
    subjects: int
    pictures: int
    """Different files, masks included."""
    splits: dict[str, int]
    """Examples in each."""
    findings: tuple[Finding, ...]
    """Errors first."""

    @property
    def usable(self) -> bool:
        """Whether a run can be trusted on it: there is no error."""
        return self.examples > 0 and all(finding.severity != "error" for finding in self.findings)

    def counts(self) -> dict[str, int]:
        """How many findings of each kind, errors first."""
        return dict(Counter(finding.kind for finding in self.findings))


@dataclass(frozen=True)
class _Seen:
    """One picture, read."""

    size: tuple[int, int] = (0, 0)
    mode: str = ""
    rotated: bool = False
    digest: str = ""
    has_alpha: bool = False
    error: str = ""


def check_data(
    manifest: str | Path,
    *,
    smallest: int = 256,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Read a manifest and all its pictures and masks, in parallel.

    Args:
        manifest: the JSONL file.
        smallest: a picture whose shorter side has fewer pixels is reported as tiny.
        workers: pictures read at once; None is one for each core, up to 16.
        progress: called with (pictures done, pictures in all), from this thread.

    Raises:
        UserError: if there is no such file, or it is not text.
    """
    path = Path(manifest).expanduser()
    findings: list[Finding] = []
    records = dict(_records(path, findings))
    files = sorted({name for record in records.values() for name in record.pictures})
    masks = sorted({pair for record in records.values() for pair in _masked(record)}, key=str)
    workers, done, total = workers or min(16, os.cpu_count() or 1), 0, len(files) + len(masks)

    seen: dict[str, _Seen] = {}
    with ThreadPoolExecutor(workers) as pool:
        for name, picture in zip(files, pool.map(lambda name: _look(path.parent / name), files), strict=True):
            seen[name] = picture
            done += 1
            if progress:
                progress(done, total)
        read = pool.map(lambda mask: _look_at_mask(path.parent, mask, seen), masks)
        for (_, name, _), finding in zip(masks, read, strict=True):
            findings += [Finding(finding[0], name, finding[1])] if finding else []
            done += 1
            if progress:
                progress(done, total)

    findings += _of_pictures(seen, smallest)
    findings += _of_masks(records, seen)
    findings += _leaks(records, seen)
    try:
        check_kinds((record.kind for record in records.values()), path.name)
    except UserError as error:
        findings.append(Finding("many kinds", path.name, str(error)))
    order = list(SEVERITY)
    return DataReport(
        manifest=path,
        examples=len(records),
        subjects=len(set(_identities(records))),
        pictures=total,
        splits=dict(Counter(record.split or "train" for record in records.values())),
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.kind))),
    )


def _records(path: Path, findings: list[Finding]) -> Iterator[tuple[int, Record]]:
    """The good lines by number; the others go to `findings`."""
    if not is_file(path):
        raise UserError(f"There is no data file '{str(path)[:100]}'; give a JSONL file with one example per line.")
    first_line: dict[str, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        where = f"line {number}"
        if not line.strip():
            continue
        try:
            record = parse_line(line, where)
        except UserError as error:
            kind = "empty prompt" if _prompt_is_blank(line) else "bad line"
            findings.append(Finding(kind, where, str(error).removeprefix(f"{where}: ")))
            continue
        if record.id in first_line:
            findings.append(Finding("repeated id", where, f"'{record.id}' is on line {first_line[record.id]} too"))
            continue
        first_line[record.id] = number
        yield number, record


def _prompt_is_blank(line: str) -> bool:
    try:
        return not str(json.loads(line)["prompt"]).strip()
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _masked(record: Record) -> list[tuple[str, str, int | str | None]]:
    """(reference, mask, label of the subject) of the references that have a mask."""
    labels = record.mask_labels or (None,) * len(record.masks)
    return [some for some in zip(record.references, record.masks, labels, strict=False) if some[1]]  # pyright: ignore[reportReturnType]


def _look(path: Path) -> _Seen:
    if not os.path.isfile(path):  # noqa: PTH113 (is_file raises for a name that is too long)
        return _Seen(error="missing")
    name = f"The image '{path}'"
    try:
        opened, rotated = open_image(path, name)
        picture, alpha = as_rgb(opened, name)
    except UserError as error:
        return _Seen(error=str(error))
    digest = hashlib.blake2b(picture.tobytes(), salt=repr(picture.size).encode()[:16]).hexdigest()
    return _Seen(picture.size, opened.mode, rotated, digest, alpha is not None)


def _look_at_mask(
    root: Path, masked: tuple[str, str, int | str | None], seen: dict[str, _Seen]
) -> tuple[str, str] | None:
    reference, mask, label = masked
    if not os.path.isfile(root / mask):  # noqa: PTH113
        return "missing mask", f"the mask of {reference} is not there"
    if seen[reference].error:
        return None
    said: list[str] = []
    try:
        read_mask(root / mask, seen[reference].size, label, said.append)
    except UserError as error:
        kinds = {r" is \d+ x \d+, its": "mask size", "cannot be read|million": "corrupt", "everywhere": "empty mask"}
        return next((kind for words, kind in kinds.items() if re.search(words, str(error))), "unclear mask"), str(error)
    return ("inverted mask", said[0]) if said else None


def _of_pictures(seen: dict[str, _Seen], smallest: int) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for name, picture in seen.items():
        if picture.error:
            kind = "missing picture" if picture.error == "missing" else "corrupt"
            yield Finding(kind, name, "there is no such file" if kind == "missing picture" else picture.error)
            continue
        if min(picture.size) < smallest:
            yield Finding("tiny", name, f"{picture.size[0]} x {picture.size[1]}, shorter side below {smallest}")
        if picture.mode != "RGB":
            yield Finding("not RGB", name, f"mode {picture.mode}, converted when read")
        if picture.rotated:
            yield Finding("rotated", name, "EXIF says to turn it, done when read")
        if first.setdefault(picture.digest, name) != name:
            yield Finding("duplicate", name, f"the same pixels as {first[picture.digest]}")


def _of_masks(records: dict[int, Record], seen: dict[str, _Seen]) -> Iterator[Finding]:
    """If some references are masked, those that are not are segmented by nobody."""
    masked = {reference for record in records.values() for reference, _, _ in _masked(record)}
    masked |= {name for name, picture in seen.items() if picture.has_alpha}
    if masked:
        references = {name for record in records.values() for name in record.references}
        for name in sorted(references - masked):
            yield Finding("no mask", name, "other references have one; this one keeps its background")


def _identities(records: dict[int, Record]) -> list[str]:
    return identities(list(records.values()))


def _leaks(records: dict[int, Record], seen: dict[str, _Seen]) -> Iterator[Finding]:
    """Pictures and subjects that are in more than one split."""
    home: dict[str, tuple[str, str]] = {}
    told: set[str] = set()
    for (number, record), subject in zip(records.items(), _identities(records), strict=True):
        split = record.split or "train"
        marks = [("leaked picture", seen[name].digest, name) for name in record.pictures if seen[name].digest]
        marks += [] if subject in record.references else [("leaked subject", f"subject {subject}", subject)]
        for kind, mark, name in marks:
            other, line = home.setdefault(mark, (split, f"line {number}"))
            if other != split and mark not in told:
                told.add(mark)
                yield Finding(kind, f"line {number}", f"{name} is in split '{split}', and in '{other}' on {line}")
