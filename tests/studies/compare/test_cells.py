import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from customized_grpo import trust
from customized_grpo.assemble import build_trainer, open_run, resume_run
from customized_grpo.config import load_config
from customized_grpo.errors import UserError
from customized_grpo.settings.parse import parse_config, to_yaml
from customized_grpo.studies.compare import cells as running
from customized_grpo.studies.compare.cells import State, measure_base, open_folder, run_cells, state
from customized_grpo.studies.compare.grid import Cell, Grid, base_evaluation, trust_needed
from customized_grpo.studies.compare.methods import merged
from studies.compare.tiny import CONFIG

TESTS = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def _importable_in_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)


def grid(methods=("naive_1to1", "customized"), seeds=(0,), **config) -> Grid:
    return parse_config({"config": merged(CONFIG, config), "methods": methods, "seeds": seeds}, Grid)


def train_here(cell: Cell, resume: bool = False) -> None:
    """What a cell's process does, without the process."""
    run, config = open_run(cell.folder) if resume else (None, cell.config)
    build_trainer(config).train(resume=run, config_yaml=to_yaml(config))


def base_here(root: Path) -> None:
    from rich.console import Console

    from customized_grpo.cli.generation import evaluate_command

    (root / "base.yaml").write_text(to_yaml(parse_config(CONFIG, type(load_config()))))
    evaluate_command(Console(quiet=True), root / "base.yaml", [], None, None, root / "base", trust_code=True)


def test_a_grid_killed_in_the_middle_goes_on_and_redoes_nothing(tmp_path: Path) -> None:
    """With real processes: finish one cell, kill the other hard, go on."""
    root = tmp_path / "out"
    slow = grid(policy={"use": "studies.compare.tiny:SlowPolicy"}, training={"iterations": 6})
    made = open_folder(slow, root)
    assert [state(cell).status for cell in made] == ["waiting", "waiting"]
    base = measure_base(slow, root)
    train_here(made[0])
    said: list[str] = []
    process = running._start_next([made[1]], {}, said.append)
    assert process is not None
    while not any((made[1].folder / "checkpoints").glob("iteration-*")):
        assert not process.finished(), made[1].log.read_text()
        time.sleep(0.05)
    assert state(made[1]).status == "running"
    assert running._start_next([made[1]], {}, said.append) is None, "a cell is run by one process at a time"
    os.kill(process.process.pid, signal.SIGKILL)
    process.process.wait()
    assert state(made[1]).status == "stopped"
    first = {path: path.stat().st_mtime_ns for path in made[0].folder.rglob("*")}
    ended = run_cells(made, say=said.append)
    assert [(s.status, s.iteration) for s in ended.values()] == [("finished", 6)] * 2
    assert said[1].startswith("customized/seed-0: goes on after iteration")
    assert first == {path: path.stat().st_mtime_ns for path in made[0].folder.rglob("*")}
    for cell in made:
        assert (cell.folder / "evaluations" / base.name).read_text() == base.read_text()


def test_a_cell_that_crashes_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = open_folder(grid(methods=["sars", "tdw"]), tmp_path / "out")
    words = {"sars": "raise SystemExit('the crash of a test')", "tdw": "print('fine')"}
    monkeypatch.setattr(running, "command", lambda cell, found: [sys.executable, "-c", words[cell.method]])
    said: list[str] = []
    ended = run_cells(made, workers=1, say=said.append)
    assert [s.status for s in ended.values()] == ["failed", "waiting"]
    assert said[1].startswith("sars/seed-0: failed after iteration 0 (the crash of a test); the log is")
    assert said[2] == "tdw/seed-0: begins"
    assert "the crash of a test" in made[0].log.read_text()
    assert "fine" in made[1].log.read_text()


def test_a_stopped_grid_stops_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = open_folder(grid(methods=["sars", "tdw"]), tmp_path / "out")
    script = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit('saved')); time.sleep(30)"
    monkeypatch.setattr(running, "command", lambda cell, found: [sys.executable, "-c", script])

    def interrupt_soon(text: str) -> None:
        if text.endswith("begins"):
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        run_cells(made, workers=1, say=interrupt_soon)
    assert not made[1].log.exists()


def test_what_is_half_written_is_kept_and_begun_anew(tmp_path: Path) -> None:
    root = tmp_path / "out"
    cell = open_folder(grid(methods=["tdw"]), root)[0]
    cell.folder.mkdir(parents=True)
    assert state(cell) == State("waiting")
    (cell.folder / "metrics.jsonl").write_text("{}\n")
    assert state(cell) == State("damaged", note="it has no config.yaml")
    assert running.set_aside(cell).joinpath("metrics.jsonl").read_text() == "{}\n"
    assert state(cell).status == "waiting"


def test_a_finished_run_without_its_last_evaluation_is_damaged(tmp_path: Path) -> None:
    root = tmp_path / "out"
    cell = open_folder(grid(methods=["tdw"]), root)[0]
    base_here(root)
    train_here(cell)
    assert state(cell).status == "finished"
    last = cell.folder / "evaluations" / "iteration-000004.json"
    last.write_text(last.read_text()[:30])
    found = state(cell)
    assert found.status == "damaged"
    assert "evaluations/iteration-000004.json is missing or damaged" in found.note


def test_a_run_of_another_configuration_is_not_mixed_in(tmp_path: Path) -> None:
    root = tmp_path / "out"
    cell = open_folder(grid(methods=["tdw"]), root)[0]
    base_here(root)
    train_here(cell)
    with pytest.raises(UserError, match=r"is not of this grid: training.iterations 4 -> 8"):
        open_folder(grid(methods=["tdw"], training={"iterations": 8}), root)
    assert json.loads((cell.folder / "run.json").read_text())["status"] == "finished"
    more = open_folder(grid(methods=["tdw", "sars"], seeds=(0, 1)), root)
    assert [state(cell).status for cell in more] == ["finished", "waiting", "waiting", "waiting"]


def test_a_grid_that_ran_out_of_memory_goes_on_with_less(tmp_path: Path) -> None:
    """Settings that do not change the result may change, and the cells that were begun get them too."""
    root, hungry = tmp_path / "out", {"use": "studies.compare.tiny:HungryPolicy"}
    methods = ["tdw", "sars"]
    cell = open_folder(grid(methods, policy=hungry), root)[0]
    base_here(root)
    with pytest.raises(UserError, match=r"micro_batch.*gradient_checkpointing"):
        train_here(cell)
    for policy, training in (({**hungry, "scale": 2.0}, {}), (hungry, {"optimizer": {"use": "AdamW", "lr": 1.0}})):
        with pytest.raises(UserError, match=r"is not of this grid: (policy.scale|training.optimizer.lr)"):
            open_folder(grid(methods, policy=policy, training=training), root)
    less = {"policy": {**hungry, "gradient_checkpointing": True}, "training": {"micro_batch": 2}}
    lowered = grid(methods, **less, evaluation={"batch": 3})
    for found in trust_needed(lowered, root):  # as the command does
        trust.remember(found)
    begun, waiting = open_folder(lowered, root)
    assert state(begun).status == "failed"
    words = running.command(begun, state(begun))
    assert words[5:7] == ["--resume", str(begun.folder)]
    run, config = resume_run(begun.folder, words[7:])
    assert (config.policy, config.training, config.evaluation) == (
        begun.config.policy, begun.config.training, begun.config.evaluation,
    )  # fmt: skip
    build_trainer(config).train(resume=run, config_yaml=to_yaml(config))
    assert state(begun).status == "finished"
    assert len(running.command(begun, state(begun))) == 7, "nothing is left to change"
    assert running.command(waiting, state(waiting))[5].endswith("sars-seed-0.yaml")
    again = open_folder(grid(methods, policy=hungry), root)[0]
    assert state(again).status == "finished", "a finished cell is the same whatever memory it took"


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a comparison"):
        open_folder(grid(), tmp_path)


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert [s["OMP_NUM_THREADS"] for s in running._slots(20, None, None)] == ["1"] * 8
    assert [s["OMP_NUM_THREADS"] for s in running._slots(20, 3, None)] == ["2"] * 3
    assert [s["OMP_NUM_THREADS"] for s in running._slots(20, None, 4)] == ["4"] * 2
    assert len(running._slots(2, None, None)) == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [s["CUDA_VISIBLE_DEVICES"] for s in running._slots(20, None, None)] == ["0", "1"]


def test_ray_is_asked_for_only_where_it_is_installed(tmp_path: Path) -> None:
    made = open_folder(grid(methods=["tdw"]), tmp_path / "out")
    try:
        import ray  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="Ray is not installed"):
            running.run_cells_on_ray(made)
        return
    base_here(tmp_path / "out")
    ended = running.run_cells_on_ray(made, say=lambda text: None)
    assert ended["tdw/seed-0"].status == "finished"


def test_the_base_is_evaluated_as_any_run_would(tmp_path: Path) -> None:
    root = tmp_path / "out"
    cell = open_folder(grid(methods=["tdw"]), root)[0]
    base_here(root)
    own = cell.config.model_copy(
        update={"output": tmp_path / "alone", "evaluation": cell.config.evaluation.model_copy(update={"base": None})}
    )
    build_trainer(own).train()
    alone = tmp_path / "alone" / "evaluations" / "iteration-000000.json"
    assert json.loads(alone.read_text()) == json.loads(base_evaluation(root).read_text())
