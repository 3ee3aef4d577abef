"""Import paths of the version before resolve, with a warning that names the new path."""

import sys
from importlib import import_module

import pytest

from customized_grpo import moved


@pytest.fixture(autouse=True)
def forget_old_names(monkeypatch):
    for name in [name for name in sys.modules if moved.OldPaths().find_spec(name, None)]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("types", "structures"),
        ("trainer", "train.trainer"),
        ("compare.measures", "rewards.copying"),
        ("compare.grid", "studies.compare.grid"),
        ("report.intervals", "store.scores"),
    ],
)
def test_an_old_path_gives_the_moved_module_and_a_warning(old, new):
    expected = import_module(f"customized_grpo.{new}")
    own = expected.__spec__
    with pytest.warns(FutureWarning) as seen:
        assert import_module(f"customized_grpo.{old}") is expected
    assert f"customized_grpo.{old} has moved to customized_grpo.{new};" in str(seen[-1].message)
    assert expected.__spec__ is own


def test_a_module_is_named_by_its_current_path():
    assert moved.current("customized_grpo.compare.measures") == "customized_grpo.rewards.copying"
    assert moved.current("customized_grpo.compare.grid") == "customized_grpo.studies.compare.grid"
    assert [moved.current(name) for name in ("customized_grpo.store", "mine.types", "DinoReward")] == [None] * 3


@pytest.mark.parametrize(("old", "new"), moved.MOVED.items())
def test_every_new_path_exists(old, new):
    assert import_module(f"customized_grpo.{new}")


def test_other_unknown_paths_are_left_alone():
    with pytest.raises(ModuleNotFoundError):
        import_module("customized_grpo.nothing")
    assert import_module("types").ModuleType
