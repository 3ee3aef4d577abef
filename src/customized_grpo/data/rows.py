"""Data sets that are rows of a prompt, reference images and perhaps a target: published layouts, and your own."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from customized_grpo.data.examples import EVAL, Record, make_record
from customized_grpo.data.hub import as_picture, open_dataset, was_saved
from customized_grpo.data.images import png
from customized_grpo.data.importers import Imported, LeftOut, check_free, read_list, relative, write_manifest
from customized_grpo.errors import UserError, nearest
from customized_grpo.store import is_file, parse_json, read_text, write


class Layout(NamedTuple):
    """The columns of a data set; `caption.subject` is a field of the column `caption`, and "" stands for no column."""

    prompt: str = "prompt"
    references: Sequence[str] = ("references",)
    """Columns that hold an image or a list of images each."""
    target: str = ""
    kind: str = ""
    subject: str = ""
    subject_id: str = ""
    """Without it, rows with the same first image have the same subject."""
    split: str = ""
    """Names a split, or says whether the row is held out. Without it, a file such as `test_metadata.jsonl` is."""
    folder: str = ""
    """Where the paths of images begin, from the folder of the file."""
    least: Mapping[str, float] = {}
    """Column to the least number in it; rows below it are left out."""


FIELDS = ("prompt", "references", "target", "kind", "subject", "subject_id", "split")
"""What has a column."""
LAYOUTS = {
    "edit-r1": Layout(references=["image"]),
    "musar-gen": Layout(references=["cond_img_0", "cond_img_1"], target="tgt_img"),
    "omnigen2": Layout("instruction", ["input_images"], "output_image", "task_type"),
    "omniref": Layout(references=["edit_image"], target="image", kind="category", split="is_test"),
    "rows": Layout("prompt", ["references"], "target", "kind", "subject", "subject_id", "split"),
    "uno": Layout(references=["image_path", "image_paths"], target="image_tgt_path"),
    "uno-1m": Layout(
        "caption.img_path2", ["img_path1"], "img_path2", subject="caption.subject", folder="images",
        least={"vlm_filter_cot.score_final": 3.5},
    ),
}  # fmt: skip
"""Sources: docs/data.md."""


class Row(NamedTuple):
    where: str
    folder: Path
    """Of its file; paths begin there."""
    split: str
    """As the name of its file says."""
    cells: Mapping[str, Any]

    def cell(self, column: str) -> Any:
        """What a column holds; None where there is none."""
        whole, _, part = column.partition(".")
        found = self.cells.get(column)
        if found is None and part and isinstance(inner := self.cells.get(whole), Mapping):
            return inner.get(part)
        return found

    def values(self, columns: str | Sequence[str]) -> list[Any]:
        """What columns hold that is not empty, with the members of lists."""
        cells = [self.cell(column) for column in ([columns] if isinstance(columns, str) else columns)]
        found = [value for cell in cells for value in (cell if isinstance(cell, list) else [cell])]
        return [value for value in found if value is not None and value != ""]


def import_rows(
    rows: str | Path | Iterable[Mapping[str, Any]],
    output: str | Path,
    layout: str = "rows",
    *,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    least: Mapping[str, float] | None = None,
    images: str | Path | None = None,
    limit: int | None = None,
) -> Imported:
    """Rows of a published layout, or with columns of your own.

    Images that are paths stay where they are; those inside the rows are saved as PNG in NAME-images beside NAME.jsonl.
    Rows without a prompt or a reference, or with an image that is missing or cannot be read, are left out.

    Args:
        rows: a JSON list, a file of JSON lines, or a folder of such files; or what `HubDataset` reads; or the rows.
        output: the manifest to write.
        layout: a name of `LAYOUTS`; "rows" has the names of the manifest's fields.
        columns: field to the column that holds it, where the layout has another; several for `references`, or "a,b".
        least: column to the least number in it, in place of the layout's.
        images: the folder where the paths of images begin, in place of the layout's.
        limit: stop after so many rows.

    Raises:
        UserError: if no row has a column that is needed, a cell holds something else than it should, nothing is found,
            or an output exists.
    """
    path, given, left_out = check_free(output), dict(columns or {}), LeftOut()
    for name, known in ((layout, tuple(LAYOUTS)), *((field, FIELDS) for field in given)):
        if name not in known:
            raise UserError(f"There is no '{name}' among {', '.join(known)}; name one of them.{nearest(name, known)}")
    if isinstance(names := given.get("references"), str):
        given["references"] = names.split(",")
    chosen = LAYOUTS[layout]._replace(**given)
    chosen = chosen if least is None else chosen._replace(least=least)
    needed = {name: getattr(chosen, name) for name in ("prompt", "references", *given)}
    opened = _checked(islice(_rows(rows), limit), {**needed, **{column: column for column in chosen.least}})
    folder = None if images is None else Path(images).expanduser()
    return write_manifest(path, _records(opened, layout, chosen, path, folder, left_out), left_out)


def _rows(source: str | Path | Iterable[Any]) -> Iterator[Row]:
    if not isinstance(source, str | Path):
        yield from (Row(f"row {number}", Path(), "", cells) for number, cells in enumerate(source))
        return
    files = _json_files(Path(source).expanduser())
    for file in files:
        split = "eval" if re.split(r"[_.-]", file.name)[0].lower() in EVAL else ""
        if file.suffix == ".json":
            found = ((f"entry {number}", entry) for number, entry in enumerate(read_list(file)))
        else:
            lines = enumerate(read_text(file).split("\n"), start=1)
            found = ((f"line {n}", parse_json(line, f"'{file}', line {n}")) for n, line in lines if line.strip())
        yield from (Row(f"{file.name}, {place}", file.parent, split, cells) for place, cells in found)
    if not files:
        yield from _rows(open_dataset(source))


def _json_files(place: Path) -> list[Path]:
    """The files of rows at a place, which `datasets` does not read better."""
    if place.suffix in (".json", ".jsonl"):
        return [place]
    if was_saved(place):
        return []
    return sorted([*place.glob("*.json"), *place.glob("*.jsonl")])


def _checked(rows: Iterable[Row], needed: Mapping[str, str | Sequence[str]]) -> Iterator[Row]:
    """The rows; UserError at the end if one of the columns is in none of them."""
    missing, known = {name: columns for name, columns in needed.items() if columns}, list[str]()
    for row in rows:
        if not isinstance(row.cells, Mapping):
            raise UserError(f"{row.where}: expected an object of columns, got {str(row.cells)[:40]}.")
        known = known or list(row.cells)
        missing = {name: columns for name, columns in missing.items() if not row.values(columns)}
        yield row
    for name, columns in missing.items() if known else ():
        wanted = columns if isinstance(columns, str) else " or ".join(columns)
        option = f"--columns {name}=COLUMN" if name in FIELDS else "--least COLUMN=NUMBER"
        raise UserError(
            f"No row has '{wanted}', the first has {', '.join(known)}; name the column with {option}."
            f"{nearest(wanted, known)}"
        )


def _records(
    rows: Iterable[Row], name: str, layout: Layout, manifest: Path, folder: Path | None, left_out: LeftOut
) -> Iterator[Record]:
    for number, row in enumerate(rows):
        try:
            yield _record(row, f"{name}-{number:06d}", layout, manifest, folder or row.folder / layout.folder)
        except _Unusable as reason:
            left_out.setdefault(str(reason), []).append(row.where)


class _Unusable(Exception):
    """Why a row is left out."""


def _record(row: Row, name: str, layout: Layout, manifest: Path, folder: Path) -> Record:
    for column, least in layout.least.items():
        if not _number(row, column) >= least:  # it may be NaN
            raise _Unusable(f"{column} below {least:g}")
    prompt, references = row.cell(layout.prompt), row.values(layout.references)
    if not isinstance(prompt, str | None):
        raise UserError(f"{row.where}: '{layout.prompt}' is {type(prompt).__name__}; expected the text of the prompt.")
    if not (prompt or "").strip() or not references:
        raise _Unusable("no prompt" if references else "no reference")
    saved = manifest.with_name(f"{manifest.stem}-images")
    images = [
        relative(_placed(value, folder, saved / f"{name}-{number}.png", row.where), manifest)
        for number, value in enumerate([*references, *row.values(layout.target)[:1]])
    ]
    split = row.cell(layout.split)
    if isinstance(split, bool):
        split = "eval" if split else "train"
    fields = {
        "id": name,
        "prompt": prompt,
        "references": images[: len(references)],
        "target": "".join(images[len(references) :]),
        "subject": " and ".join(map(str, row.values(layout.subject))),
        "subject_id": "".join(map(str, row.values(layout.subject_id)[:1])) or images[0],
        "kind": "".join(map(str, row.values(layout.kind)[:1])),
        "split": split or row.split,
    }
    return make_record(fields, row.where)


def _number(row: Row, column: str) -> float:
    value = row.cell(column)
    if not isinstance(value, int | float | None):
        raise UserError(f"{row.where}: '{column}' is {type(value).__name__}; expected a number to compare.")
    return float("-inf") if value is None else value


def _placed(value: Any, folder: Path, file: Path, where: str) -> Path:
    """The file of an image: its own, or `file`, to which one inside the row is saved."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        if not is_file(folder / value):
            raise _Unusable("missing image")
        return folder / value
    if not isinstance(value, bytes | Image.Image):
        raise UserError(f"{where}: an image is {type(value).__name__}; expected its path, its bytes or an image.")
    if file.exists():
        raise UserError(f"'{file}' exists already; an image would go there. Move it away, or name another manifest.")
    try:
        picture, mask = as_picture(value, where)
    except UserError:
        raise _Unusable("image that cannot be read") from None
    if mask is not None:
        picture.putalpha(mask)
    return write(file, png(picture))
