import math
from functools import partial
from pathlib import Path

import pytest
import torch

from customized_grpo.errors import UserError
from customized_grpo.rewards import ClipReward, DinoReward, RemoteReward
from customized_grpo.rewards.check import check_rewards, references_as_images
from rewards import tiny

FAR = {"PYTHONPATH": str(Path(__file__).parent / "far")}


@pytest.fixture
def examples():
    return [tiny.example("a", "a dog"), tiny.example("b", "a red hat", references=2)]


def test_a_trial_of_each_reward(models, examples):
    remote = partial(RemoteReward, "far_rewards:brightness", images="numpy", environment=FAR)
    makers = {
        "prompt": partial(ClipReward, models["clip"]),
        "identity": partial(DinoReward, models["dino2"]),
        "far": remote,
    }
    prompt, identity, far = check_rewards(makers, examples, references_as_images(examples, 40))
    assert [trial.name for trial in (prompt, identity, far)] == list(makers)
    assert identity.scores[0] == pytest.approx(1, abs=1e-3)  # the pictures are the references themselves
    assert (prompt.device, identity.device) == ("cpu", "cpu")
    weights = DinoReward(models["dino2"]).model.num_parameters() * 4 / 2**20
    assert identity.memory == pytest.approx(weights, rel=0.05)
    assert far.device.startswith("process ")
    assert far.memory is None or 1 < far.memory < 1000
    assert all(0 < trial.seconds_per_image < 5 and trial.violation == "" for trial in (prompt, identity, far))


def test_a_wrong_path_fails_before_anything_is_tried(models, examples, tmp_path):
    called = []

    def spy():
        return lambda images, examples: called.append(1)

    with pytest.raises(UserError, match=r"reward 'identity': .*neither an existing folder nor a hub id"):
        check_rewards({"spy": spy, "identity": partial(DinoReward, tmp_path / "absent")}, examples)
    assert not called


def test_a_reward_that_fails_or_breaks_a_rule(examples):
    def broken():
        return lambda images, examples: 1 / 0

    with pytest.raises(UserError, match=r"reward 'broken': The reward .* failed on 2 images, .* ZeroDivisionError"):
        check_rewards({"broken": broken}, examples)
    by_place = check_rewards({"place": lambda: lambda images, examples: torch.arange(2.0)}, examples)[0]
    assert "rows must not mix" in by_place.violation


def test_a_reward_that_scores_nothing(examples):
    def nothing(images, examples):
        return torch.full((2,), torch.nan)

    unscored = check_rewards({"nan": lambda: nothing}, examples)[0]
    assert all(map(math.isnan, unscored.scores))
    assert (unscored.device, unscored.memory) == ("", None)
    assert unscored.violation == "It scored none of the 2 images (all are NaN)."
    nothing.unscored = "the judge said 'no'"
    assert "(the judge said 'no')" in check_rewards({"nan": lambda: nothing}, examples)[0].violation


def test_references_as_images(examples):
    assert references_as_images(examples, 20).shape == (2, 3, 20, 20)
