"""The blocks of a page. They hold values and text; `render` decides how they look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from customized_grpo.store.scores import Estimate


class Plain(Estimate):
    """A level, which is shown without a sign."""

    @property
    def plain(self) -> bool:
        return True


class Share(Plain):
    """A share or probability between 0 and 1, in percent."""


class Flipped(Estimate):
    """A change of a metric of which less is better."""

    @property
    def tone(self) -> str:
        return {"rose": "fell", "fell": "rose", "unclear": "unclear"}[self.verdict]


class Shift(NamedTuple):
    """Levels before and after, as text, and the change between them."""

    levels: str
    change: Estimate


class Bar(NamedTuple):
    """A share between 0 and 1, drawn as a bar."""

    share: float


Cell = Estimate | Shift | Bar | str | float
"""A cell of a table."""


class Remark(NamedTuple):
    """A sentence that the reader should see before trusting the page."""

    text: str
    serious: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    style: Literal["", "note", "soft", "lead"] = ""


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Remarks:
    """Warnings and notes, the serious ones first."""

    remarks: Sequence[Remark]


@dataclass(frozen=True)
class Card:
    """One important number."""

    title: str
    value: float
    before: float | None = None
    change: Estimate | None = None
    """The change of the value, or the value itself with its interval (`Plain`)."""
    caption: str = ""
    colour: str = ""


@dataclass(frozen=True)
class Cards:
    cards: Sequence[Card]


@dataclass(frozen=True)
class Row:
    title: str
    cells: Sequence[Cell]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of estimates, numbers and text."""

    columns: Sequence[str]
    rows: Sequence[Row]
    first: str = "method"
    """Heading of the row titles."""
    title: str = ""


@dataclass(frozen=True)
class Figure:
    """A plot or an image inside the page."""

    source: str
    """A data URI."""
    title: str
    alt: str
    width: int
    """CSS pixels."""
    caption: str = ""
    link: str = ""
    """The file it was made from, relative to the page."""


@dataclass(frozen=True)
class Figures:
    """Figures side by side; small ones for diagnostics, wide ones by themselves."""

    figures: Sequence[Figure]
    size: Literal["normal", "small", "wide"] = "normal"


class ImageCell(NamedTuple):
    """One image of a grid, and what the metrics say about it."""

    source: str
    alt: str
    marks: Sequence[str] = ()


class ImageRow(NamedTuple):
    """One task: its reference, and what was generated."""

    prompt: str
    rank: str
    cells: Sequence[ImageCell]


@dataclass(frozen=True)
class ImageGrid:
    headers: Sequence[str]
    rows: Sequence[ImageRow]
    file: str = ""
    """The same grid as an image file, relative to the page."""


class Finding(NamedTuple):
    """A question, its answer, and the numbers behind it."""

    question: str
    verdict: str
    text: str
    numbers: Sequence[tuple[str, Estimate]] = ()


@dataclass(frozen=True)
class Findings:
    findings: Sequence[Finding]


@dataclass(frozen=True)
class Facts:
    """Names and values. Empty values are left out."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Details:
    """Blocks that are collapsed at first."""

    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """A heading with its blocks, and a place in the navigation."""

    title: str
    blocks: Sequence[Block]
    name: str = ""
    """In the navigation; empty is the title."""
    brief: bool = False
    """Whether the terminal shows it too."""


Block = Text | Bullets | Remarks | Cards | Table | Figures | ImageGrid | Findings | Facts | Code | Details


@dataclass(frozen=True)
class Page:
    """A page: the answer first, then the evidence."""

    kind: str
    """Such as "Training report"."""
    title: str
    headline: str
    lead: str = ""
    question: str = ""
    """The question that the headline answers."""
    badges: Sequence[str] = ()
    summary: Sequence[Block] = ()
    """Blocks between the headline and the sections, which the terminal shows too."""
    sections: Sequence[Section] = ()
    footer: str = ""
