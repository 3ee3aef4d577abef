"""A page is a list of blocks. One page becomes HTML, Markdown and terminal output."""

from customized_grpo.page import plots
from customized_grpo.page.blocks import (
    Bar,
    Block,
    Bullets,
    Card,
    Cards,
    Cell,
    Code,
    Details,
    Estimate,
    Facts,
    Figure,
    Figures,
    Finding,
    Findings,
    Flipped,
    ImageCell,
    ImageGrid,
    ImageRow,
    Page,
    Plain,
    Remark,
    Remarks,
    Row,
    Section,
    Share,
    Shift,
    Table,
    Text,
)  # fmt: skip
from customized_grpo.page.images import Shown, embed, embed_plot, evenly, image_grid, thumbnail
from customized_grpo.page.parts import few_subjects, origin, table
from customized_grpo.page.progress import Progress
from customized_grpo.page.render import present, publish, show, show_block, to_html, to_markdown

__all__ = [
    "Bar", "Block", "Bullets", "Card", "Cards", "Cell", "Code", "Details", "Estimate", "Facts", "Figure", "Figures",
    "Finding", "Findings", "Flipped", "ImageCell", "ImageGrid", "ImageRow", "Page", "Plain", "Progress", "Remark",
    "Remarks", "Row", "Section", "Share", "Shift", "Shown", "Table", "Text", "embed", "embed_plot", "evenly",
    "few_subjects", "image_grid", "origin", "plots", "present", "publish", "show", "show_block", "table", "thumbnail",
    "to_html", "to_markdown",
]  # fmt: skip
