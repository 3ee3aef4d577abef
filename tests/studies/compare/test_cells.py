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
from customized_grpo.studies.compare.cells import State, open_folder, run_cells, state
from customized_grpo.studies.compare.grid import Cell, Grid, cells, trust_needed
from customized_grpo.studies.compare.methods import merged
from studies.compare.fabricate import fabricate
from studies.compare.tiny import CONFIG

TESTS = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def _importable_in_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)


def grid(methods=("naive_1to1", "customized"), seeds=(0,), **config) -> Grid:
    return parse_config({"config": merged(CONFIG, config), "methods": methods, "seeds": seeds}, Grid)


def train_here(cell: Cell, resume: bool = False) -> None:
    """What a cell's process does, without the process."""
    run, config = open_run(cell.run.path) if resume else (None, cell.config)
    build_trainer(config).train(resume=run, config_yaml=to_yaml(config))


def written(cell: Cell) -> dict[Path, int]:
    """When each file of the cell was written last. Taking the lock may touch its file (filelock 3.30 does)."""
    return {path: path.stat().st_mtime_ns for path in cell.run.path.rglob("*") if path.name != ".lock"}


def base_here(grid: Grid, root: Path) -> Path:
    """What the process of the base policy does, without the process."""
    from rich.console import Console

    from customized_grpo.assemble import open_policy
    from customized_grpo.cli.generation import evaluate_source

    base = cells(grid, root)[0]
    root.mkdir(exist_ok=True)
    file = root / "base.yaml"
    file.write_text(to_yaml(base.config))
    evaluate_source(Console(quiet=True), open_policy(file, [], trust_code=True), base.run.path)
    base.run.config.write_text(to_yaml(base.config))
    return base.evaluation


def test_a_killed_cell_resumes_and_a_finished_one_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real processes: kill a cell hard, resume it. In iteration 3 it has encoded 18 examples."""
    root, started = tmp_path / "out", []
    slow = grid(policy={"use": "studies.compare.tiny:SlowPolicy"})
    base, *made = open_folder(slow, root)
    assert [state(cell).status for cell in (base, *made)] == ["waiting"] * 3
    base_here(slow, root)
    train_here(made[0])
    start = running._start
    monkeypatch.setattr(
        running, "_start", lambda *args, **options: started.append(start(*args, **options)) or started[-1]
    )
    monkeypatch.setenv("COMPARE_WAITS_AFTER", "18")
    said: list[str] = []
    thread = threading.Thread(target=run_cells, args=([made[1]],), kwargs={"say": said.append})
    thread.start()
    while not any(made[1].run.checkpoints.glob("iteration-*")):
        assert thread.is_alive(), made[1].log.read_text()
        time.sleep(0.05)
    assert state(made[1]).status == "running"
    started[0].send_signal(signal.SIGKILL)
    thread.join()
    monkeypatch.delenv("COMPARE_WAITS_AFTER")
    assert said[1].startswith("customized/seed-0: failed (after iteration")
    assert state(made[1]).status == "stopped"
    first = written(made[0])
    ended = run_cells(made, say=said.append)
    assert [(s.status, s.iteration) for s in ended.values()] == [("finished", 4)] * 2
    assert said[2].startswith("customized/seed-0: resumed after iteration")
    assert first == written(made[0])
    for cell in made:
        assert cell.run.evaluation(0).read_text() == base.evaluation.read_text()


def test_a_cell_is_locked_as_long_as_its_process_lives(tmp_path: Path) -> None:
    """Also if the grid that started it was killed, and while it loads its model, before the run folder exists."""
    _, cell = open_folder(grid(methods=["tdw"]), tmp_path / "out")
    with running._locked(cell.log) as log:
        assert log is not None
        process = running._start([sys.executable, "-c", "import time; time.sleep(60)"], log)
    assert state(cell) == State("running")
    assert running._run(cell, {}, threading.Event(), print) is None
    process.kill()
    process.wait()
    assert state(cell) == State("waiting")


def test_the_base_is_complete_when_its_process_has_ended_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "out"
    base, _ = open_folder(grid(methods=["tdw"]), root)
    words = running.command(base, State("waiting"))
    assert words[3:7] == ["eval", "--output", str(base.run.path), "--trust-code"]
    assert load_config(words[7]) == base.config
    scores = base_here(grid(methods=["tdw"]), tmp_path / "elsewhere").read_text()
    script = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True); p.write_text(sys.argv[2])"
    )
    for end, status in (("sys.exit(1)", "damaged"), ("pass", "finished")):
        words = [sys.executable, "-c", f"{script}; {end}", str(base.evaluation), scores]
        monkeypatch.setattr(running, "command", lambda cell, found, words=words: words)
        assert run_cells([base])["base"].status == status
    assert [p.name for p in root.glob(".base-damaged-*")] == [".base-damaged-1"]


def test_two_commands_share_the_cells_of_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell is run once, and both commands wait until all are finished."""
    gains = {"naive_1to1": (0.1,) * 4, "customized": (0.1,) * 4}
    fabricate(tmp_path / "done", gains, seeds=[0, 1])
    _, *made = open_folder(grid(list(gains), (0, 1)), tmp_path / "out")
    script = "import shutil, sys, time; time.sleep(0.3); shutil.copytree(*sys.argv[1:])"  # fails if it is there

    def copy(cell: Cell, found: State) -> list[str]:
        return [sys.executable, "-c", script, str(tmp_path / "done" / "cells" / cell.name), str(cell.run.path)]

    monkeypatch.setattr(running, "command", copy)
    ended: list[dict[str, State]] = []
    threads = [threading.Thread(target=lambda: ended.append(run_cells(made, workers=2))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [{s.status for s in states.values()} for states in ended] == [{"finished"}] * 2
    assert all(cell.log.read_text().count("copytree") == 1 for cell in made)


def test_a_cell_that_crashes_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, *made = open_folder(grid(methods=["sars", "tdw"]), tmp_path / "out")
    words = {"sars": "raise SystemExit('the crash of a test')", "tdw": "print('fine')"}
    monkeypatch.setattr(running, "command", lambda cell, found: [sys.executable, "-c", words[cell.method]])
    said: list[str] = []
    ended = run_cells(made, workers=1, say=said.append)
    assert [s.status for s in ended.values()] == ["failed", "waiting"]
    assert said[1].startswith("sars/seed-0: failed, the crash of a test; the log is")
    assert said[2] == "tdw/seed-0: started"
    assert "the crash of a test" in made[0].log.read_text()
    assert "fine" in made[1].log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_grid_stops_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    _, *made = open_folder(grid(methods=["sars", "tdw"]), tmp_path / "out")
    script = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit('saved'))"
    script += "; print('loaded', flush=True); time.sleep(30)"
    monkeypatch.setattr(running, "command", lambda cell, found: [sys.executable, "-c", script])

    def interrupt() -> None:
        while not made[0].log.read_text().endswith("loaded\n"):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    def say(text: str) -> None:
        if text.endswith("started"):
            threading.Thread(target=interrupt).start()

    with pytest.raises(KeyboardInterrupt):
        run_cells(made, workers=1, say=say)
    assert running.last_line(made[0].log) == "saved"
    assert not made[1].log.exists()


def test_what_is_half_written_is_kept_and_begun_anew(tmp_path: Path) -> None:
    root = tmp_path / "out"
    _, cell = open_folder(grid(methods=["tdw"]), root)
    cell.run.path.mkdir(parents=True)
    assert state(cell) == State("waiting")
    (cell.run.path / "metrics.jsonl").write_text("{}\n")
    assert state(cell) == State("damaged", note="it has no config.yaml")
    assert running.set_aside(cell).joinpath("metrics.jsonl").read_text() == "{}\n"
    assert state(cell).status == "waiting"


def test_a_finished_run_without_its_last_evaluation_is_damaged(tmp_path: Path) -> None:
    root = tmp_path / "out"
    _, cell = open_folder(grid(methods=["tdw"]), root)
    base_here(grid(methods=["tdw"]), root)
    train_here(cell)
    assert state(cell).status == "finished"
    last = cell.run.path / "evaluations" / "iteration-000004.json"
    last.write_text(last.read_text()[:30])
    found = state(cell)
    assert found.status == "damaged"
    assert "evaluations/iteration-000004.json is missing or damaged" in found.note


def test_a_run_of_another_configuration_is_not_mixed_in(tmp_path: Path) -> None:
    root = tmp_path / "out"
    _, cell = open_folder(grid(methods=["tdw"]), root)
    base_here(grid(methods=["tdw"]), root)
    train_here(cell)
    with pytest.raises(UserError, match=r"is not of this grid: training.iterations 4 -> 8"):
        open_folder(grid(methods=["tdw"], training={"iterations": 8}), root)
    assert json.loads((cell.run.path / "run.json").read_text())["status"] == "finished"
    _, *more = open_folder(grid(methods=["tdw", "sars"], seeds=(0, 1)), root)
    assert [state(cell).status for cell in more] == ["finished", "waiting", "waiting", "waiting"]


def test_a_grid_that_ran_out_of_memory_goes_on_with_less(tmp_path: Path) -> None:
    """Settings that do not change the result may change, and the cells that were begun get them too."""
    root, hungry = tmp_path / "out", {"use": "studies.compare.tiny:HungryPolicy"}
    methods = ["tdw", "sars"]
    _, cell, _ = open_folder(grid(methods, policy=hungry), root)
    base_here(grid(methods, policy=hungry), root)
    with pytest.raises(UserError, match=r"micro_batch.*gradient_checkpointing"):
        train_here(cell)
    for policy, training in (({**hungry, "scale": 2.0}, {}), (hungry, {"optimizer": {"use": "AdamW", "lr": 1.0}})):
        with pytest.raises(UserError, match=r"is not of this grid: (policy.scale|training.optimizer.lr)"):
            open_folder(grid(methods, policy=policy, training=training), root)
    less = {"policy": {**hungry, "gradient_checkpointing": True}, "training": {"micro_batch": 2}}
    lowered = grid(methods, **less, evaluation={"batch": 3})
    for found in trust_needed(cells(lowered, root)):  # as the command does
        trust.remember(found)
    _, begun, waiting = open_folder(lowered, root)
    assert state(begun).status == "failed"
    words = running.command(begun, state(begun))
    assert words[5:7] == ["--resume", str(begun.run.path)]
    run, config = resume_run(begun.run.path, words[7:])
    assert (config.policy, config.training, config.evaluation) == (
        begun.config.policy, begun.config.training, begun.config.evaluation,
    )  # fmt: skip
    build_trainer(config).train(resume=run, config_yaml=to_yaml(config))
    assert state(begun).status == "finished"
    assert len(running.command(begun, state(begun))) == 7, "nothing is left to change"
    assert running.command(waiting, state(waiting))[-1].endswith("sars-seed-0.yaml")
    _, again, _ = open_folder(grid(methods, policy=hungry), root)
    assert state(again).status == "finished", "a finished cell is the same whatever memory it took"


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something already"):
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


def test_the_base_is_evaluated_as_any_run_would(tmp_path: Path) -> None:
    root = tmp_path / "out"
    _, cell = open_folder(grid(methods=["tdw"]), root)
    base = base_here(grid(methods=["tdw"]), root)
    own = cell.config.model_copy(
        update={"output": tmp_path / "alone", "evaluation": cell.config.evaluation.model_copy(update={"base": None})}
    )
    build_trainer(own).train()
    alone = tmp_path / "alone" / "evaluations" / "iteration-000000.json"
    assert json.loads(alone.read_text()) == json.loads(base.read_text())
