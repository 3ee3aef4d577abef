"""A page as HTML, as Markdown and in the terminal."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from customized_grpo.page import blocks as b
from customized_grpo.page import formats
from customized_grpo.page.blocks import Block, Page
from customized_grpo.store import write


def publish(page: Page, folder: Path, name: str = "report") -> Path:
    """Write FOLDER/NAME.html, self-contained, and the same without images as FOLDER/NAME.md.

    Returns:
        The path of the HTML file.
    """
    write(folder / f"{name}.md", to_markdown(page))
    return write(folder / f"{name}.html", to_html(page))


def anchor(text: str) -> str:
    """A heading as the name of a place in the page."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


# ---- HTML


def to_html(page: Page) -> str:
    """One self-contained file; every string is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("customized_grpo.page"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": formats.number, "signed": formats.signed, "anchor": anchor, "parts": formats.parts,
        "kind": lambda x: type(x).__name__,
    }  # fmt: skip
    return environment.get_template("page.html").render(page=page).lstrip()


# ---- Markdown


def to_markdown(page: Page) -> str:
    """The text, the tables and links to the plots, to paste into a paper or an issue."""
    head = f"**{page.question}** {page.headline}" if page.question else f"**{page.headline}**"
    lines = [f"# {page.kind}: {page.title}", "", f"{head} {page.lead}".strip(), ""]
    lines += [line for block in page.summary for line in _markdown(block)]
    for section in page.sections:
        lines += [f"## {section.title}", "", *(line for block in section.blocks for line in _markdown(block))]
    return "\n".join(lines).rstrip() + "\n"


def _markdown(block: Block) -> Iterator[str]:
    """The lines of a block, with an empty one after it."""
    match block:
        case b.Text():
            yield block.text
        case b.Bullets():
            yield from (f"* {item}" for item in block.items)
        case b.Remarks():
            yield from (f"* {'**Warning:** ' * remark.serious}{remark.text}" for remark in block.remarks)
        case b.Cards():
            yield from (f"* {formats.words(card.title)}: {_card(card)}" for card in block.cards)
        case b.Findings():
            yield from (f"* **{found.question}** {_answer(found)}" for found in block.findings)
        case b.Facts():
            yield from (f"* {name}: {value}" for name, value in block.items if value)
        case b.Table():
            if block.title:
                yield from (f"{block.title}:", "")
            rows = [[block.first, *block.columns], ["---"] * (1 + len(block.columns))]
            rows += [[row.title, *map(_text, row.cells)] for row in block.rows]
            yield from (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
        case b.Figures():
            yield from (f"![{figure.title}]({figure.link})" for figure in block.figures if figure.link)
        case b.ImageGrid():
            if block.file:
                yield from (f"![{', '.join(block.headers)}]({block.file})", "")
            for row in block.rows:
                told = [f"{head}: {', '.join(cell.marks)}" for head, cell in zip(block.headers, row.cells, strict=False)
                        if cell.marks]  # fmt: skip
                yield f"* {row.prompt}{f' ({row.rank})' * bool(row.rank)}{'. ' * bool(told)}{'; '.join(told)}"
        case b.Code():
            yield from ("```", block.text, "```")
        case b.Details():
            yield from (line for inner in block.blocks for line in (f"{block.summary}:", "", *_markdown(inner)))
    yield ""


def _text(cell: Any) -> str:
    """A value, and its interval in brackets."""
    if isinstance(cell, b.Bar):
        return ""
    if isinstance(cell, b.Shift):
        return ", ".join(formats.parts(cell))
    return formats.with_interval(cell) if isinstance(cell, b.Estimate) else formats.parts(cell)[0]


def _answer(found: b.Finding) -> str:
    numbers = "; ".join(f"{label} {_text(value)}" for label, value in found.numbers)
    return f"{found.verdict}. {found.text} {numbers}".rstrip()


def _card(card: b.Card) -> str:
    before = f"{formats.number(card.before)} → " if card.before is not None else ""
    if card.change is not None and card.change.plain:
        value = _text(card.change)
    else:
        value = formats.number(card.value) + (f" ({_text(card.change)})" if card.change is not None else "")
    return f"{before}{value}{' ' * bool(card.caption)}{card.caption}"


# ---- the terminal


def show(console: Any, page: Page) -> None:
    """The answer, the summary and the brief sections of a page on a rich console."""
    console.print(f"{page.question} {page.headline}".strip(), style="bold", markup=False, highlight=False)
    if page.lead:
        console.print(page.lead, markup=False, highlight=False)
    for block in [*page.summary, *(inner for section in page.sections if section.brief for inner in section.blocks)]:
        show_block(console, block)


def present(console: Any, page: Page, folder: Path, name: str = "report", **more: Any) -> Path:
    """`publish` a page, `show` it, and print where it is, with `more` such as a command that may follow."""
    written = publish(page, folder, name)
    show(console, page)
    show_block(console, b.Facts([("report", str(written)), *((key, str(value)) for key, value in more.items())]))
    return written


def show_block(console: Any, block: Block) -> None:
    """One block on a rich console; images and plots are left out."""
    match block:
        case b.Table():
            console.print(_grid(block))
        case b.Cards():
            for card in block.cards:
                console.print(f"{formats.words(card.title)}: {_card(card)}", markup=False, highlight=False)
        case b.Remarks():
            for remark in sorted(block.remarks, key=lambda remark: not remark.serious):
                console.print(Text("! ", "bold red" if remark.serious else "yellow") + Text(remark.text))
        case b.Text() | b.Bullets():
            console.print("\n".join(_markdown(block)).strip(), markup=False, highlight=False)
        case b.Facts():  # not folded: values may be paths and commands, to be copied
            known = [(name, value) for name, value in block.items if value]
            width = max((len(name) for name, _ in known), default=0)
            for name, value in known:
                console.print(f"{name:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)
        case b.Findings():
            for found in block.findings:
                console.print(f"{found.question} {_answer(found)}", markup=False, highlight=False)


def _grid(block: b.Table) -> Table:
    bars = {n for row in block.rows for n, cell in enumerate(row.cells) if isinstance(cell, b.Bar)}
    shown = [n for n in range(len(block.columns)) if n not in bars]
    grid = Table(title=block.title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column(block.first, no_wrap=True)
    for n in shown:
        grid.add_column(Text(block.columns[n]), justify="right")
    for row in block.rows:
        grid.add_row(Text(row.title, "bold" if row.strong else ""), *(_styled(row.cells[n]) for n in shown))
    return grid


def _styled(cell: Any) -> Text:
    value, interval = formats.parts(cell)
    change = cell.change if isinstance(cell, b.Shift) else cell
    tone = change.tone if isinstance(change, b.Estimate) and not change.plain else ""
    colour = {"rose": "green", "fell": "red"}.get(tone, "")
    return Text(value, colour) + Text(f"\n{interval}" if interval else "", "dim")
