"""Masks for references that have none, by a segmenter."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from customized_grpo.data.decode import read_picture
from customized_grpo.data.examples import JsonlDataset, Record
from customized_grpo.data.images import png
from customized_grpo.data.importers import Imported, check_free, relative, write_manifest
from customized_grpo.errors import UserError
from customized_grpo.libraries import library_problem
from customized_grpo.shell import install
from customized_grpo.store import write

Segmenter = Callable[[Image.Image], Image.Image]
"""An RGB picture to an "L" mask of its size, 255 on the subject."""


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
    masks = [relative(root / mask, manifest) if mask else made[name] for name, mask in _pairs(record)]
    moved = tuple(relative(root / name, manifest) for name in record.references)
    target = relative(root / record.target, manifest) if record.target else ""
    masks = tuple(masks) if any(masks) else ()
    return record.model_copy(update={"references": moved, "masks": masks, "target": target})
