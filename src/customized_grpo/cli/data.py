"""`cgrpo data import`, `check`, `masks`, `split` and `view`."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from customized_grpo.cli.terminal import fraction, new_console
from customized_grpo.errors import UserError, nearest
from customized_grpo.shell import command
from customized_grpo.store import check_place, replacing

if TYPE_CHECKING:
    from customized_grpo.structures import Example

app = typer.Typer(help="Create and check manifests of your own subjects.", no_args_is_help=True)
console = new_console()
Count = Annotated[int, typer.Option("--count", min=1, help="Rows in the contact sheet.")]
Sheet = Annotated[Path | None, typer.Option(help="Contact sheet to write.")]

NAMED = 20
"""How many names are printed of the entries that an import leaves out for one reason."""
Pairs = list[str] | None


@app.command(name="import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="Format of the data set: dreambench, folder, syncd, subjects200k, edit-r1, musar-gen, omnigen2, "
            "omniref, uno, uno-1m, or rows."
        ),
    ],
    path: Annotated[Path, typer.Argument(help="Path of the data set: a folder, a file or a hub id.")],
    output: Annotated[Path, typer.Argument(help="The manifest to write, ending in .jsonl.")],
    prompts: Annotated[Path | None, typer.Option(help="For folder: a text file of prompts with {subject}.")] = None,
    references: Annotated[
        Literal["first", "all", "each"] | None, typer.Option(help="Reference images of a subject; default: the first.")
    ] = None,
    columns: Annotated[Pairs, typer.Option(help="For rows: prompt=COLUMN, references=COLUMN,COLUMN.")] = None,
    least: Annotated[
        Pairs, typer.Option(help="Leave out what scores less: COLUMN=NUMBER; for syncd dino=NUMBER.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="For rows: the folder where paths of images begin.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many rows.")] = None,
) -> None:
    """Write a JSONL manifest of a data set. The images stay where they are."""
    from customized_grpo.data import importers, rows

    formats: dict[str, Callable[..., importers.Imported]] = {
        "dreambench": importers.import_dreambench,
        "folder": importers.import_folder,
        "syncd": importers.import_syncd,
        "subjects200k": importers.import_subjects200k,
        **{name: partial(rows.import_rows, layout=name) for name in rows.LAYOUTS},
    }
    if source not in formats:
        raise UserError(f"Unknown format '{source}'; expected one of {', '.join(formats)}.{nearest(source, formats)}")
    if source == "folder" and prompts is None:
        raise UserError("A folder requires --prompts FILE, one prompt per line, with {subject} for the noun.")
    options = {
        "prompts": prompts, "references": references, "columns": _pairs(columns, str), "least": _pairs(least, float),
        "images": images, "limit": limit,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    taken = inspect.signature(formats[source]).parameters
    if unknown := [name for name in given if name not in taken]:
        raise UserError(f"'{source}' takes no --{unknown[0]}; leave it out.")
    done = formats[source](path, output, **given)
    lines = [f"{done.manifest}: {done.examples} examples of {done.subjects} subjects, {done.skipped} entries left out."]
    for reason, names in done.left_out.items():
        more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines.append(f"left out, {reason}: {', '.join(names[:NAMED])}{more}")
    lines.append(f"next: {command('data', 'check', done.manifest)}")
    console.print("\n".join(lines), soft_wrap=True)


def _pairs(texts: Pairs, read: Callable[[str], Any]) -> dict[str, Any] | None:
    """NAME=VALUE as a mapping."""
    try:
        return {name: read(value) for name, value in (text.split("=", 1) for text in texts)} if texts else None
    except ValueError:
        said = ", ".join(texts or ())
        raise UserError(f"'{said}' is not NAME=VALUE; write prompt=COLUMN, or COLUMN=NUMBER for --least.") from None


@contextmanager
def _counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar. The function takes how many are done, and how many there are."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@app.command()
def masks(
    source: Annotated[Path, typer.Argument(help="A manifest, or a folder of subject folders.")],
    output: Annotated[Path | None, typer.Argument(help="For a manifest: the new manifest, ending in .jsonl.")] = None,
    model: Annotated[
        str, typer.Option(help="rembg, rembg:MODEL such as rembg:birefnet-general, or a folder of transformers.")
    ] = "rembg",
    sheet: Sheet = None,
    count: Count = 40,
) -> None:
    """Make masks for images that have none, and a contact sheet to look at them. Nothing is overwritten.

    For a folder, NAME_mask.png appears beside each image, where `data import` finds it.
    """
    from customized_grpo.data.segment import add_masks, make_segmenter, mask_folder

    if source.is_dir() and output is not None:
        raise UserError(f"'{source}' is a folder, whose masks go beside its images; leave OUTPUT out.")
    if not source.is_dir() and output is None:
        raise UserError(f"'{source}' is no folder; of a manifest, name the new one as OUTPUT.")
    target = _new_sheet(sheet, (output or source).with_suffix(".png"))
    if output is None:
        segment = make_segmenter(model)
        with _counted("masks") as progress:
            examples, empty = mask_folder(source, segment, progress=progress)
        console.print(f"{len(examples)} masks beside the images of {source}", soft_wrap=True)
    else:
        from customized_grpo.data import JsonlDataset

        with _counted("masks") as progress:
            done = add_masks(source, output, make_segmenter(model), progress=progress)
        examples, empty = (
            JsonlDataset(done.manifest).spread(),
            [name for names in done.left_out.values() for name in names],
        )
        console.print(f"{done.manifest}: {done.examples} examples", soft_wrap=True)
    if empty:
        more = f", and {len(empty) - NAMED} more" if len(empty) > NAMED else ""
        console.print(f"nothing found in {', '.join(empty[:NAMED])}{more}", soft_wrap=True)
    _write_sheet(examples[:count], target)


@app.command()
def split(
    manifest: Annotated[Path, typer.Argument(help="A JSONL manifest.")],
    output: Annotated[Path, typer.Argument(help="The manifest to write, ending in .jsonl.")],
    share: Annotated[float, typer.Option(min=0, max=1, help="Share of the subjects to hold out.")] = 0.1,
    fold: Annotated[str | None, typer.Option(help="2/5: hold out the second of five parts of the subjects.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of the subjects.")] = 0,
) -> None:
    """Hold out subjects for evaluation: write a manifest in which every example has a split."""
    from customized_grpo.data.splits import ENOUGH, split_manifest

    trained, held = split_manifest(manifest, output, share=share, fold=fraction(fold, "--fold"), seed=seed)
    console.print(f"{output}: {trained} subjects for training, {held} held out", soft_wrap=True)
    if held < ENOUGH:
        folds = command("data", "split", manifest, f"{output.stem}-1.jsonl", "--fold", "1/5")
        advice = "train on every fold and take their scores together" if fold else f"make five folds (`{folds}` to 5/5)"
        subjects = f"{held} held-out subject{'s are' if held > 1 else ' is'}"
        console.print(f"{subjects} too few to tell small changes from chance; {advice}.", soft_wrap=True)


@app.command()
def view(
    manifest: Annotated[Path, typer.Argument(help="A JSONL manifest.")],
    output: Annotated[Path | None, typer.Option(help="Image to write; default: a PNG beside the manifest.")] = None,
    count: Count = 40,
) -> None:
    """Write a contact sheet: references, masks and targets of some examples, of each subject in turn."""
    from customized_grpo.data import JsonlDataset

    examples = JsonlDataset(manifest).spread()
    _write_sheet(examples[:count], _new_sheet(output, manifest.with_suffix(".png")))


def _new_sheet(wanted: Path | None, default: Path) -> Path:
    path = wanted or default
    if path.exists():
        raise UserError(f"'{path}' exists already; name another contact sheet.")
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"'{path}' is no name of a contact sheet; end it in .png or .jpg.")
    check_place(path)
    return path


def _write_sheet(examples: "Sequence[Example]", path: Path) -> None:
    from customized_grpo.data.segment import contact_sheet

    if examples:
        with replacing(path, new=True) as draft:
            contact_sheet(examples).save(draft, "PNG" if path.suffix.lower() == ".png" else "JPEG")
        console.print(f"look at {path}", soft_wrap=True)


@app.command()
def check(
    manifest: Annotated[Path, typer.Argument(help="A JSONL manifest.")],
    smallest: Annotated[int, typer.Option(help="Report images with a shorter side below this.")] = 256,
    shown: Annotated[int, typer.Option(help="Findings to print per kind.")] = 5,
) -> None:
    """Read a manifest and all its images, and report problems. Exit status 1 if it is not usable."""
    from customized_grpo.data.check import check_data

    with _counted("reading") as count:
        report = check_data(manifest, smallest=smallest, progress=count)
    splits = ", ".join(f"{count} {name}" for name, count in report.splits.items())
    console.print(
        f"{report.examples} examples ({splits or 'none'}), {report.subjects} subjects, {report.pictures} images"
    )
    if report.findings:
        table = Table("problem", "location", "message")
        counts: dict[str, int] = {}
        for finding in report.findings:
            counts[finding.kind] = counts.get(finding.kind, 0) + 1
            if counts[finding.kind] <= shown:
                colour = "red" if finding.severity == "error" else "yellow"
                table.add_row(Text(f"{finding.severity}: {finding.kind}", colour), finding.where, finding.message)
        console.print(table)
        for kind, count in counts.items():
            if count > shown:
                console.print(f"... and {count - shown} more of: {kind}")
    if report.usable:
        console.print("usable", style="bold green")
        return
    console.print("not usable", style="bold red", end="")
    console.print(": fix the errors above.")
    raise typer.Exit(1)
