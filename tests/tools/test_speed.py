"""The comparison of two sides, without training anything."""

import subprocess
from pathlib import Path

import pytest

from customized_grpo.errors import UserError
from tools import speed


class Counting(speed.Side):
    def __init__(self, name: str, seconds: list[float], log: list[str]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def iteration(self) -> float:
        self.log.append(self.name)
        return self.seconds.pop(0)


def test_sides_take_turns_and_their_ratios_are_those_of_pairs() -> None:
    log: list[str] = []
    sides = [Counting("ours", [1.0, 4.0, 3.0], log), Counting("theirs", [2.0, 4.0, 4.0], log)]
    pairs = speed.in_turn(sides, 3)
    assert log == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert pairs == [(1.0, 2.0), (4.0, 4.0), (3.0, 4.0)]
    assert speed.verdict(pairs) == (
        "CPU seconds of an iteration: 3.00, of the other side 4.00; ratio 0.750, median of 3 pairs (0.500 to 1.000)"
    )


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One commit of a package that trains in no time; its weights have changed since."""
    monkeypatch.setattr(speed, "ROOT", tmp_path / "here")
    package, weights = (tmp_path / "here" / place for place in (Path("src/customized_grpo"), speed.WEIGHTS))
    weights.mkdir(parents=True)
    (package / "train").mkdir()
    (package / "__init__.py").touch()
    (weights / "model").write_text("old")
    (package / "config.py").write_text("def load_config(path, settings): return settings")
    (package / "train" / "trainer.py").write_text("class Observer: pass")
    (package / "assemble.py").write_text(
        """
class build_trainer:
    def __init__(self, settings): assert settings[-1] == "seed=1"
    def train(self, observer):
        print("loaded")
        while True: observer.on_iteration({})
"""
    )
    git = ["git", "-C", str(tmp_path / "here"), "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    (weights / "model").write_text("new")
    return tmp_path / "here"


def test_a_commit_is_measured_in_its_own_worktree_with_the_weights_of_this_one(repository: Path) -> None:
    with speed.checkout("HEAD") as place:
        assert (place / speed.WEIGHTS / "model").read_text() == "new"
    assert not place.exists()
    assert "baseline" not in subprocess.check_output(["git", "-C", repository, "worktree", "list"], text=True)
    assert "median of 2 pairs" in speed.compare("HEAD", ["seed=1"], [], 2)


def test_what_cannot_be_compared_is_one_sentence(repository: Path) -> None:
    with pytest.raises(UserError, match=r"git made no worktree of 'nothing': .*; give a commit that it has"):
        speed.compare("nothing", [], [], 1)
    with pytest.raises(UserError, match="One side ended before its measurement"):
        speed.compare("HEAD", ["seed=2"], [], 1)
