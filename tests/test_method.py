import math

import pytest
import torch

from customized_grpo.errors import TrainingError, UserError
from customized_grpo.method import Method, MethodSettings, SpreadGuard, describe_rewards
from customized_grpo.settings import Spec

NAMES = ("prompt", "identity")


def method(advantage: str = "sars", **weights) -> Method:
    schedule = Spec(**weights) if weights else Spec(use="sigmoid_crossover")
    return Method(MethodSettings(advantage=Spec(use=advantage), time_weights=schedule), NAMES)


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_paper_weighs_the_prompt_first() -> None:
    weights = method().weights(torch.tensor([0.0, 0.6]), 10, draw())
    assert weights[0].tolist() == pytest.approx([0.7, 0.3])
    assert weights[1, 1] > weights[1, 0]


def test_schedules_are_given_what_they_ask_for() -> None:
    loop = method(use="by_loop_index").weights(torch.tensor([0.0, 0.6, 0.9]), 10, draw())
    assert loop.shape == (3, 2)


def test_a_schedule_for_another_number_of_rewards_is_refused() -> None:
    with pytest.raises(UserError, match=r"weights of shape \(2, 3\) for 2 steps and 2 rewards \(prompt, identity\)"):
        method(use="constant", weights=[1.0, 1.0, 1.0]).weights(torch.tensor([0.0, 0.6]), 10, draw())


def test_a_group_of_one_reward_where_two_are_needed_is_refused() -> None:
    one = Method(MethodSettings(time_weights=Spec(use="constant", weights=[1.0])), ("prompt",))
    with pytest.raises(UserError, match=r"method.advantage 'sars': agreement needs K >= 2"):
        one.advantages(torch.rand(2, 4, 1), torch.ones(3, 1))


def test_the_record_counts_what_could_not_be_scored() -> None:
    rewards = torch.tensor([[[1.0, 4.0], [3.0, math.nan]], [[5.0, 2.0], [7.0, 2.0]]])
    record = describe_rewards(rewards, NAMES)
    assert record["reward/prompt/mean"] == 4
    assert record["reward/prompt/spread"] == 1
    assert record["reward/identity/unscored"] == 1
    assert record["reward/identity/mean"] == pytest.approx(8 / 3)


def test_the_spread_guard_is_strict_first_and_patient_later() -> None:
    flat, fine, guard = torch.ones(2, 4, 2), torch.rand(2, 4, 2), SpreadGuard()
    with pytest.raises(TrainingError, match="'prompt' is the same"):
        SpreadGuard().check(flat, NAMES, 1)
    for iteration, rewards in enumerate([fine, flat, flat, fine, flat, flat], start=1):
        guard.check(rewards, NAMES, iteration)
    with pytest.raises(TrainingError, match="in iteration 7"):
        guard.check(flat, NAMES, 7)
