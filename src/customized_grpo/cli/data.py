"""`cgrpo data import` and `cgrpo data check`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from customized_grpo.cli.terminal import new_console
from customized_grpo.errors import UserError, nearest
from customized_grpo.shell import command

app = typer.Typer(help="Create and check manifests of your own subjects.", no_args_is_help=True)
console = new_console()

NAMED = 20
"""Names to print of what an import leaves out for one reason."""
FORMATS = ("dreambench", "folder", "syncd", "subjects200k")


@app.command(name="import")
def import_(
    source: Annotated[str, typer.Argument(help="Format of the data set: dreambench, folder, syncd or subjects200k.")],
    path: Annotated[Path, typer.Argument(help="Path of the data set: a folder, or SynCD's metadata.json.")],
    output: Annotated[Path, typer.Argument(help="The manifest to write, ending in .jsonl.")],
    prompts: Annotated[Path | None, typer.Option(help="For folder: a text file of prompts with {subject}.")] = None,
    references: Annotated[
        Literal["first", "all", "each"], typer.Option(help="Reference images of a subject: first, all, or each.")
    ] = "first",
) -> None:
    """Write a JSONL manifest of a data set. The images stay where they are."""
    from customized_grpo.data import importers

    if source == "dreambench":
        done = importers.import_dreambench(path, output, references=references)
    elif source == "folder":
        if prompts is None:
            raise UserError("A folder requires --prompts FILE, one prompt per line, with {subject} for the noun.")
        done = importers.import_folder(path, output, prompts, references=references)
    elif source == "syncd":
        done = importers.import_syncd(path, output, references=references)
    elif source == "subjects200k":
        done = importers.import_subjects200k(path, output)
    else:
        raise UserError(f"Unknown format '{source}'; expected one of {', '.join(FORMATS)}.{nearest(source, FORMATS)}")
    lines = [f"{done.manifest}: {done.examples} examples of {done.subjects} subjects, {done.skipped} entries left out."]
    for reason, names in done.left_out.items():
        more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines.append(f"left out, {reason}: {', '.join(names[:NAMED])}{more}")
    lines.append(f"next: {command('data', 'check', done.manifest)}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


@app.command()
def check(
    manifest: Annotated[Path, typer.Argument(help="A JSONL manifest.")],
    smallest: Annotated[int, typer.Option(help="Report images with a shorter side below this.")] = 256,
    shown: Annotated[int, typer.Option(help="Findings to print per kind.")] = 5,
) -> None:
    """Read a manifest and all its images, and report problems. Exit status 1 if it is not usable."""
    from customized_grpo.data.check import check_data

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading")
        report = check_data(
            manifest, smallest=smallest, progress=lambda done, all_: progress.update(task, completed=done, total=all_)
        )
    splits = ", ".join(f"{count} {name}" for name, count in report.splits.items())
    console.print(
        f"{report.examples} examples ({splits or 'none'}), {report.subjects} subjects, {report.pictures} images",
        highlight=False,
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
                console.print(f"... and {count - shown} more of: {kind}", highlight=False)
    if report.usable:
        console.print("usable", style="bold green")
        return
    console.print("not usable", style="bold red", end="")
    console.print(": fix the errors above.")
    raise typer.Exit(1)
