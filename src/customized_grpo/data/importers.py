"""Data sets of the field to a manifest. Images stay where they are, and nothing is overwritten."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from customized_grpo.data.decode import NONZERO, PICTURES
from customized_grpo.data.examples import Record, check_kinds, identities
from customized_grpo.data.hub import as_picture, open_dataset
from customized_grpo.data.images import png
from customized_grpo.errors import UserError
from customized_grpo.store import check_place, is_file, read_json, read_text, write

T = TypeVar("T")
References = Literal["first", "all", "each"]
"""Of a subject's images: the first is the reference; all are, together; or each is, in examples of its own."""
LeftOut = dict[str, list[str]]
"""Why something was left out, and the names of all that were left out for this reason."""


class Imported(NamedTuple):
    """What an import wrote."""

    manifest: Path
    examples: int
    subjects: int
    left_out: LeftOut

    @property
    def skipped(self) -> int:
        """How many entries were left out."""
        return sum(map(len, self.left_out.values()))


def write_manifest(output: str | Path, records: Iterable[Record], left_out: LeftOut | None = None) -> Imported:
    """One JSON object per line; the file appears when it is complete.

    Raises:
        UserError: if the file exists, there is no record, or there are more than 20 kinds of prompt.
    """
    path = check_free(output)
    left_out, written = {} if left_out is None else left_out, list(records)
    if not written:
        raise UserError(f"Nothing was found to write to '{path}'{_told(left_out)}.")
    check_kinds((record.kind for record in written), path)
    lines = [
        json.dumps({k: v for k, v in record.model_dump().items() if v not in ("", (), {})}, ensure_ascii=False) + "\n"
        for record in written
    ]
    try:
        write(path, "".join(lines), new=True)
    except FileExistsError as error:  # another import has been faster
        raise UserError(f"'{path}' exists already; name another file, or move it away.") from error
    return Imported(path, len(written), len(set(identities(written))), left_out)


def _told(left_out: LeftOut) -> str:
    some = [f"{reason}: {', '.join(names[:3])}{' ...' if names[3:] else ''}" for reason, names in left_out.items()]
    return f" ({'; '.join(some)})" if some else ""


def check_free(output: str | Path) -> Path:
    """The path of a manifest to be.

    Raises:
        UserError: if it exists, or does not end in .jsonl.
    """
    path = Path(output).expanduser()
    if path.suffix != ".jsonl":
        raise UserError(f"'{output}' does not end in .jsonl; a manifest has one JSON object per line.")
    check_place(path)
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

    A subject folder holds images, their masks if there are any (`dog_mask.png` or `masks/dog.png` for `dog.jpg`), and
    perhaps the class noun in `class.txt`; without it the noun is the folder's name without digits. Everything else is
    left out and named in the result.

    Args:
        folder: of subject folders.
        output: the manifest to write.
        prompts: a text file with one prompt per line, or the prompts; `{subject}` in them stands for the noun.
        references: which pictures of a subject become references.

    Raises:
        UserError: if a path is missing, no image or prompt is found, a prompt has braces other than those of
            `{subject}`, `class.txt` is not one line, or `output` exists.
    """
    left_out: LeftOut = {}
    used = prompts if isinstance(prompts, (str, Path)) else None
    subjects = list(find_subjects(_folder(folder), left_out, Path(used).expanduser().absolute() if used else None))
    if not subjects:
        raise UserError(f"'{folder}' has no subject folder with images in it{_told(left_out)}.")
    if isinstance(prompts, (str, Path)):
        asked = _read_prompts(Path(prompts).expanduser())
    else:
        asked = [_template(prompt, f"Prompt {number}") for number, prompt in enumerate(prompts, start=1)]
    path = check_free(output)
    return write_manifest(path, _ask(subjects, lambda subject: asked, path, references), left_out)


def import_dreambench(clone: str | Path, output: str | Path, *, references: References = "first") -> Imported:
    """DreamBench: a clone of github.com/google/dreambooth, 30 subjects with 25 prompts each.

    Args:
        clone: the clone, or the `dataset` folder in it.
        output: the manifest to write.
        references: which pictures of a subject become references.

    Raises:
        UserError: if the folder is not DreamBench, a subject has no pictures, or `output` exists.

    Source: dataset/prompts_and_classes.txt; live subjects (cats and dogs) have prompts of their own. The unique token
    of the prompts is left out, as all methods without fine-tuning per subject do. The kind of a prompt is recontext,
    accessory or property.
    """
    subjects, prompts = read_dreambench(clone)
    path = check_free(output)
    records = _ask(
        subjects, lambda s: prompts["live" if is_live(s) else "object"], path, references, dreambench_kind
    )  # fmt: skip
    return write_manifest(path, records)


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
    text = read_text(listing)
    nouns = dict(re.findall(r"^(\w+),([\w ]+)$", text, re.MULTILINE))
    nouns.pop("subject_name", None)
    _, objects, live, *_ = [*re.split(r"^(?:Object|Live Subject) Prompts$", text, flags=re.MULTILINE), "", ""]
    prompts = {
        kind: [
            _template(p.replace("{0} {1}", "{subject}"), str(listing)) for p in re.findall(r"'([^']+)'\.format", part)
        ]
        for kind, part in (("object", objects), ("live", live))
    }
    if not nouns or not all(prompts.values()):
        raise UserError(f"'{listing}' does not list classes, object prompts and live prompts; is the clone complete?")
    found = {subject.name: subject for subject in find_subjects(root, {})}
    if missing := sorted(nouns.keys() - found.keys()):
        raise UserError(f"'{root}' has no images of {', '.join(missing[:5])}; is the clone complete?")
    return [found[name]._replace(noun=noun.strip()) for name, noun in nouns.items()], prompts


def is_live(subject: Subject) -> bool:
    """DreamBench's live subjects are its cats and dogs; they have prompts of their own."""
    return subject.noun in ("cat", "dog")


def dreambench_kind(prompt: str) -> str:
    """The kind of a prompt of DreamBench's lists, with {subject} for the noun, by its wording.

    The lists hold recontextualisations, then (live subjects alone) accessories, then properties: "a red {subject}".
    """
    if re.fullmatch(r"an? .+ {subject}", prompt):
        return "property"
    return "accessory" if re.search(r"\bwearing\b|\boutfit\b", prompt) else "recontext"


def _ask(
    subjects: Iterable[Subject], prompts: Any, manifest: Path, references: References,
    kind_of: Callable[[str], str] | None = None,
) -> Iterator[Record]:  # fmt: skip
    for subject in subjects:
        count = len(subject.pictures)
        chosen = {"first": [[0]], "all": [list(range(count))], "each": [[n] for n in range(count)]}
        for which in _choice(chosen, references):
            masks = [subject.masks[n] for n in which]
            for number, prompt in enumerate(prompts(subject)):
                suffix = f"-{which[0]:02d}" if references == "each" else ""
                yield Record(
                    id=f"{subject.name}{suffix}-{number:02d}",
                    prompt=prompt.replace("{subject}", subject.noun),
                    references=tuple(relative(subject.pictures[n], manifest) for n in which),
                    subject=subject.noun,
                    masks=tuple(mask and relative(mask, manifest) for mask in masks) if any(masks) else (),
                    kind=kind_of(prompt) if kind_of else "",
                )


def _choice(chosen: Mapping[str, T], references: str) -> T:
    if references not in chosen:
        raise UserError(f"references is '{references}'; it must be 'first', 'all' or 'each'.")
    return chosen[references]


def find_subjects(root: Path, left_out: LeftOut, prompts: Path | None = None) -> Iterator[Subject]:
    """The subjects of a folder; what is no image of one is left out, and the prompts are no subject."""
    for folder in _entries(root, root, left_out):
        if folder.absolute() == prompts:
            continue
        if not folder.is_dir():
            _leave(left_out, "not in a subject folder", folder, root)
        elif subject := _subject(folder, root, left_out):
            yield subject
        else:
            _leave(left_out, "subject folder without an image", folder, root)


def _subject(folder: Path, root: Path, left_out: LeftOut) -> Subject | None:
    noun, pictures, masks = _noun(folder.name), list[Path](), dict[str, list[Path]]()
    for path in _entries(folder, root, left_out):
        if path.is_dir() and path.name.lower() == "masks":
            for mask in _entries(path, root, left_out):
                masks.setdefault(mask.stem.lower(), []).append(mask)
        elif path.is_dir():
            _leave(left_out, "folder inside a subject folder", path, root)
        elif path.name.lower() == "class.txt":
            noun = _read_noun(path)
        elif path.suffix.lower() not in PICTURES or not path.is_file():
            _leave(left_out, "not an image that can be read", path, root)
        elif path.stem.lower().endswith("_mask"):
            masks.setdefault(path.stem.lower().removesuffix("_mask"), []).insert(0, path)
        else:
            pictures.append(path)
    taken = {picture: _mask_of(picture, masks) for picture in pictures}
    for mask in (mask for some in masks.values() for mask in some if mask not in taken.values()):
        _leave(left_out, "mask that belongs to no image, or a second mask of one", mask, root)
    return Subject(folder.name, noun, pictures, list(taken.values())) if pictures else None


def _entries(folder: Path, root: Path, left_out: LeftOut) -> Iterator[Path]:
    """What is in a folder, by name, without what systems leave there and names that no manifest can hold."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__MACOSX")) or path.name.lower() in ("thumbs.db", "desktop.ini"):
            _leave(left_out, "hidden, or a system's file", path, root)
        elif path.name.encode("utf-8", "replace").decode() != path.name:
            _leave(left_out, "name that is not UTF-8", path, root)
        else:
            yield path


def _leave(left_out: LeftOut, reason: str, path: Path, root: Path) -> None:
    left_out.setdefault(reason, []).append(path.relative_to(root).as_posix())


def _mask_of(picture: Path, masks: Mapping[str, Sequence[Path]]) -> Path | None:
    readable = [mask for mask in masks.get(picture.stem.lower(), ()) if mask.suffix.lower() in PICTURES]
    return min(readable, key=lambda mask: mask.suffix.lower() != ".png", default=None)


def _noun(folder: str) -> str:
    return re.sub(r"[\d_-]+", " ", folder).strip() or folder


def _read_noun(file: Path) -> str:
    lines = [line.strip() for line in read_text(file).split("\n")]
    found = [(number, line) for number, line in enumerate(lines, start=1) if line]
    if len(found) != 1:
        wrong = f"line {found[1][0]} is '{found[1][1][:40]}'" if found else "it is empty"
        raise UserError(f"'{file}' must be one line with the class noun, and {wrong}; write the noun alone.")
    return found[0][1]


def _read_prompts(file: Path) -> list[str]:
    if not is_file(file):
        raise UserError(
            f"There is no prompt file '{str(file)[:100]}'; write one prompt per line, with {{subject}} for the noun."
        )
    lines = [line.strip() for line in read_text(file).split("\n")]
    prompts = [
        _template(line, f"'{file}', line {number}")
        for number, line in enumerate(lines, start=1)
        if line and not line.startswith("#")
    ]
    if not prompts:
        raise UserError(f"'{file}' holds no prompt; write one per line, with {{subject}} for the noun.")
    return prompts


def _template(prompt: str, where: str) -> str:
    if not prompt.strip():
        raise UserError(f"{where} is empty; say what to draw.")
    if re.search("[{}]", prompt.replace("{subject}", "")):
        raise UserError(f"{where}: '{prompt}' has braces other than {{subject}}, which alone stands for something.")
    return prompt


# ---- synthetic pairs


def import_syncd(
    source: str | Path, output: str | Path, *, references: References = "first",
    least: Mapping[Literal["dino", "aesthetics"], float] | None = None,
) -> Imported:  # fmt: skip
    """SynCD: sets of images of one object, each image with its own prompt.

    Every image but the reference makes a task of its prompt; the image itself is the target. With
    `references` "all", each image is asked for with the others as references, and with "each", with each of the others.
    Sets with a missing image, or with one image alone, are left out.

    Args:
        source: the folder with `*metadata.json`, or such a file; with `least`, with `*metadata_with_scores.json`.
        output: the manifest to write.
        references: which images of a set become references.
        least: the filter of SynCD's loader. "aesthetics" is the least score of an image, and "dino" the least
            similarity to another image of its set, which must not be above 0.98.

    Raises:
        UserError: if there is no such file, an entry of it lacks something, no image is found, or `output` exists.

    Source: nupurkmr9/syncd, method/data/data.py: lists of {"filenames", "prompts"}, paths relative to the file; the
    mask of NAME is masks/NAME.jpg beside it, of any size, and marks the object by what is not black. Scores, as
    dataset/cal_scores.py writes them: "aesthetics_scores" by name, "dino_scores" of pairs in an upper triangle.
    """
    given, pattern = Path(source).expanduser(), "*metadata_with_scores.json" if least else "*metadata.json"
    files = sorted(given.glob(pattern)) if given.is_dir() else [given] if given.is_file() else []
    if not files:
        raise UserError(f"'{source}' is no folder with {pattern} and no such file; give SynCD's folder.")
    if wrong := sorted(set(least or ()) - {"dino", "aesthetics"}):
        raise UserError(f"SynCD has no score '{wrong[0]}'; filter by dino or aesthetics.")
    path, left_out = check_free(output), LeftOut()
    sets = [(file, number, entry) for file in files for number, entry in enumerate(read_list(file))]
    records = (
        record
        for count, (file, number, entry) in enumerate(sets)
        for record in _of_set(entry, file, number, f"syncd-{count:06d}", path, references, least or {}, left_out)
    )
    return write_manifest(path, records, left_out)


def _of_set(
    entry: Any, file: Path, number: int, name: str, manifest: Path, references: References,
    least: Mapping[Any, float], left_out: LeftOut,
) -> Iterator[Record]:  # fmt: skip
    """The tasks of one set of images."""
    names, prompts = [entry.get(key) for key in ("filenames", "prompts")] if isinstance(entry, dict) else ("", "")
    where = f"'{file}', entry {number}"
    if not (isinstance(names, list) and isinstance(prompts, list)) or not all(
        isinstance(text, str) and text.strip() for text in (*names, *prompts)
    ):
        raise UserError(f"{where}: expected lists 'filenames' and 'prompts', got {str(entry)[:80]}.")
    if len(prompts) < len(names):
        raise UserError(f"{where} has {len(names)} filenames and {len(prompts)} prompts; give one for each.")
    images = [file.parent / some for some in names]
    everyone = _good(entry, images, least, where)
    few = "set of fewer than two images that pass" if least else "set of one image"
    reason = few if len(everyone) < 2 else "set with a missing image"
    if len(everyone) < 2 or not all(images[n].is_file() for n in everyone):
        left_out.setdefault(reason, []).append(f"{file.name}, entry {number}")
        return
    chosen = {
        "first": [(everyone[:1], n) for n in everyone[1:]],
        "all": [([k for k in everyone if k != n], n) for n in everyone],
        "each": [([k], n) for k in everyone for n in everyone if k != n],
    }
    for which, n in _choice(chosen, references):
        masks = [m if (m := images[k].parent / "masks" / f"{images[k].stem}.jpg").is_file() else None for k in which]
        yield Record(
            id=f"{name}-{n:02d}" + (f"-{which[0]:02d}" if references == "each" else ""),
            prompt=prompts[n],
            references=tuple(relative(images[k], manifest) for k in which),
            subject_id=str(entry.get("objaverse_id") or name),
            masks=tuple(mask and relative(mask, manifest) for mask in masks) if any(masks) else (),
            mask_labels=tuple(mask and NONZERO for mask in masks) if any(masks) else (),
            target=relative(images[n], manifest),
        )


def _good(entry: Mapping[str, Any], images: Sequence[Path], least: Mapping[Any, float], where: str) -> list[int]:
    """The images of a set that have the least scores."""
    everyone = list(range(len(images)))
    try:
        if "aesthetics" in least:
            everyone = [n for n in everyone if entry["aesthetics_scores"][images[n].stem] >= least["aesthetics"]]
        if "dino" in least:
            pairs = list(combinations(range(len(images)), 2))
            alike = {n for a, b in pairs if least["dino"] <= entry["dino_scores"][a][b] <= 0.98 for n in (a, b)}
            everyone = [n for n in everyone if n in alike]
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{where} lacks scores of its images ({type(error).__name__}: {error}); a filter reads the "
            f"*metadata_with_scores.json of SynCD's cal_scores.py."
        ) from error
    return everyone


def read_list(file: Path) -> list[Any]:
    """The list in a JSON file; UserError if there is none."""
    content = read_json(file)
    if not isinstance(content, list):
        raise UserError(f"'{file}' holds a {type(content).__name__}; expected a JSON list.")
    return content


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

    The left picture becomes the reference, the right one the target and its description the prompt. Both are cut out
    and saved as PNG in a folder beside the manifest, named after it.

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
        raise UserError(f"'{folder}' exists already; the images would go there. Name another manifest.")
    left_out: LeftOut = {}
    opened: Iterable[Mapping[str, Any]] = open_dataset(rows) if isinstance(rows, (str, Path)) else rows
    return write_manifest(path, _halves(opened, folder, path, both_ways, quality, limit, left_out), left_out)


def _halves(
    rows: Iterable[Mapping[str, Any]], folder: Path, manifest: Path, both_ways: bool, quality: int, limit: int | None,
    left_out: LeftOut,
) -> Iterator[Record]:  # fmt: skip
    for number, row in enumerate(rows):
        if limit is not None and number >= limit:
            return
        grades, told = row.get("quality_assessment") or {}, row.get("description") or {}
        if any((grades.get(name) or 0) < quality for name in QUALITIES):
            left_out.setdefault(f"graded below {quality}", []).append(f"row {number}")
            continue
        try:
            image, _ = as_picture(row.get("image"), f"Row {number}")
        except UserError:
            left_out.setdefault("image that cannot be read", []).append(f"row {number}")
            continue
        margin = max(0, 2 * image.height - image.width)  # height = side + 2 margins, width = 2 sides + 3 margins
        side = image.height - 2 * margin
        files = [folder / f"{number:06d}" / f"{name}.png" for name in ("left", "right")]
        for half in (0, 1) if both_ways else (0,):
            name, prompt = f"{number:06d}-{half}", str(told.get(f"description_{1 - half}") or "")
            if side < 1 or not prompt.strip():
                left_out.setdefault("no description, or not two images side by side", []).append(f"row {number}")
                continue
            for file, left in zip(files, (margin, 2 * margin + side), strict=True):
                if not file.exists():
                    write(file, png(image.crop((left, margin, left + side, margin + side))))
            yield Record(
                id=f"subjects200k-{name}",
                prompt=prompt,
                references=(relative(files[half], manifest),),
                target=relative(files[1 - half], manifest),
                subject=str(told.get("item") or ""),
            )


# ---- paths


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"There is no folder '{path}'; check the path.")
    return folder


def relative(picture: Path, manifest: Path) -> str:
    """The path of an image as a manifest writes it, true to where links lead: `..` counts from there."""
    folder = picture.absolute().parent
    folder = folder.resolve() if ".." in folder.parts else folder
    return Path(os.path.relpath(folder / picture.name, manifest.absolute().parent.resolve())).as_posix()


def rebased(record: Record, root: Path, manifest: Path) -> Record:
    """A record of a manifest in the folder `root`, with its paths as another manifest writes them."""
    moved = tuple(relative(root / name, manifest) for name in record.references)
    masks = tuple(mask and relative(root / mask, manifest) for mask in record.masks)
    target = relative(root / record.target, manifest) if record.target else ""
    return record.model_copy(update={"references": moved, "masks": masks, "target": target})
