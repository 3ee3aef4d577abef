"""One page, three outputs. Every block is shown in each of them that can show it."""

import io
import re

import pytest
from rich.console import Console

from customized_grpo.errors import UserError
from customized_grpo.page import (
    Bar,
    Bullets,
    Card,
    Cards,
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
    publish,
    show,
    table,
    to_html,
    to_markdown,
)  # fmt: skip

NAN = float("nan")
HOSTILE = "<script>alert(1)</script> [bold]x[/bold] $\\alpha$ | {{ y }}"


def page(name="a name"):
    table = Table(
        ("gain", "level", "share", "note"),
        [
            Row(name, (Estimate(0.1, 0.05, 0.2), Plain(0.5, 0.4, 0.6), Bar(0.25), "text"), strong=True),
            Row("moved", (Shift("0.4 → 0.5", Estimate(0.1, 0.05, 0.2)), Estimate(0.25, 0.25, 0.25), Bar(0.5), "")),
            Row("other", (Flipped(0.1, 0.05, 0.2), Plain(NAN, NAN, NAN), Bar(0.75), 12345.0)),
        ],
        title="A table",
    )
    return Page(
        kind="Test report", title=name, headline=f"It is {name}.", question="What is it?", lead="A lead.",
        badges=("a badge",),
        summary=[
            Cards([Card(name, 0.5, before=0.4, change=Estimate(0.1, -0.1, 0.3), caption="caption")]),
            Remarks([Remark("mild remark"), Remark(f"serious {name}", serious=True)]),
            Findings([Finding("Which?", "Undecided", name, [("gain", Estimate(0.1, NAN, NAN))])]),
        ],
        sections=[
            Section("First part", [table, Text("a note", "note"), Bullets(["one", name])], brief=True),
            Section("Second part", [
                Facts([("fact", name), ("empty", "")]),
                Figures([Figure("data:image/png;base64,AA", "A figure", name, 640, "its caption", "plots/a.svg")]),
                ImageGrid(["reference", name], [ImageRow(name, "rank 1", [ImageCell("data:,", name, ["✓ seen"])])]),
                Details("More", [Code("code " + name)]),
            ], name="Second"),
        ],
        footer="A footer.",
    )  # fmt: skip


def terminal(shown):
    out = io.StringIO()
    show(Console(file=out, width=200), shown)
    return out.getvalue()


def test_every_output_says_what_the_page_says():
    html, text, shown = to_html(page()), to_markdown(page()), terminal(page())
    for output in (html, text, shown):
        for words in ("It is a name.", "What is it?", "A lead.", "mild remark", "serious a name", "a note", "A table"):
            assert words.lower() in output.lower()
        assert "+0.100" in output
        assert "12,345" in output
    for words in ("code a name", "A figure", "plots/a.svg", "a badge", "✓ seen"):
        assert words in html
        assert words in text or words == "a badge"
    assert "empty" not in html + text
    assert "Second part" not in shown  # only brief sections
    assert html.index("Serious a name") < html.index("Mild remark")
    assert shown.index("serious a name") < shown.index("mild remark")


def test_an_interval_stands_with_its_value():
    assert "| a name | +0.100 [+0.050, +0.200] | 0.500 [0.400, 0.600] |  | text |" in to_markdown(page())
    assert "Which? Undecided. a name gain +0.100" in terminal(page())
    assert "| moved | 0.4 → 0.5, +0.100 [+0.050, +0.200] | +0.250 [no spread] |" in to_markdown(page())
    html = to_html(page())
    assert '0.4 → 0.5<span class="range rose">▲ +0.100 [+0.050, +0.200]</span>' in html
    assert "0.4 → 0.5" in terminal(page())
    assert '<span class="rose">▲ +0.100</span><span class="range">+0.050 to +0.200</span>' in html
    assert '<span class="fell">▲ +0.100</span>' in html  # less is better
    assert '<td>0.500<span class="range">0.400 to 0.600</span></td>' in html
    assert '<span class="bar" style="width: 25.0%">' in html
    assert "<td>–</td>" in html


def test_a_card_of_a_level_says_it_once():
    shown = Page("Test", "t", "h", summary=[Cards([Card("centre", 0.2, change=Plain(0.2, 0.1, 0.3))])])
    assert "* centre: 0.200 [0.100, 0.300]\n" in to_markdown(shown)


def test_facts_are_aligned_and_not_folded():
    shown = Page("Test", "t", "h", summary=[Facts([("a", "x" * 300), ("report", "y"), ("none", "")])])
    assert terminal(shown).splitlines()[-2:] == [f"a       {'x' * 300}", "report  y"]


def test_names_are_text_in_every_output():
    hostile = page(HOSTILE)
    html = to_html(hostile)
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt; [bold]x[/bold]") >= 8
    assert "[bold]x[/bold]" in terminal(hostile)
    rows = [line for line in to_markdown(hostile).splitlines() if line.startswith("| <script>")]
    assert [row.count("|") for row in rows] == [6]


def test_navigation_leads_to_the_sections():
    html = to_html(page())
    assert (
        re.findall(r'<a href="#([\w-]+)">', html)
        == re.findall(r'<section id="([\w-]+)">', html)
        == ["first-part", "second"]
    )


def test_it_is_one_file_without_outside_addresses(tmp_path):
    written = publish(page(), tmp_path)
    assert written == tmp_path / "report.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]
    assert not re.findall(r'(?:src|href)="(?!data:|#|plots/)', written.read_text())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/report.md' could not be written"):
        publish(page(), tmp_path / "file")


def test_shares_are_in_percent_and_named_rows_are_bold():
    made = table([("a", {"share": Share(0.5, 0.25, 1.0)}), ("b", {"share": Share(NAN, NAN, NAN)})], bold=["b"])
    assert [row.strong for row in made.rows] == [False, True]
    markdown = to_markdown(Page("Test", "t", "h", sections=[Section("s", [made])]))
    assert markdown.splitlines()[-2:] == ["| a | 50 % [25 %, 100 %] |", "| b | \N{EN DASH} |"]
