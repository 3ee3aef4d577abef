"""The tables of reports: rows of estimates, and rows of pictures."""

from dataclasses import dataclass
from typing import Any

from customized_grpo.report.intervals import Estimate


@dataclass(frozen=True)
class Row:
    """One row of a table of estimates."""

    title: str
    strong: bool
    cells: tuple[Any, ...]
    """Estimates, or text."""


@dataclass(frozen=True)
class Table:
    """A table of estimates."""

    columns: tuple[str, ...]
    rows: list[Row]


class Plain(Estimate):
    """An estimate whose sign means nothing."""

    @property
    def plain(self) -> bool:
        return True


class Flipped(Estimate):
    """An estimate of which less is better: it is coloured as its opposite."""

    @property
    def tone(self) -> str:
        return {"rose": "fell", "fell": "rose", "unclear": "unclear"}[self.verdict]


@dataclass(frozen=True)
class Cell:
    """One picture, with what the metrics say of it."""

    source: str
    alt: str
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class PictureRow:
    """One task: its reference, and what was drawn."""

    prompt: str
    rank: str
    cells: list[Cell]
