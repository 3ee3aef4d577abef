import math
from pathlib import Path

import yaml

from customized_grpo.store.run import RunFolder


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
    cells = run.samples / "cells"
    cells.mkdir(parents=True)
    for name in ("000-iteration-000002.json", "000-iteration-000003.json", "000-iteration-000003.png",
                 "001-iteration-000003.jpg"):  # fmt: skip
        (cells / name).write_text("{}")
    run.rewind(2)
    assert [path.name for path in cells.iterdir()] == ["000-iteration-000002.json"]
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


def test_a_damaged_line_hides_no_other_and_is_kept_when_the_run_goes_back(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    lines = [b'{"iteration": 1}', b'{"iteration": 2', b'{"loss": 0.5}', b"\xff\xfe", b'{"iteration": 3}']
    run.metrics.write_bytes(b"\n".join(lines) + b"\n")
    assert [r["iteration"] for r in run.records()] == [1, 3]
    run.rewind(3)
    assert run.metrics.read_bytes() == b'{"iteration": 1}\n{"iteration": 3}\n'
    aside = tmp_path / "run" / "metrics-damaged.jsonl"
    assert aside.read_bytes().split(b"\n") == [*lines[1:4], b""]
    with run.metrics.open("ab") as file:
        file.write(b'{"iteration": 4, "lo')
    run.rewind(2)
    assert [r["iteration"] for r in run.records()] == [1]
    assert aside.read_bytes().split(b"\n") == [*lines[1:4], b'{"iteration": 4, "lo', b""]


def test_going_back_takes_the_pictures_of_later_iterations_away(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    kept = ["iteration-000002.png", "iteration-mine.png", "cells/000-iteration-000002.png", "cells/000-reference.png"]
    kept += ["groups/0-1-iteration-000002.jpg", "groups/iteration-000002.json"]
    for name in [*kept, *(name.replace("02.", "03.") for name in kept)]:
        (run.samples / name).parent.mkdir(parents=True, exist_ok=True)
        (run.samples / name).write_text("")
    run.rewind(2)
    assert sorted(p.relative_to(run.samples).as_posix() for p in run.samples.rglob("*.*")) == sorted(kept)
