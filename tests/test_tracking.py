import json
import math
from pathlib import Path

import pytest
import yaml
from accelerate import PartialState

from customized_grpo.errors import UserError
from customized_grpo.tracking import RunFolder, TrackingSettings, check_trackers, provenance, write_text


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


def test_a_resumed_runs_settings_replace_the_old_ones_which_stay(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.config.write_text("output: here\ntraining: {iterations: 4}\npolicy: {use: Mine}\n")
    before = run.config.read_text()
    run.adopt("output: there\ntraining: {iterations: 4}\n", 4)
    assert run.config.read_text() == before, "where it lies is no change"
    run.adopt("output: there\ntraining: {iterations: 9}\n", 4)
    assert yaml.safe_load(run.config.read_text()) == {
        "output": "there", "training": {"iterations": 9}, "policy": {"use": "Mine"},
    }  # fmt: skip
    run.adopt("output: there\ntraining: {iterations: 12}\n", 4)
    assert (run.path / "config-until-000004.yaml").read_text() == before, "what trained those four"


def test_a_damaged_run_json_is_kept_and_does_not_stop_anything(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.info.write_text('{"status": "runn')
    assert run.facts() == {}
    run.describe(status="running")
    assert run.facts() == {"status": "running"}
    assert (run.path / "run-damaged.json").read_text() == '{"status": "runn'


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("tensorbord", r"Did you mean 'tensorboard'\?"), ("clearml", r"'clearml', which is not installed; pip install")],
)
def test_a_tracker_that_is_not_there_is_refused(name: str, sentence: str) -> None:
    PartialState(cpu=True)  # as in a trainer: accelerate logs only then
    with pytest.raises(UserError, match=sentence):
        check_trackers(TrackingSettings(log_with=name))  # pyright: ignore[reportArgumentType] - one is a list too


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
