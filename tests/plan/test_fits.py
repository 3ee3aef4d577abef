"""A run that cannot fit is refused before anything is loaded."""

from typing import Any

import pytest

import fakes
from customized_grpo import assemble
from customized_grpo.config import load_config
from customized_grpo.errors import UserError
from customized_grpo.plan import fits
from customized_grpo.plan.estimate import Memory, Planner

ON_GPU, GIB = "policy.device=cuda:0", 2**30


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was counted. A run takes 3 GiB, and cannot fit into 1 MiB, which its GPU has."""
    asked: list[Any] = []

    class Counted(Planner):
        given: Any = None

        def __init__(self, *given: Any, **more: Any) -> None:
            asked.append(given[0].policy.arguments["path"])

        def memory(self, choice: Any) -> Memory:
            return Memory({"encoders": 2 * GIB}, {"update": {"activations": GIB}})

    monkeypatch.setattr("customized_grpo.plan.estimate.Planner", Counted)
    monkeypatch.setattr(fits, "_total_memory", lambda device: 2**20)
    return asked


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(
    counted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("build_rewards", "build_policy"):
        monkeypatch.setattr(assemble, name, lambda *given: pytest.fail("something is loaded"))
    sentence = r"needs about 3.0 GiB in the stage update, and cuda:0 has 0.0 GiB; set policy.offload.*preflight=false"
    with pytest.raises(UserError, match=sentence):
        assemble.build_trainer(load_config(None, [ON_GPU]))
    assert len(counted) == 1


@pytest.mark.parametrize(
    "words", [["policy.device=cpu"], [ON_GPU, "training.preflight=false"], [ON_GPU, "policy.path=some/model"]]
)
def test_nothing_is_counted_where_nothing_can_be_refused(counted: list[Any], words: list[str]) -> None:
    fits.check_fits(load_config(None, words), fakes.examples()[0])
    assert counted == []


def test_a_gpu_with_plenty_of_memory_is_not_counted(counted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "_total_memory", lambda device: GIB)
    fits.check_fits(load_config(None, [ON_GPU]), fakes.examples()[0])
    assert counted == []


def test_a_model_in_the_cache_of_the_hub_is_counted(
    counted: list[Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(2**16))
    monkeypatch.setattr(fits, "try_to_load_from_cache", lambda *given, **more: str(tmp_path / "model_index.json"))
    with pytest.raises(UserError, match=r"needs about 3\.0 GiB"):
        fits.check_fits(load_config(None, [ON_GPU, "policy.path=some/model"]), fakes.examples()[0])
    assert counted == [str(tmp_path)]
