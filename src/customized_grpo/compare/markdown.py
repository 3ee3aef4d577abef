"""A comparison's findings and tables as text, to paste into a paper or a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from customized_grpo.report.intervals import Estimate
from customized_grpo.report.page import number, signed


def to_markdown(contents: Mapping[str, Any]) -> str:
    """What the report says, without its pictures.

    Args:
        contents: of the page, as `page.contents` gives them.
    """
    head = contents["headline"]
    lines = [f"**{head.question}** {head.verdict}. {head.text}", ""]
    for found in contents["findings"]:
        numbers = "; ".join(f"{label} {_text(estimate)}" for label, estimate in found.numbers)
        lines.append(f"* **{found.question}** {found.verdict}. {found.text} {numbers}".rstrip())
    lines += ["", *(f"* {name}: {value}" for name, value in contents["facts"]), ""]
    lines += _table("Gains over the base", contents["summary"])
    for reference, table in contents["differences"]:
        lines += _table(f"Less {reference}, on the same seeds, tasks and noise", table)
    lines += _table("What was not trained on, less the base", contents["others"])
    lines += _table("Conflict over training", contents["conflict"])
    return "\n".join(lines)


def _table(title: str, table: Any) -> list[str]:
    if not table.rows:
        return []
    rows = [["method", *table.columns], ["---"] * (1 + len(table.columns))]
    rows += [[row.title, *map(_text, row.cells)] for row in table.rows]
    return [f"{title}:", "", *map(_row, rows), ""]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _text(cell: Estimate | float | str) -> str:
    """A value, and its 95 % interval in brackets."""
    if isinstance(cell, str):
        return cell
    if not isinstance(cell, Estimate):
        return number(cell)
    if not np.isfinite(cell.value):
        return "\N{EN DASH}"
    write = number if cell.plain else signed
    return write(cell.value) + (f" [{write(cell.low)}, {write(cell.high)}]" if np.isfinite(cell.low) else "")
