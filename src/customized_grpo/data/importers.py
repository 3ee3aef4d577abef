"""Data sets of the field to a manifest. Pictures stay where they are; nothing is ever overwritten."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from customized_grpo.data.examples import Record, identities
from customized_grpo.data.hub import as_picture, open_dataset
from customized_grpo.errors import UserError
from customized_grpo.images import png
from customized_grpo.store import write

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
References = Literal["first", "all", "each"]
"""Of a subject's pictures: the first is the reference; all are, together; or each is, in examples of its own."""


class Imported(NamedTuple):
    """What an import wrote."""

    manifest: Path
    examples: int
    subjects: int
    skipped: int
    """Entries left out, because a picture was not there or the data set itself calls them bad."""


def write_manifest(output: str | Path, records: Iterable[Record], skipped: int = 0) -> Imported:
    """One JSON object per line; the file appears when it is complete.

    Raises:
        UserError: if the file exists, or there is no record.
    """
    path = check_free(output)
    lines: list[str] = []
    firsts: list[str] = []
    for record in records:
        fields = {name: value for name, value in record.model_dump().items() if value not in ("", ())}
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
        firsts.append(record.references[0])
    if not firsts:
        raise UserError(f"Nothing was found to write to '{path}'.")
    try:
        write(path, "".join(lines), new=True)
    except FileExistsError as error:  # another import has been faster
        raise UserError(f"'{path}' exists already; name another file, or move it away.") from error
    return Imported(path, len(firsts), len(set(identities(firsts))), skipped)


def check_free(output: str | Path) -> Path:
    """The path of a manifest to be.

    Raises:
        UserError: if it exists, or does not end in .jsonl.
    """
    path = Path(output).expanduser()
    if path.suffix != ".jsonl":
        raise UserError(f"'{output}' does not end in .jsonl; a manifest has one JSON object per line.")
    if path.exists():
        raise UserError(f"'{path}' exists already; name another file, or move it away.")
    return path


# ---- folders of subjects


class Subject(NamedTuple):
    name: str
    noun: str
    pictures: list[Path]
    masks: list[Path | None]


def import_folder(
    folder: str | Path, output: str | Path, prompts: str | Path | Sequence[str], *, references: References = "first"
) -> Imported:
    """A folder of subject folders, and prompts that are asked of every subject.

    A subject folder holds pictures, if it likes their masks (`dog_mask.png` or `masks/dog.png` for `dog.jpg`), and if
    it likes its class noun in `class.txt`; else the noun is the folder's name without digits.

    Args:
        folder: of subject folders.
        output: the manifest to write.
        prompts: a text file with one prompt per line, or the prompts; `{subject}` in them stands for the noun.
        references: which pictures of a subject become references.

    Raises:
        UserError: if a path is missing, no picture or prompt is found, or `output` exists.
    """
    subjects = list(_subjects(_folder(folder)))
    if not subjects:
        raise UserError(f"'{folder}' has no subject folder with pictures in it ({', '.join(sorted(PICTURES))}).")
    asked = _read_prompts(prompts) if isinstance(prompts, (str, Path)) else list(prompts)
    path = check_free(output)
    return write_manifest(path, _ask(subjects, lambda subject: asked, path, references))


def import_dreambench(clone: str | Path, output: str | Path, *, references: References = "first") -> Imported:
    """DreamBench: a clone of github.com/google/dreambooth, 30 subjects with 25 prompts each.

    Args:
        clone: the clone, or the `dataset` folder in it.
        output: the manifest to write.
        references: which pictures of a subject become references.

    Raises:
        UserError: if the folder is not DreamBench, a subject has no pictures, or `output` exists.

    Source: dataset/prompts_and_classes.txt; live subjects (cats and dogs) have prompts of their own. The unique token
    of the prompts is left out, as all methods without fine-tuning per subject do.
    """
    subjects, prompts = read_dreambench(clone)
    path = check_free(output)
    return write_manifest(path, _ask(subjects, lambda s: prompts["live" if is_live(s) else "object"], path, references))


def read_dreambench(clone: str | Path) -> tuple[list[Subject], dict[str, list[str]]]:
    """The subjects of DreamBench, and its prompts with {subject} for the noun: "object" and "live".

    Raises:
        UserError: if the folder is not DreamBench, or a subject has no pictures.
    """
    root = _folder(clone)
    root = root / "dataset" if (root / "dataset").is_dir() else root
    listing = root / "prompts_and_classes.txt"
    if not listing.is_file():
        raise UserError(f"There is no '{listing}'; give a clone of github.com/google/dreambooth.")
    text = listing.read_text(encoding="utf-8")
    nouns = dict(re.findall(r"^(\w+),([\w ]+)$", text, re.MULTILINE))
    nouns.pop("subject_name", None)
    _, objects, live = re.split(r"^(?:Object|Live Subject) Prompts$", text, flags=re.MULTILINE)
    prompts = {
        kind: [prompt.replace("{0} {1}", "{subject}") for prompt in re.findall(r"'([^']+)'\.format", part)]
        for kind, part in (("object", objects), ("live", live))
    }
    found = {subject.name: subject for subject in _subjects(root)}
    if missing := sorted(nouns.keys() - found.keys()):
        raise UserError(f"'{root}' has no pictures of {', '.join(missing[:5])}; is the clone complete?")
    return [found[name]._replace(noun=noun.strip()) for name, noun in nouns.items()], prompts


def is_live(subject: Subject) -> bool:
    """DreamBench's live subjects are its cats and dogs; they have prompts of their own."""
    return subject.noun in ("cat", "dog")


def _ask(subjects: Iterable[Subject], prompts: Any, manifest: Path, references: References) -> Iterator[Record]:
    for subject in subjects:
        count = len(subject.pictures)
        chosen = {"first": [[0]], "all": [list(range(count))], "each": [[n] for n in range(count)]}.get(references)
        if chosen is None:
            raise UserError(f"references is '{references}'; it must be 'first', 'all' or 'each'.")
        for which in chosen:
            masks = [subject.masks[n] for n in which]
            for number, prompt in enumerate(prompts(subject)):
                suffix = f"-{which[0]:02d}" if references == "each" else ""
                yield Record(
                    id=f"{subject.name}{suffix}-{number:02d}",
                    prompt=prompt.replace("{subject}", subject.noun),
                    references=tuple(relative(subject.pictures[n], manifest) for n in which),
                    subject=subject.noun,
                    masks=tuple(mask and relative(mask, manifest) for mask in masks) if any(masks) else (),
                )


def _subjects(root: Path) -> Iterator[Subject]:
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
        pictures = [path for path in files if not path.stem.endswith("_mask")]
        if pictures:
            noun = folder / "class.txt"
            name = noun.read_text(encoding="utf-8").strip() if noun.is_file() else _noun(folder.name)
            yield Subject(folder.name, name, pictures, [_mask_of(picture) for picture in pictures])


def _mask_of(picture: Path) -> Path | None:
    beside = [picture.with_name(f"{picture.stem}_mask.png"), picture.parent / "masks" / f"{picture.stem}.png"]
    return next((path for path in beside if path.is_file()), None)


def _noun(folder: str) -> str:
    return re.sub(r"[\d_-]+", " ", folder).strip() or folder


def _read_prompts(path: str | Path) -> list[str]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"There is no prompt file '{path}'; write one prompt per line, with {{subject}} for the noun.")
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"'{file}' holds no prompt; write one per line, with {{subject}} for the noun.")
    return prompts


# ---- synthetic pairs


def import_syncd(annotations: str | Path, output: str | Path, *, pictures: str | Path | None = None) -> Imported:
    """SynCD: entries with `ref_img` (a path or several), `img`, `text` and `category_description`.

    The reference and the text make a task; `img`, the picture that goes with the text, is what a policy has to find
    itself. Entries without their reference on disk are skipped and counted.

    Args:
        annotations: a JSON list of entries, or one entry per line.
        output: the manifest to write.
        pictures: the folder that the paths of the entries start from; None is that of `annotations`.

    Raises:
        UserError: if an entry lacks a field, no reference is found, or `output` exists.
    """
    file = Path(annotations).expanduser()
    if not file.is_file():
        raise UserError(f"There is no annotation file '{annotations}'; give SynCD's JSON.")
    path, root = check_free(output), Path(pictures).expanduser() if pictures else file.parent
    records: list[Record] = []
    entries = _entries(file)
    for number, entry in enumerate(entries):
        lacking = [name for name in ("ref_img", "text") if not entry.get(name)]
        if lacking:
            raise UserError(f"'{file}', entry {number}: there is no '{lacking[0]}'; is it a SynCD annotation file?")
        names = [entry["ref_img"]] if isinstance(entry["ref_img"], str) else entry["ref_img"]
        found = [root / name for name in names]
        if all(picture.is_file() for picture in found):
            records.append(
                Record(
                    id=f"syncd-{number:06d}",
                    prompt=str(entry["text"]),
                    references=tuple(relative(picture, path) for picture in found),
                    subject=str(entry.get("category_description") or ""),
                )
            )
    if not records:
        raise UserError(f"None of the {len(entries)} references of '{file}' is under '{root}'; set pictures.")
    return write_manifest(path, records, skipped=len(entries) - len(records))


def _entries(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        entries = json.loads(text) if text.lstrip().startswith("[") else [
            json.loads(line) for line in text.splitlines() if line.strip()
        ]  # fmt: skip
    except json.JSONDecodeError as error:
        raise UserError(f"'{file}' is not JSON ({error.msg}, line {error.lineno}).") from error
    if not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"'{file}' does not hold a list of entries.")
    return entries


QUALITIES = ("compositeStructure", "objectConsistency", "imageQuality")


def import_subjects200k(
    rows: str | Path | Iterable[Mapping[str, Any]],
    output: str | Path,
    *,
    both_ways: bool = False,
    quality: int = 5,
    limit: int | None = None,
) -> Imported:
    """Subjects200K: pairs of pictures of one subject, side by side in one picture.

    The left picture becomes the reference and the right one's description the prompt. References are cut out and saved
    as PNG in a folder beside the manifest, named after it.

    Args:
        rows: the data set's rows; or its folder, parquet files or hub id, for which the `datasets` package is needed.
        output: the manifest to write.
        both_ways: also take the right picture with the left one's description.
        quality: least grade (0 to 5) in all of the data set's own assessments; rows below it are skipped.
        limit: stop after so many rows.

    Raises:
        UserError: if `datasets` is missing, nothing is good enough, or an output exists.
    """
    path = check_free(output)
    folder = path.with_suffix("")
    if folder.exists():
        raise UserError(f"'{folder}' exists already; the references would go there. Name another manifest.")
    counts = {"skipped": 0}
    opened: Iterable[Mapping[str, Any]] = open_dataset(rows) if isinstance(rows, (str, Path)) else rows
    imported = write_manifest(path, _halves(opened, folder, path, both_ways, quality, limit, counts))
    return imported._replace(skipped=counts["skipped"])


def _halves(
    rows: Iterable[Mapping[str, Any]], folder: Path, manifest: Path, both_ways: bool, quality: int, limit: int | None,
    counts: dict[str, int],
) -> Iterator[Record]:  # fmt: skip
    for number, row in enumerate(rows):
        if limit is not None and number >= limit:
            return
        grades, told = row.get("quality_assessment") or {}, row.get("description") or {}
        if any((grades.get(name) or 0) < quality for name in QUALITIES):
            counts["skipped"] += 1
            continue
        image = as_picture(row["image"])
        margin = max(0, 2 * image.height - image.width)  # height = side + 2 margins, width = 2 sides + 3 margins
        side = image.height - 2 * margin
        for half in (0, 1) if both_ways else (0,):
            left = margin + half * (side + margin)
            reference = folder / f"{number:06d}" / f"{('left', 'right')[half]}.png"
            write(reference, png(image.crop((left, margin, left + side, margin + side))))
            yield Record(
                id=f"subjects200k-{number:06d}-{half}",
                prompt=str(told[f"description_{1 - half}"]),
                references=(relative(reference, manifest),),
                subject=str(told.get("item") or ""),
            )


# ---- paths


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"There is no folder '{path}'; check the path.")
    return folder


def relative(picture: Path, manifest: Path) -> str:
    """The path of a picture as a manifest writes it."""
    return Path(os.path.relpath(picture.absolute(), manifest.absolute().parent)).as_posix()
