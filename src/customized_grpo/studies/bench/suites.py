"""The tasks of a protocol: what a policy is shown, what its pictures are compared with, and the real photos."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from PIL import Image

from customized_grpo.data.decode import read_mask, read_picture
from customized_grpo.data.importers import Subject, is_live, read_dreambench
from customized_grpo.errors import UserError
from customized_grpo.store import read_json, read_text
from customized_grpo.structures import Example
from customized_grpo.studies.bench.protocols import Protocol

PROPERTIES = ("red", "purple", "shiny", "wet", "cube shaped")
"""What DreamBench's prompts make of a subject."""


@dataclass(frozen=True)
class Task:
    """One prompt for one subject (or several together)."""

    id: str
    prompt: str
    subject: str
    """Whose picture it is: intervals resample subjects."""
    kind: str
    """Of subject: live, object, mixed ..."""
    prompt_kind: str
    """recontextualisation, accessory, property ..."""


@dataclass(frozen=True)
class Real:
    """A true picture, and what it is compared with."""

    subject: str
    name: str
    image: Image.Image
    compared: Example | None
    """The photos that pictures of this subject are compared with, without this one; None if none are left."""
    shown: Example | None
    """The photos that the policy sees, without this one; None if none are left."""


class Suite(ABC):
    """The tasks of a protocol and their pictures, read when they are asked for."""

    tasks: list[Task]

    @abstractmethod
    def shown(self, task: Task) -> Example:
        """What the policy sees; its id seeds the noise."""

    @abstractmethod
    def compared(self, task: Task) -> Example:
        """What identity is measured against."""

    @abstractmethod
    def real(self) -> Iterable[Real]:
        """The true pictures of all subjects."""

    def keep(self, subjects: int) -> None:
        """Only the first so many subjects, for a trial."""
        kept = list(dict.fromkeys(task.subject for task in self.tasks))[:subjects]
        self.tasks = [task for task in self.tasks if task.subject in kept]


@dataclass(frozen=True)
class Photo:
    """A picture on disk, and its mask if there is one."""

    path: Path
    mask: Path | None = None


@dataclass(frozen=True)
class Photos:
    """The photos of one subject, or of several that are in one picture."""

    noun: str
    shown: tuple[Photo, ...]
    compared: tuple[Photo, ...]
    real: tuple[tuple[Photo, tuple[Photo, ...], tuple[Photo, ...]], ...]
    """Per true photo: itself, the compared ones and the shown ones of the same subject."""


class PhotoSuite(Suite):
    """Tasks about photos on disk.

    Raises:
        UserError: if there is no task.
    """

    def __init__(self, tasks: Sequence[Task], photos: dict[str, Photos]) -> None:
        if not tasks:
            raise UserError("The protocol's data holds no task; check the path.")
        self.tasks, self.photos = list(tasks), photos

    def shown(self, task: Task) -> Example:
        return self._example(task.id, task.prompt, task.subject, self.photos[task.subject].shown)

    def compared(self, task: Task) -> Example:
        return self._example(task.id, task.prompt, task.subject, self.photos[task.subject].compared)

    def real(self) -> Iterable[Real]:
        for subject in dict.fromkeys(task.subject for task in self.tasks):
            for photo, *against in self.photos[subject].real:
                rest = [tuple(other for other in group if other.path != photo.path) for group in against]
                compared, shown = (self._example("", "", subject, group) if group else None for group in rest)
                name = f"{photo.path.parent.name}/{photo.path.name}"
                yield Real(subject, name, _read(photo)[0], compared, shown)

    def _example(self, name: str, prompt: str, subject: str, photos: Sequence[Photo]) -> Example:
        read = [_read(photo) for photo in photos]
        masks = tuple(mask for _, mask in read)
        pictures = tuple(picture for picture, _ in read)
        return Example(name, prompt, pictures, self.photos[subject].noun, masks if any(masks) else ())


@lru_cache(maxsize=64)
def _read(photo: Photo) -> tuple[Image.Image, Image.Image | None]:
    picture, alpha = read_picture(photo.path)
    return picture, read_mask(photo.mask, picture.size) if photo.mask else alpha


class ToySuite(Suite):
    """Unseen creatures of the toy world."""

    def __init__(self, subjects: int, prompts: int, seed: int) -> None:
        from customized_grpo.toyworld.dataset import ToyWorld

        self.world = ToyWorld("eval", subjects * prompts, seed, per_subject=prompts)
        self.examples = {example.id: example for example in self.world}
        self.tasks = [
            Task(e.id, e.prompt, f"creature-{n // prompts:03d}", e.subject, str(e.truth_scene.kind))
            for n, e in enumerate(self.examples.values())
        ]

    def shown(self, task: Task) -> Example:
        return self.examples[task.id]

    def compared(self, task: Task) -> Example:
        return self.examples[task.id]

    def real(self) -> Iterable[Real]:
        from customized_grpo.toyworld.draw import render

        for n, task in enumerate(self.tasks):
            example = self.examples[task.id]
            drawn = Image.fromarray(render(example.truth_subject, example.truth_scene, n))
            yield Real(task.subject, task.id, drawn, example, example)


def open_suite(protocol: Protocol, data: Path | None, prompts: Path | None) -> Suite:
    """The tasks of a protocol.

    Args:
        protocol: whose.
        data: folder of its pictures.
        prompts: its list of prompts and photos, where it has one.

    Raises:
        UserError: if something is missing, or is not what the protocol needs.
    """
    if protocol.suite == "toyworld":
        if data is not None:
            raise UserError("The protocol 'toyworld' draws its own data; leave data out.")
        return ToySuite(protocol.subjects or 40, protocol.prompts or 4, protocol.seed)
    if data is None:
        what = "DreamBench++'s data" if protocol.suite == "dreambench++" else "a clone of github.com/google/dreambooth"
        raise UserError(f"The protocol '{protocol.name}' needs pictures: data=FOLDER, {what}.")
    data = data.expanduser()
    if not data.is_dir():
        raise UserError(f"There is no data folder '{data}'; check data=FOLDER.")
    if protocol.suite == "dreambench++":
        return dreambench_plus(data)
    if protocol.suite == "file" and prompts is None:
        raise UserError(
            f"The protocol '{protocol.name}' needs its list of prompts and photos: prompts=FILE.json, entries of "
            f"'prompt' and 'image_paths'."
        )
    if prompts is not None:
        return listed(data, prompts.expanduser(), protocol.references)
    return dreambooth(data, against_all=protocol.name == "dreambooth")


def dreambooth(data: Path, *, against_all: bool) -> PhotoSuite:
    """Every prompt of DreamBench for every subject; the policy sees the first photo.

    Args:
        data: a clone of github.com/google/dreambooth, or the `dataset` folder in it.
        against_all: compare with all photos of the subject, or with the one that was shown.
    """
    subjects, prompts = read_dreambench(data)
    tasks: list[Task] = []
    photos: dict[str, Photos] = {}
    for subject in subjects:
        kind = "live" if is_live(subject) else "object"
        own = _photos(subject)
        compared = own if against_all else own[:1]
        photos[subject.name] = Photos(subject.noun, own[:1], compared, tuple((p, compared, own[:1]) for p in own))
        for number, template in enumerate(prompts[kind]):
            prompt = template.replace("{subject}", subject.noun)
            tasks.append(Task(f"{subject.name}-{number:02d}", prompt, subject.name, kind, prompt_kind(prompt)))
    return PhotoSuite(tasks, photos)


def listed(data: Path, file: Path, references: int) -> PhotoSuite:
    """The tasks of a JSON list of {"prompt", "image_paths"}, whose paths end in SUBJECT/PHOTO.

    Args:
        data: a clone of github.com/google/dreambooth, or the `dataset` folder in it.
        file: the list.
        references: photos that each entry must name.
    """
    subjects = {subject.name: subject for subject in read_dreambench(data)[0]}
    tasks: list[Task] = []
    photos: dict[str, Photos] = {}
    for number, (prompt, paths) in enumerate(_entries(file, references)):
        parts = [_find(path, subjects, f"'{file}', entry {number}") for path in paths]
        name = "+".join(subject.name for subject, _ in parts)
        shown = tuple(photo for _, photo in parts)
        if photos.setdefault(name, _together(parts)).shown != shown:
            name = "+".join(f"{subject.name}-{photo.path.stem}" for subject, photo in parts)
            photos[name] = _together(parts)
        live = {is_live(subject) for subject, _ in parts}
        kind = "mixed" if len(live) > 1 else "live" if live == {True} else "object"
        place = sum(task.subject == name for task in tasks)
        tasks.append(Task(f"{name}-{place:02d}", prompt, name, kind, prompt_kind(prompt)))
    return PhotoSuite(tasks, photos)


def dreambench_plus(data: Path) -> PhotoSuite:
    """DreamBench++: images/**/NAME.jpg, each with captions/**/NAME.txt: the noun, then a prompt on each line."""
    root = data / "data" if (data / "data" / "images").is_dir() else data
    pictures = sorted((root / "images").rglob("*.jpg"))
    if not pictures:
        raise UserError(f"'{data}' holds no images/**/*.jpg; give DreamBench++'s data folder.")
    tasks: list[Task] = []
    photos: dict[str, Photos] = {}
    for picture in pictures:
        place = picture.relative_to(root / "images").with_suffix("")
        captions = root / "captions" / place.with_suffix(".txt")
        if not captions.is_file():
            raise UserError(f"There is no '{captions}' for '{picture}'; is the download complete?")
        noun, *prompts = [line.strip() for line in read_text(captions).split("\n") if line.strip()] or [""]
        if not prompts:
            raise UserError(f"'{captions}' must hold the noun and then a prompt a line; is the download complete?")
        name, photo = "-".join(place.parts), Photo(picture)
        photos[name] = Photos(noun, (photo,), (photo,), ())
        kind = place.parts[-2] if len(place.parts) > 1 else "object"
        for number, prompt in enumerate(prompts):
            tasks.append(Task(f"{name}-{number:02d}", prompt, name, kind, PLUS_KINDS[min(number, 8)]))
    return PhotoSuite(tasks, photos)


PLUS_KINDS = ("photorealistic",) * 4 + ("styled",) * 3 + ("imaginative",) * 2
"""Of DreamBench++'s nine prompts, by their place. Source: Peng et al. 2024, sec. 3."""


def prompt_kind(prompt: str) -> str:
    """DreamBench's kind of a prompt, by its wording; the lists for one and for two subjects word them alike."""
    if re.match(rf"an? ({'|'.join(PROPERTIES)}) ", prompt):
        return "property"
    return "accessory" if re.search(r"\bwearing\b|\boutfit\b", prompt) else "recontextualisation"


def _photos(subject: Subject) -> tuple[Photo, ...]:
    return tuple(Photo(path, mask) for path, mask in zip(subject.pictures, subject.masks, strict=True))


def _together(parts: Sequence[tuple[Subject, Photo]]) -> Photos:
    shown = tuple(photo for _, photo in parts)
    real = tuple((other, (photo,), (photo,)) for subject, photo in parts for other in _photos(subject))
    return Photos(" and ".join(subject.noun for subject, _ in parts), shown, shown, real)


def _find(path: str, subjects: dict[str, Subject], where: str) -> tuple[Subject, Photo]:
    place = PurePosixPath(path)
    subject = subjects.get(place.parent.name)
    photo = next((p for p in _photos(subject) if p.path.name == place.name), None) if subject else None
    if subject is None or photo is None:
        raise UserError(f"{where}: '{path}' is not among the photos of the data folder; is the clone complete?")
    return subject, photo


def _entries(file: Path, references: int) -> Iterable[tuple[str, list[str]]]:
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
