"""Parts that several pages share: tables, image grids, where numbers come from, progress."""

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from customized_grpo.page import (
    Code,
    Details,
    Facts,
    Plain,
    Progress,
    Shown,
    evenly,
    few_subjects,
    image_grid,
    origin,
    table,
    to_markdown,
)
from customized_grpo.page.blocks import Page, Section


def test_a_table_has_a_column_for_each_heading_and_a_dash_where_a_cell_is_missing() -> None:
    made = table([("one", {"a": 1.0, "b": "x"}), ("two", {"b": Plain(0.5, 0.4, 0.6), "c": 2.0})], first="row", strong=1)
    assert (made.columns, made.first) == (["a", "b", "c"], "row")
    assert [row.strong for row in made.rows] == [True, False]
    lines = to_markdown(Page("Test", "t", "h", sections=[Section("s", [made])])).splitlines()
    assert lines[-2:] == ["| one | 1.000 | x | – |", "| two | – | 0.500 [0.400, 0.600] | 2.000 |"]


def test_the_origin_of_numbers_leaves_out_what_is_not_known() -> None:
    info = {"command": ["cgrpo", "a b"], "versions": {"torch": "2"}, "started": "2026-01-02T03:04:05+00:00"}
    facts, _, command, config, versions = origin(info, [("model", "M"), ("time", None)], "seed: 1")
    assert facts == Facts([("model", "M"), ("started", "2026-01-02 03:04:05")])
    assert command == Code("cgrpo 'a b'")
    assert isinstance(config, Details)
    assert config.blocks == [Code("seed: 1")]
    assert isinstance(versions, Details)
    assert origin({}, [("model", "M")]) == [Facts([("model", "M")])]


@pytest.mark.parametrize(("subjects", "warned"), [(1, False), (2, True), (9, True), (10, False)])
def test_few_subjects_are_a_warning(subjects: int, warned: bool) -> None:
    assert [remark.serious for remark in few_subjects(subjects)] == [True] * warned


def test_indices_at_even_steps() -> None:
    assert evenly(10, 4) == [0, 3, 6, 9]
    assert (evenly(2, 5), evenly(0, 3), evenly(7, 0), evenly(7, 1)) == ([0, 1], [], [], [0])


def test_an_image_grid_is_in_the_page_and_a_file(tmp_path: Path) -> None:
    for n in range(3):
        Image.new("RGB", (8, 8), (80 * n, 0, 0)).save(tmp_path / f"{n}.png")
    files = [(tmp_path / f"{n}.png", (f"mark {n}",)) for n in range(3)]
    made = image_grid(["reference", "a", "b"], [Shown("a dog", "rank 1", files)], tmp_path)
    (row,) = made.rows
    assert (row.prompt, row.rank) == ("a dog", "rank 1")
    assert [cell.alt for cell in row.cells] == ["reference: a dog", "a: a dog", "b: a dog"]
    assert [cell.marks for cell in row.cells] == [("mark 0",), ("mark 1",), ("mark 2",)]
    assert all(cell.source.startswith("data:image/jpeg;base64,") for cell in row.cells)
    with Image.open(tmp_path / made.file) as sheet:
        assert sheet.width > 3 * 128
    assert image_grid(["reference"], [], tmp_path / "empty").file == ""
    assert not (tmp_path / "empty").exists()


def test_progress_without_a_terminal_is_a_line_for_each_tenth() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=80)) as progress:
        for done in range(0, 101):
            progress("draw [x]", done, 100)
        progress("read", 5, 0)
    assert out.getvalue().splitlines() == [f"draw [x]: {done} of 100" for done in range(0, 101, 10)]


def test_progress_on_a_terminal_is_a_bar() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=80, force_terminal=True)) as progress:
        progress("draw", 3, 12)
    assert "3/12" in out.getvalue()
    assert "draw: 3" not in out.getvalue()
