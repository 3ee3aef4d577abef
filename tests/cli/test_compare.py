import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from customized_grpo.cli import compare as command
from customized_grpo.cli.compare import compare
from customized_grpo.cli.main import app
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.studies.compare import cells as running
from customized_grpo.studies.compare.cells import State
from studies.compare.fabricate import fabricate
from studies.compare.tiny import CONFIG

GAINS = {"naive_1to1": (0.0, 0.1, 0.0, 0.0), "customized": (0.1, 0.1, 0.1, 0.1)}


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    recorded = Console(record=True, width=200, file=io.StringIO())
    monkeypatch.setattr(command, "console", recorded)
    return recorded


def test_a_finished_grid_is_only_reported(tmp_path: Path, console: Console) -> None:
    root = tmp_path / "out"
    fabricate(root, GAINS, noise=0.005)
    file = tmp_path / "grid.yaml"
    tree = {"config": CONFIG, "methods": list(GAINS), "seeds": [0, 1, 2]}
    file.write_text(yaml.safe_dump(tree))
    compare([str(file)], output=root)
    text = console.export_text()
    assert "6 finished" in text
    assert "Does Customized beat naive 1:1 on held-out subjects? Yes." in text
    assert (root / "report.html").is_file()


def test_the_status_shows_every_cell(tmp_path: Path, console: Console) -> None:
    root = tmp_path / "out"
    fabricate(root, GAINS, seeds=[0, 1])
    (root / "cells" / "customized" / "seed-1" / "run.json").write_text('{"status": "failed"}')
    (root / "logs").mkdir()
    (root / "logs" / "customized-seed-1.log").write_text("loading\nerror: the judge hung up\n")
    rows = (root / "cells" / "naive_1to1" / "seed-0" / "metrics.jsonl").read_text().splitlines()
    (root / "cells" / "naive_1to1" / "seed-0" / "run.json").unlink()
    (root / "cells" / "naive_1to1" / "seed-0" / "metrics.jsonl").write_text("\n".join(rows[:2]))
    compare(status=root)
    text = console.export_text()
    assert "‖ 2/4" in text
    assert "customized/seed-1: failed, error: the judge hung up" in text
    assert "base finished; 1 stopped, 1 failed, 2 finished" in text
    assert "about 3 s of one worker left" in text


def test_what_did_not_finish_is_an_error_after_the_report(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    fabricate(root, GAINS, seeds=[0])
    for name in ("config.yaml", "run.json"):
        (root / "cells" / "customized" / "seed-0" / name).unlink()
    ended = {"naive_1to1/seed-0": State("finished"), "customized/seed-0": State("failed")}
    monkeypatch.setattr(running, "run_cells", lambda made, **options: ended)
    with pytest.raises(TrainingError, match=r"1 of 2 runs did not finish \(customized/seed-0\)"):
        compare(resume=root)
    assert (root / "report.html").is_file()


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Name a grid"):
        compare()
    with pytest.raises(UserError, match="remove the file and --output"):
        compare([str(tmp_path / "grid.yaml")], resume=tmp_path)
    with pytest.raises(UserError, match="not a comparison"):
        compare(status=tmp_path)


def test_the_command_and_the_report_are_on_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    fabricate(tmp_path / "out", GAINS, seeds=[0, 1])
    runner = CliRunner()
    shown = runner.invoke(app, ["compare", "--status", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    assert "4 finished" in shown.output
    written = runner.invoke(app, ["report", str(tmp_path / "out")])
    assert written.exit_code == 0, written.output
    assert "Does Customized beat naive 1:1" in (tmp_path / "out" / "report.html").read_text()
