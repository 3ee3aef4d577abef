"""Masks for images that have none, by a segmenter, and a sheet of images to look at them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from customized_grpo.data.decode import read_mask, read_picture
from customized_grpo.data.examples import JsonlDataset, Record
from customized_grpo.data.images import png, segmented
from customized_grpo.data.importers import Imported, check_free, find_subjects, rebased, relative, write_manifest
from customized_grpo.errors import UserError
from customized_grpo.libraries import library_problem
from customized_grpo.page.sheets import grid
from customized_grpo.shell import install
from customized_grpo.sources import explain, locate
from customized_grpo.store import write
from customized_grpo.structures import Example

Segmenter = Callable[[Image.Image], Image.Image]
"""An RGB picture to an "L" mask of its size, 255 on the subject."""
Detector = Callable[[Image.Image], Sequence[Image.Image]]
"""An RGB picture to the crops of the subjects in it."""
Task = Literal["image-segmentation", "object-detection"]
REMBG = "rembg"
BACKGROUND = {"background", "label_0"}
"""Labels that are not the subject, in lower case."""


def add_masks(
    manifest: str | Path,
    output: str | Path,
    segment: Segmenter | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Write another manifest in which every reference has a mask. Masks that are there are kept, alpha channels too.

    New masks are PNG files in a folder beside the new manifest, named after it. A reference in which the segmenter
    finds nothing stays without, and is counted as skipped.

    Args:
        manifest: to read.
        output: the manifest to write.
        segment: the segmenter; None is rembg's u2net, for which the `rembg` package is needed.
        progress: called with (references done, references in all).

    Raises:
        UserError: if an output exists, `rembg` is missing, or a mask has another size than its picture.
    """
    dataset, path = JsonlDataset(manifest), check_free(output)
    folder, root = path.with_suffix(""), dataset.path.parent
    if folder.exists():
        raise UserError(f"'{folder}' exists already; the masks would go there. Name another manifest.")
    segment = segment or rembg_segmenter()
    bare = sorted({name for record in dataset.records for name, mask in _pairs(record) if mask is None})
    made: dict[str, str | None] = {}
    for done, name in enumerate(bare, start=1):
        made[name] = _make(root / name, folder / f"{done:06d}.png", path, segment)
        if progress:
            progress(done, len(bare))
    empty = [name for name, mask in made.items() if mask is None and read_picture(root / name)[1] is None]
    left_out = {"nothing found in it": empty} if empty else {}
    return write_manifest(path, (_with_masks(record, root, path, made) for record in dataset.records), left_out)


def mask_folder(
    folder: str | Path, segment: Segmenter | None = None, *, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Example], list[str]]:
    """Write `NAME_mask.png` beside every image of a folder of subjects that has no mask yet, where importers find it.

    Args:
        folder: of subject folders, as `import_folder` takes it.
        segment, progress: as in `add_masks`.

    Returns:
        The images with the masks that were written, and the images that have none still.

    Raises:
        UserError: if there is no image, `rembg` is missing, or a mask has another size than its image.
    """
    root, pairs = Path(folder).expanduser(), list[tuple[Path, Path | None]]()
    for subject in find_subjects(root, {}):
        pairs += zip(subject.pictures, subject.masks, strict=True)
    if not pairs:
        raise UserError(f"'{folder}' has no subject folder with images in it.")
    segment, made, empty = segment or rembg_segmenter(), list[Example](), list[str]()
    bare = [picture for picture, mask in pairs if mask is None]
    for done, picture in enumerate(bare, start=1):
        name, target = picture.relative_to(root).as_posix(), picture.with_name(f"{picture.stem}_mask.png")
        if not target.exists() and _make(picture, target, target, segment):
            image, _ = read_picture(picture)
            made.append(Example(name, name, (image,), masks=(read_mask(target, image.size),)))
        elif not target.exists():
            empty.append(name)
        if progress:
            progress(done, len(bare))
    return made, empty


def contact_sheet(examples: Sequence[Example]) -> Image.Image:
    """A row for each example: its references, each with its mask and what it leaves if it has one, and its target."""
    rows = []
    for example in examples:
        row: list[Image.Image] = []
        for whole, mask, cut in zip(
            example.references, example.masks or (None,) * len(example.references), segmented(example), strict=True
        ):
            row += [whole, mask, cut] if mask else [whole]
        rows.append([*row, example.target] if example.target else row)
    return grid(rows, [], [f"{example.id}: {example.prompt}" for example in examples])


def make_segmenter(model: str = REMBG) -> Segmenter:
    """A segmenter by name: `rembg`, one of its models such as `rembg:birefnet-general`, or a folder or hub id of a
    segmentation model of transformers, for which everything but the background is the subject.

    Raises:
        UserError: if it cannot be loaded, or would run code of its own.
    """
    name, _, own = model.partition(":")
    if name == REMBG:
        return rembg_segmenter(own or "u2net")
    advice = "give a segmentation model of transformers, or for BiRefNet --model rembg:birefnet-general"
    found = _pipeline("image-segmentation", model, "a segmentation model", advice)

    def segment(picture: Image.Image) -> Image.Image:
        mask = np.zeros((picture.height, picture.width), np.uint8)
        for piece in found(picture):
            if str(piece["label"]).lower() not in BACKGROUND:
                mask = np.maximum(mask, np.asarray(piece["mask"]))
        return Image.fromarray(mask)

    return segment


def make_detector(model: str) -> Detector:
    """A folder or hub id of an object detection model of transformers. A crop is the box of one find.

    Raises:
        UserError: if it cannot be loaded, or would run code of its own.
    """
    what = "an object detection model"
    found = _pipeline("object-detection", model, what, f"give {what} of transformers")

    def detect(picture: Image.Image) -> list[Image.Image]:
        crops = []
        for box in (piece["box"] for piece in found(picture)):
            left, top = max(0, box["xmin"]), max(0, box["ymin"])
            right, bottom = min(picture.width, box["xmax"]), min(picture.height, box["ymax"])
            if left < right and top < bottom:
                crops.append(picture.crop((left, top, right, bottom)))
        return crops

    return detect


def _pipeline(task: Task, model: str, what: str, advice: str) -> Callable[[Image.Image], list[dict[str, Any]]]:
    """A pipeline of transformers that runs no code of the model's own."""
    from transformers import pipeline

    source = locate(model)
    try:
        return pipeline(task, model=source, trust_remote_code=False)
    except (OSError, ValueError, TypeError, ImportError, KeyError) as error:
        if "custom code" in str(error) or "trust_remote_code" in str(error):
            raise UserError(f"'{model}' brings code of its own, which is not run; {advice}.") from error
        raise explain(model, what, error) from error


def rembg_segmenter(model: str = "u2net") -> Segmenter:
    """A model of the `rembg` package.

    Raises:
        UserError: if the package is not installed.
    """
    try:
        from rembg import new_session, remove  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        missing = UserError(f"Making masks needs the rembg package; {install('masks')}, or give a segmenter.")
        raise library_problem(error) or missing from error
    session = new_session(model)
    return lambda picture: remove(picture, session=session, only_mask=True).convert("L")


def _pairs(record: Record) -> list[tuple[str, str | None]]:
    return list(zip(record.references, record.masks or (None,) * len(record.references), strict=True))


def _make(picture: Path, target: Path, manifest: Path, segment: Segmenter) -> str | None:
    """Write the mask of a picture; its path for the manifest, or None if there is nothing to write."""
    image, alpha = read_picture(picture)
    if alpha is not None:
        return None
    mask = segment(image).convert("L")
    if mask.size != image.size:
        raise UserError(f"The segmenter made a mask of {mask.size} for '{picture}', which is {image.size}.")
    if np.asarray(mask).max() < 128:
        return None
    write(target, png(mask))
    return relative(target, manifest)


def _with_masks(record: Record, root: Path, manifest: Path, made: dict[str, str | None]) -> Record:
    moved = rebased(record, root, manifest)
    known = moved.masks or (None,) * len(moved.references)
    masks = tuple(mask or made[name] for name, mask in zip(record.references, known, strict=True))
    return moved.model_copy(update={"masks": masks if any(masks) else ()})
