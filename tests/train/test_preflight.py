import io
from pathlib import Path

import pytest

from customized_grpo import Display
from customized_grpo.cli.terminal import PlainConsole
from customized_grpo.store.run import RunFolder
from customized_grpo.train import preflight

from .test_trainer import trainer


def test_the_time_of_a_run_is_measured_on_a_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def pass_seconds(policy: object, example: object, size: int) -> tuple[float, float]:
        timed.append(size)
        return 1.0 * size, 3.0 * size

    monkeypatch.setattr(preflight, "pass_seconds", pass_seconds)
    job = trainer(tmp_path, rollout={"num_generations": 16, "num_inference_steps": 5}).job()
    # 3 iterations of 32 rows with 5 steps, 2 of them trained, and two evaluations of 2 rows.
    assert preflight.expected_seconds(job) == pytest.approx(3 * 32 * (5 * 1 + 2 * 3) + 2 * 2 * 5)
    assert timed == [8]


def test_it_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("expected_memory", "expected_seconds"):
        monkeypatch.setattr(preflight, name, lambda job: pytest.fail("it is measured"))
    shown = io.StringIO()
    job, run = trainer(tmp_path, training={"preflight": False}).job(), RunFolder.create(tmp_path / "run")
    Display(PlainConsole(file=shown)).on_start(preflight.summarize(job, run))
    assert "work" in shown.getvalue()
    assert "about" not in shown.getvalue()
    assert "memory" not in shown.getvalue()
    assert "memory_gib" not in run.facts()["summary"]
