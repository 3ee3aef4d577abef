"""The tasks of a protocol: what a policy is shown, what its images are compared with, and the real images."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from customized_grpo.data.decode import read_mask, read_picture
from customized_grpo.data.hub import as_picture, open_dataset
from customized_grpo.data.importers import Subject, is_live, read_dreambench
from customized_grpo.errors import UserError
from customized_grpo.rewards.xverse import read_samples
from customized_grpo.store import read_json, read_text
from customized_grpo.structures import Example
from customized_grpo.studies.bench.protocols import Protocol


@dataclass(frozen=True)
class Task:
    """One prompt for one subject (or several together)."""

    id: str
    prompt: str
    subject: str
    """Intervals resample subjects."""
    kind: str
    """Of subject: live, object, mixed ..."""
    prompt_kind: str
    """recontextualisation, accessory, property ..."""


class Real(NamedTuple):
    """A real image, and the other photos of its subject."""

    subject: str
    name: str
    image: Image.Image
    others: Mapping[bool, Example | None]
    """Those that images of this subject are compared with (False), and those that the policy sees (True), without this
    one; None if none are left."""


@dataclass(frozen=True)
class Suite:
    """The tasks of a protocol and their images, which are read when they are asked for."""

    tasks: Sequence[Task]
    example: Callable[[Task, bool], Example]
    """A task with the photos that its images are compared with (False), or with those that the policy sees (True). The
    id of the example seeds the noise."""
    real: Callable[[], Iterable[Real]]
    """The real images of all subjects."""


class Photo(NamedTuple):
    """An image on disk, and its mask if there is one."""

    path: Path
    mask: Path | None = None


class Photos(NamedTuple):
    """The photos of one subject."""

    noun: str
    real: tuple[Photo, ...]
    by_use: tuple[tuple[Photo, ...], tuple[Photo, ...]]
    """Those that images are compared with, and those that the policy sees."""


Found = tuple[list[Task], dict[str, list[Photos]]]
"""Tasks, and the photos of their subjects, which are several where they are together in one image."""


def photo_suite(tasks: Sequence[Task], photos: dict[str, list[Photos]]) -> Suite:
    """Tasks about photos on disk."""

    def with_photos(subject: str, chosen: Sequence[Photo], name: str = "", prompt: str = "") -> Example:
        images, masks = zip(*map(_read, chosen), strict=True)
        nouns = " and ".join(part.noun for part in photos[subject])
        return Example(name, prompt, images, nouns, masks if any(masks) else ())

    def example(task: Task, shown: bool) -> Example:
        chosen = [photo for part in photos[task.subject] for photo in part.by_use[shown]]
        return with_photos(task.subject, chosen, task.id, task.prompt)

    def real() -> Iterator[Real]:
        for subject in dict.fromkeys(task.subject for task in tasks):
            for photo, by_use in [(photo, part.by_use) for part in photos[subject] for photo in part.real]:
                groups = ([other for other in group if other.path != photo.path] for group in by_use)
                others = [with_photos(subject, group) if group else None for group in groups]
                name = f"{photo.path.parent.name}/{photo.path.name}"
                yield Real(subject, name, _read(photo)[0], dict(zip((False, True), others, strict=True)))

    return Suite(tasks, example, real)


@lru_cache(maxsize=64)
def _read(photo: Photo) -> tuple[Image.Image, Image.Image | None]:
    image, alpha = read_picture(photo.path)
    return image, read_mask(photo.mask, image.size) if photo.mask else alpha


def toy_suite(subjects: int, prompts: int, seed: int) -> Suite:
    """Unseen creatures of the toy world."""
    from customized_grpo.toyworld.dataset import ToyWorld
    from customized_grpo.toyworld.draw import render

    examples = list(ToyWorld("eval", subjects * prompts, seed, per_subject=prompts))
    known = {example.id: example for example in examples}
    tasks = [
        Task(e.id, e.prompt, f"creature-{n // prompts:03d}", e.subject, str(e.truth_scene.kind))
        for n, e in enumerate(examples)
    ]

    def real() -> Iterator[Real]:
        for n, (task, example) in enumerate(zip(tasks, examples, strict=True)):
            drawn = Image.fromarray(render(example.truth_subject, example.truth_scene, n))
            yield Real(task.subject, task.id, drawn, {False: example, True: example})

    return Suite(tasks, lambda task, shown: known[task.id], real)


def omnicontext(rows: Any, subjects: int | None = None) -> Suite:
    """OmniContext's English instructions: the first half of `task_type` is single, multi or scene.

    Args:
        rows: its data set, as `open_dataset` opens it.
        subjects: only the first so many tasks.
    """
    names = ("key", "task_type", "instruction", "instruction_language")
    if missing := set(names) - set(rows.column_names):
        raise UserError(f"The data has no column {', '.join(sorted(missing))}; give OmniContext's data folder.")
    places: dict[str, int] = {}
    tasks: list[Task] = []
    for place, (key, kind, prompt, language) in enumerate(zip(*(rows[name] for name in names), strict=True)):
        if language == "en":
            name = f"{kind}-{key}"
            places[name] = place
            tasks.append(Task(name, prompt, name, kind, kind.partition("_")[0]))

    def example(task: Task, shown: bool) -> Example:
        pictures = rows[places[task.id]]["input_images"]
        references = tuple(as_picture(picture, f"An image of {task.id}")[0] for picture in pictures)
        return Example(task.id, task.prompt, references, kind=task.prompt_kind)

    return Suite(tasks[:subjects], example, lambda: ())


WHERE = {
    "dreambench++": "DreamBench++'s data",
    "xverse": "a clone of github.com/bytedance/XVerse with its photos",
    "omnicontext": "the parquet files of huggingface.co/datasets/OmniGen2/OmniContext",
}
"""What the data folder of a suite holds."""


def open_suite(
    protocol: Protocol, data: Path | None = None, prompts: Path | None = None, subjects: int | None = None
) -> Suite:
    """The tasks of a protocol.

    Args:
        protocol: with the tasks.
        data: folder of its images.
        prompts: its list of prompts and photos, where it has one.
        subjects: only the first so many subjects.

    Raises:
        UserError: if something is missing, or does not fit the protocol.
    """
    if protocol.suite == "toyworld":
        if data is not None:
            raise UserError("The protocol 'toyworld' draws its own data; leave data out.")
        return toy_suite(min(subjects or protocol.subjects, protocol.subjects), protocol.prompts, protocol.seed)
    if data is None:
        what = WHERE.get(protocol.suite, "a clone of github.com/google/dreambooth")
        raise UserError(f"The protocol '{protocol.name}' needs images: data=FOLDER, {what}.")
    data = data.expanduser()
    if not data.is_dir():
        raise UserError(f"There is no data folder '{data}'; check data=FOLDER.")
    if protocol.suite == "file" and prompts is None:
        raise UserError(
            f"The protocol '{protocol.name}' needs its list of prompts and photos: prompts=FILE.json, entries of "
            f"'prompt' and 'image_paths'."
        )
    if protocol.suite == "omnicontext":
        return omnicontext(open_dataset(data), subjects)
    if protocol.suite == "dreambench++":
        tasks, photos = dreambench_plus(data)
    elif protocol.suite == "xverse":
        tasks, photos = xverse(data, "multi" if protocol.name.endswith("-multi") else "single")
    elif prompts is not None:
        tasks, photos = listed(data, prompts.expanduser(), protocol.references)
    else:
        tasks, photos = dreambooth(data, against_all=protocol.name == "dreambooth")
    if not tasks:
        raise UserError("The protocol's data holds no task; check the path.")
    kept = list(dict.fromkeys(task.subject for task in tasks))[:subjects]
    return photo_suite([task for task in tasks if task.subject in kept], photos)


def dreambooth(data: Path, *, against_all: bool) -> Found:
    """Every prompt of DreamBench for every subject; the policy sees the first photo.

    Args:
        data: a clone of github.com/google/dreambooth, or the `dataset` folder in it.
        against_all: compare with all photos of the subject, or with the one that was shown.
    """
    subjects, prompts = read_dreambench(data)
    tasks: list[Task] = []
    photos: dict[str, list[Photos]] = {}
    for subject in subjects:
        kind = "live" if is_live(subject) else "object"
        own = _photos(subject)
        photos[subject.name] = [Photos(subject.noun, own, (own if against_all else own[:1], own[:1]))]
        asked = [template.replace("{subject}", subject.noun) for template in prompts[kind]]
        tasks += [_task(subject.name, n, prompt, kind) for n, prompt in enumerate(asked)]
    return tasks, photos


def listed(data: Path, file: Path, references: int) -> Found:
    """The tasks of a JSON list of {"prompt", "image_paths"}, whose paths end in SUBJECT/PHOTO.

    Args:
        data: a clone of github.com/google/dreambooth, or the `dataset` folder in it.
        file: the list.
        references: photos that each entry must name.
    """
    subjects = {subject.name: subject for subject in read_dreambench(data)[0]}
    tasks: list[Task] = []
    photos: dict[str, list[Photos]] = {}
    for number, (prompt, paths) in enumerate(_entries(file, references)):
        parts = [_find(path, subjects, f"'{file}', entry {number}") for path in paths]
        own = [Photos(subject.noun, _photos(subject), ((photo,), (photo,))) for subject, photo in parts]
        name = "+".join(subject.name for subject, _ in parts)
        if photos.setdefault(name, own) != own:
            name = "+".join(f"{subject.name}-{photo.path.stem}" for subject, photo in parts)
            photos[name] = own
        live = {is_live(subject) for subject, _ in parts}
        kind = "mixed" if len(live) > 1 else "live" if live == {True} else "object"
        tasks.append(_task(name, sum(task.subject == name for task in tasks), prompt, kind))
    return tasks, photos


def dreambench_plus(data: Path) -> Found:
    """DreamBench++: images/**/NAME.jpg, each with captions/**/NAME.txt: the noun, then a prompt on each line."""
    root = data / "data" if (data / "data" / "images").is_dir() else data
    images = sorted((root / "images").rglob("*.jpg"))
    if not images:
        raise UserError(f"'{data}' holds no images/**/*.jpg; give DreamBench++'s data folder.")
    tasks: list[Task] = []
    photos: dict[str, list[Photos]] = {}
    for image in images:
        place = image.relative_to(root / "images").with_suffix("")
        captions = root / "captions" / place.with_suffix(".txt")
        if not captions.is_file():
            raise UserError(f"There is no '{captions}' for '{image}'; is the download complete?")
        noun, *prompts = [line.strip() for line in read_text(captions).split("\n") if line.strip()] or [""]
        if not prompts:
            raise UserError(f"'{captions}' must hold the noun and then a prompt a line; is the download complete?")
        name, photo = "-".join(place.parts), Photo(image)
        photos[name] = [Photos(noun, (), ((photo,), (photo,)))]
        kind = place.parts[-2] if len(place.parts) > 1 else "object"
        tasks += [_task(name, n, prompt, kind, PLUS_KINDS[min(n, 8)]) for n, prompt in enumerate(prompts)]
    return tasks, photos


def xverse(clone: Path, name: str) -> Found:
    """The list "single" or "multi" of XVerseBench; a task has the id by which its scores find what they need."""
    tasks: list[Task] = []
    photos: dict[str, list[Photos]] = {}
    for id, sample in read_samples(clone, name).items():
        files = [clone / part.path for part in sample.parts]
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"There is no '{missing[0]}'; prepare the photos as assets/ReadMe.md of the clone says.")
        shown = [(Photo(file),) for file in files]
        photos[id] = [Photos(part.noun, (), (own, own)) for part, own in zip(sample.parts, shown, strict=True)]
        kind = "one subject" if len(files) == 1 else f"{len(files)} subjects"
        tasks.append(Task(id, sample.prompt, id, kind, "+".join(sorted({part.folder for part in sample.parts}))))
    return tasks, photos


PLUS_KINDS = ("photorealistic",) * 4 + ("styled",) * 3 + ("imaginative",) * 2
"""Of DreamBench++'s nine prompts, by their place. Source: Peng et al. 2024, sec. 3."""
PROPERTIES = ("red", "purple", "shiny", "wet", "cube shaped")
"""That DreamBench's prompts give to a subject."""


def prompt_kind(prompt: str) -> str:
    """DreamBench's kind of a prompt, by its wording; the lists for one and for two subjects word them alike."""
    if re.match(rf"an? ({'|'.join(PROPERTIES)}) ", prompt):
        return "property"
    return "accessory" if re.search(r"\bwearing\b|\boutfit\b", prompt) else "recontextualisation"


def _task(subject: str, number: int, prompt: str, kind: str, of_prompt: str = "") -> Task:
    return Task(f"{subject}-{number:02d}", prompt, subject, kind, of_prompt or prompt_kind(prompt))


def _photos(subject: Subject) -> tuple[Photo, ...]:
    return tuple(map(Photo, subject.pictures, subject.masks))


def _find(path: str, subjects: dict[str, Subject], where: str) -> tuple[Subject, Photo]:
    place = PurePosixPath(path)
    subject = subjects.get(place.parent.name)
    photo = next((p for p in _photos(subject) if p.path.name == place.name), None) if subject else None
    if subject is None or photo is None:
        raise UserError(f"{where}: '{path}' is not among the photos of the data folder; is the clone complete?")
    return subject, photo


def _entries(file: Path, references: int) -> Iterator[tuple[str, list[str]]]:
    if not file.is_file():
        raise UserError(f"There is no list of prompts '{file}'; check prompts=FILE.json.")
    entries = read_json(file)
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        prompt, paths = (entry.get("prompt"), entry.get("image_paths")) if isinstance(entry, dict) else (None, None)
        if not isinstance(prompt, str) or not isinstance(paths, list) or not prompt.strip():
            raise UserError(f"'{file}', entry {number}: expected 'prompt' and 'image_paths', got {str(entry)[:80]}.")
        if len(paths) != references:
            raise UserError(f"'{file}', entry {number} names {len(paths)} photos; this protocol shows {references}.")
        yield prompt, [str(path) for path in paths]
