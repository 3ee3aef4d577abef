import json
import math
from pathlib import Path

import pytest

from customized_grpo.errors import UserError
from customized_grpo.tracking import RunFolder, provenance, write_text


def test_a_new_run_takes_only_a_free_folder(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "new")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something already"):
        RunFolder.create(tmp_path / "used")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "used" / "notes.txt")


def test_a_run_without_a_name_never_meets_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = set()
    for _ in range(3):
        run = RunFolder.create(None)
        run.describe(status="running")
        paths.add(run.path)
    assert len(paths) == 3


def test_metrics_survive_a_cut_line_and_rewind(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    for iteration in (1, 2, 3):
        run.log({"iteration": iteration, "loss": math.nan if iteration == 2 else 0.5})
    with run.metrics.open("a") as file:
        file.write('{"iteration": 4, "lo')
    assert [r["iteration"] for r in run.records()] == [1, 2, 3]
    assert run.records()[1]["loss"] is None
    run.evaluations.mkdir()
    for iteration in (0, 2, 3):
        run.evaluation(iteration).write_text("{}")
    run.rewind(2)
    assert [r["iteration"] for r in run.records()] == [1, 2]
    assert sorted(p.name for p in run.evaluations.iterdir()) == ["iteration-000000.json", "iteration-000002.json"]


def test_a_folder_without_a_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no config.yaml"):
        RunFolder.existing(tmp_path)


def test_files_are_replaced_in_one_step(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "two"


def test_a_number_has_versions_and_hardware_beside_it() -> None:
    facts = provenance(["cgrpo", "train"])
    assert facts["versions"]["torch"]
    assert facts["hardware"]
    json.dumps(facts)
