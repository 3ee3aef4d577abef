"""Folders of version 0.1.0 stay readable: a small run that it trained is committed beside the tests."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from customized_grpo.cli import main as cli
from customized_grpo.store.run import read_run

RUN = Path(__file__).parent / "fixtures" / "run-0.1.0"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def cgrpo(monkeypatch: pytest.MonkeyPatch, *words: object) -> object:
    monkeypatch.setattr(sys, "argv", ["cgrpo", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_its_numbers_are_read(run: Path) -> None:
    record = read_run(run)
    assert [int(i) for i in record.iterations] == [1, 2]
    assert [e.iteration for e in record.evaluations] == [0, 1, 2]
    assert record.evaluations[0].kinds == ("",) * 4
    content = json.loads((RUN / "evaluations" / "iteration-000002.json").read_text())
    np.testing.assert_array_equal(record.evaluations[2].values, np.array(content["values"], dtype=float))


def test_it_is_reported_and_exported(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cgrpo(monkeypatch, "report", run) == 0
    assert "finished, 2 iterations" in (run / "report.html").read_text()
    exported = tmp_path / "adapter.safetensors"
    assert cgrpo(monkeypatch, "export", "--run", run, "--output", exported) == 0
    assert len(load_file(exported)) == len(load_file(run / "checkpoints/iteration-000002/trainable.safetensors"))


def test_its_weights_are_evaluated_to_the_same_scores(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cgrpo(monkeypatch, "eval", "--run", run, "--output", tmp_path / "again", "--trust-code") == 0
    (measured,) = (tmp_path / "again").rglob("iteration-000002.json")
    found = np.array(json.loads(measured.read_text())["values"], dtype=float)
    before = np.array(json.loads((RUN / "evaluations/iteration-000002.json").read_text())["values"], dtype=float)
    np.testing.assert_allclose(found, before, atol=1e-2)  # bfloat16, where this processor may take float32


def test_it_resumes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = cgrpo(monkeypatch, "train", "--resume", run, "training.iterations=3", "--trust-code")
    assert status == 0
    assert [int(i) for i in read_run(run).iterations] == [1, 2, 3]
