import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from customized_grpo.cli.probe import new_probe
from customized_grpo.errors import UserError
from customized_grpo.studies.compare.page import write_report
from studies.compare.fabricate import fabricate
from studies.probe.test_run import CONFIG as PROBED

GAINS = {
    "naive_1to1": (-0.05, 0.2, -0.05, 0.05),
    "naive_1to1.5": (0.0, 0.15, 0, 0),
    "customized": (0.1, 0.1, 0.1, 0.05),
}


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes) -> None:
        self.found += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


@pytest.mark.usefixtures("plotted")
def test_the_report_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    root = tmp_path / "out"
    fabricate(root, GAINS, noise=0.005)
    text = write_report(root).read_text(encoding="utf-8")
    parser = Links()
    parser.feed(text)
    assert parser.open == []
    assert all(link.startswith(("data:", "#", "plots/")) for link in parser.found)
    assert text.index("Does Customized beat naive 1:1") < text.index("<h1>Yes.</h1>") < text.index("The trade-off")
    assert "9 of 9 runs finished" in text
    assert "32 images, 8 gradient steps" in text
    assert "Only 3 seeds" in text
    assert "&lt;b&gt;" in text, "prompts are escaped"
    for name in ("plane-rewards", "plane-checks", "curve-prompt", "worst-rewards-naive_1to1"):
        assert (root / "plots" / f"{name}.svg").is_file()
        assert (root / "plots" / f"{name}.png").is_file()
    assert (root / "plots" / "images.png").is_file()
    tables = (root / "report.md").read_text(encoding="utf-8")
    assert tables.startswith("# Comparison: out\n\n**Does Customized beat naive 1:1 on held-out subjects?** Yes. ")
    assert "Change since the base policy: prompt \N{MINUS SIGN}0.0" in tables
    rows = [line.split(" | ") for line in tables.splitlines() if line.startswith("| ")]
    assert rows[0][:3] == ["| method", "prompt", "identity"]
    assert any(row[0] == "| Customized" and row[1].startswith("+0.1") and "[+0.0" in row[1] for row in rows)
    assert text.count('class="task"') == 6
    assert "even steps from the worst to the best" in text


def test_the_report_shows_the_probe_that_the_grid_names(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    (tmp_path / "config.yaml").write_text(PROBED)
    new_probe(
        Console(quiet=True), tmp_path / "config.yaml", [], {"examples": 4, "branches": 4}, output=probe, trust_code=True
    )
    root = tmp_path / "out"
    fabricate(root, GAINS, seeds=[0], probe=probe)
    text = write_report(root).read_text(encoding="utf-8")
    assert "When is each reward decided?" in text
    assert (root / "plots" / "probe-weights.svg").is_file()
    (probe / "probe.json").unlink()
    with pytest.raises(UserError, match="probe"):
        write_report(root)


def test_columns_that_some_grids_need(tmp_path: Path) -> None:
    root = tmp_path / "out"
    fabricate(root, GAINS, line=("naive_1to1", "naive_1to1.5"))
    (root / "cells" / "customized" / "seed-0" / "run.json").write_text('{"status": "failed"}')
    write_report(root)
    tables = (root / "report.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in tables.splitlines() if line.startswith("| ")]
    assert [row[1] for row in rows[:5]] == ["seeds", "---", "3", "3", "2"]
    assert rows[0].count("beyond the line") == 1
    assert rows[2][rows[0].index("beyond the line")] == "\N{EN DASH}"  # naive 1:1 lies on it
    assert sum("beyond" in row for row in rows) == 2


def test_an_unfinished_grid_is_reported_as_such(tmp_path: Path) -> None:
    root = tmp_path / "out"
    fabricate(root, GAINS, seeds=[0])
    (root / "cells" / "customized" / "seed-0" / "config.yaml").unlink()
    text = write_report(root).read_text(encoding="utf-8")
    assert "2 of 3 runs finished" in text
    assert "Not yet known." in text
    assert "Customized/seed-0 (it has no config.yaml) is damaged and left out." in text
    assert "Only one seed" in text


def test_runs_left_out_for_one_reason_share_a_sentence(tmp_path: Path) -> None:
    root = tmp_path / "out"
    fabricate(root, GAINS)
    for seed in (1, 2):
        shutil.rmtree(root / "cells" / "customized" / f"seed-{seed}")
    (root / "cells" / "other" / "seed-0").mkdir(parents=True)
    text = write_report(root).read_text(encoding="utf-8")
    assert "Customized/seed-1 and customized/seed-2 are waiting and left out." in text
    assert "Other/seed-0 is not in the grid and left out." in text


def test_a_folder_without_a_comparison_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a comparison"):
        write_report(tmp_path)
