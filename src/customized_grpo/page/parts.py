"""Parts that several pages share."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from customized_grpo.page.blocks import Block, Cell, Code, Details, Facts, Remark, Row, Table, Text
from customized_grpo.page.formats import DASH

FEW_SUBJECTS = 10


def table(
    rows: Sequence[tuple[str, Mapping[str, Cell]]],
    *,
    first: str = "method",
    title: str = "",
    strong: int = 0,
    bold: Collection[str] = (),
) -> Table:
    """A table from the cells of each row by their heading; a dash where a row has no cell.

    Args:
        rows: (title, cells) of each row. Columns are in the order in which their headings occur.
        first: heading of the row titles.
        title: of the table.
        strong: how many of the first rows are in bold.
        bold: titles of other rows in bold.
    """
    columns = list(dict.fromkeys(heading for _, cells in rows for heading in cells))
    found = [
        Row(name, [cells.get(c, DASH) for c in columns], n < strong or name in bold)
        for n, (name, cells) in enumerate(rows)
    ]
    return Table(columns, found, first, title)


def origin(info: Mapping[str, Any], facts: Sequence[tuple[str, Any]], config: str = "") -> list[Block]:
    """Where the numbers of a page come from: facts, command, configuration and versions, as far as they are known.

    Args:
        info: what `provenance` gives.
        facts: (name, value); those without a value are left out.
        config: the configuration as YAML.
    """
    more = [("started", str(info.get("started") or "").replace("T", " ")[:19]), ("hardware", info.get("hardware"))]
    known = [(name, str(value)) for name, value in [*facts, *more] if value not in (None, "")]
    command = shlex.join(map(str, info.get("command") or []))
    versions = [(str(name), str(version)) for name, version in dict(info.get("versions") or {}).items()]
    return [
        Facts(known),
        *([Text("Command:"), Code(command)] if command else []),
        *([Details("Configuration (config.yaml, can be run again)", [Code(config)])] if config else []),
        *([Details("Versions", [Facts(versions)])] if versions else []),
    ]


def few_subjects(subjects: int) -> list[Remark]:
    """A warning where intervals resample only a few subjects; with one subject there are no intervals."""
    text = f"Only {subjects} subjects: intervals that resample so few subjects are too narrow."
    return [Remark(text, serious=True)] if 1 < subjects < FEW_SUBJECTS else []
