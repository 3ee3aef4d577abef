import math

import pytest
import torch

from customized_grpo.errors import TrainingError, UserError
from customized_grpo.functional import advantages
from customized_grpo.settings import Spec
from customized_grpo.structures import Example
from customized_grpo.train.method import Method, SpreadGuard, describe_advantages, describe_rewards
from customized_grpo.train.settings import DifficultySettings, MethodSettings

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


def test_the_record_is_of_what_could_be_scored() -> None:
    nan = math.nan
    rewards = torch.tensor([[[1.0, 3e38], [3.0, 3e38], [nan, nan]], [[nan, 1e38], [5.0, nan], [nan, -1e38]]])
    record = describe_rewards(rewards, NAMES)
    assert record["reward/prompt/mean"] == 3
    assert record["reward/prompt/spread"] == 1  # the second group has one scored picture, and so no spread
    assert record["reward/prompt/unscored"] == 3
    assert record["reward/identity/mean"] == pytest.approx(1.5e38)
    assert record["reward/identity/spread"] == pytest.approx(0.5e38)
    assert record["reward/identity/unscored"] == 2
    assert math.isnan(record["conflict/share"])  # no group has two pictures with both scores and a spread in both
    record = describe_rewards(torch.tensor([[[1.0, 1.0], [2.0, 2.0], [nan, 3.0]]]), NAMES)
    assert record["conflict/both_negative"] == 0.5
    nothing = describe_rewards(torch.full((1, 2, 2), nan), NAMES)
    assert {name for name, value in nothing.items() if math.isnan(value)} == nothing.keys() - {
        "reward/prompt/unscored", "reward/identity/unscored",
    }  # fmt: skip


def test_pictures_that_nobody_scored_leave_the_statistics_of_the_advantages() -> None:
    rewards = torch.tensor([[[1.0, math.nan], [3.0, 4.0], [math.nan, math.nan]]])
    everyone = torch.tensor([[[1.0], [-5.0], [0.0]]])
    record = describe_advantages(everyone, rewards, 5.0)
    assert record == {"advantage/std": pytest.approx(math.sqrt(18)), "advantage/clamped": 0.5}
    nothing = describe_advantages(everyone, rewards * math.nan, 5.0)
    assert all(map(math.isnan, nothing.values()))
    one = describe_advantages(torch.tensor([[[-5.0]]]), torch.zeros(1, 1, 2), 5.0)
    assert math.isnan(one["advantage/std"])
    assert one["advantage/clamped"] == 1


def test_the_spread_guard_names_the_reward_that_is_to_blame() -> None:
    fine = torch.rand(2, 4, 2)
    for value in (1e38, 3e38, -3e38):
        SpreadGuard().check(fine * value, NAMES, 1)
    unscored, flat = fine.clone(), fine.clone()
    unscored[..., 1] = math.nan
    flat[..., 1] = torch.tensor([7.0, 7.0, math.nan, 7.0])
    for rewards, fault in (
        (unscored, r"^The reward 'identity' could not score any picture in iteration 1 \(8 of 8 pictures unscored\),"),
        (flat, r"^The reward 'identity' is the same for all .* in iteration 1 \(2 of 8 pictures unscored\), which"),
    ):
        with pytest.raises(TrainingError, match=fault):
            SpreadGuard().check(rewards, NAMES, 1)
    with pytest.raises(TrainingError, match=r"reward 'prompt' could not .* and the reward 'identity' could not"):
        SpreadGuard().check(fine * math.nan, NAMES, 1)


def test_the_spread_guard_counts_each_reward_on_its_own() -> None:
    guard, fine = SpreadGuard(), torch.rand(2, 4, 2)
    prompt, identity = (torch.where(torch.tensor(flat), 1.0, fine) for flat in ([True, False], [False, True]))
    for iteration, rewards in enumerate([fine, prompt, identity, prompt, identity, identity], start=1):
        guard.check(rewards, NAMES, iteration)
    with pytest.raises(TrainingError, match="reward 'identity' is the same"):
        guard.check(identity, NAMES, 7)


def test_the_record_has_the_conflict_of_two_rewards_and_of_one_none() -> None:
    rewards = torch.tensor([[[1.0, 2.0], [2.0, 1.0], [3.0, 4.0], [4.0, 3.0]]])
    conflict = {k: v for k, v in describe_rewards(rewards, NAMES).items() if k.startswith("conflict/")}
    both = {"conflict/share": 0.0, "conflict/both_positive": 0.5, "conflict/both_negative": 0.5}
    assert conflict == pytest.approx({**both, "conflict/correlation": 0.6})
    assert set(describe_rewards(rewards[..., :1], NAMES[:1])) == {
        f"reward/prompt/{k}" for k in ("mean", "spread", "unscored")
    }


def test_the_record_says_what_the_clamp_holds() -> None:
    record = describe_advantages(torch.tensor([[[2.0, -2.0], [0.0, 1.0]]]), torch.zeros(1, 2, 2), 2.0)
    assert record == pytest.approx({"advantage/std": math.sqrt(8.75 / 3), "advantage/clamped": 0.5})


def test_advantages_are_clamped_as_set() -> None:
    settings = MethodSettings(advantage=Spec(use="weighted_sum"), advantage_clamp=0.5)
    rewards = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]])
    found = Method(settings, NAMES).advantages(rewards, torch.tensor([[0.5, 0.5]]))
    assert found.flatten().tolist() == pytest.approx([-0.5, 0.0, 0.5])


def test_the_spread_guard_counts_pictures_that_any_reward_could_not_score() -> None:
    rewards = torch.rand(2, 3, 2)
    rewards[..., 1] = torch.tensor([[math.nan, 1.0, 1.0], [math.nan, 1.0, math.nan]])
    with pytest.raises(TrainingError, match=r"'identity' is the same .* \(3 of 6 pictures unscored\)"):
        SpreadGuard().check(rewards, NAMES, 1)


def test_a_new_spread_guard_waits_for_three_in_a_row() -> None:
    guard = SpreadGuard()
    for iteration in (2, 3):
        guard.check(torch.ones(2, 4, 2), NAMES, iteration)
    with pytest.raises(TrainingError, match="in iteration 4"):
        guard.check(torch.ones(2, 4, 2), NAMES, 4)


def test_the_spread_guard_is_strict_first_and_patient_later() -> None:
    flat, fine, guard = torch.ones(2, 4, 2), torch.rand(2, 4, 2), SpreadGuard()
    with pytest.raises(TrainingError, match="'prompt' is the same"):
        SpreadGuard().check(flat, NAMES, 1)
    for iteration, rewards in enumerate([fine, flat, flat, fine, flat, flat], start=1):
        guard.check(rewards, NAMES, iteration)
    with pytest.raises(TrainingError, match="in iteration 7"):
        guard.check(flat, NAMES, 7)


@pytest.mark.parametrize("name", advantages.__all__)
def test_every_aggregation_takes_what_each_step_is_credited_with(name: str) -> None:
    rewards, weights = torch.randn(3, 4, 2, 2, generator=draw()), torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    needed = {"cme": {"zero": 0.0}, "identity_gate": {"threshold": 0.5, "strength": 5.0}}
    spec = Spec.model_validate({"use": name, **needed.get(name, {})})
    made = Method(MethodSettings(advantage=spec, credit=Spec(use="stepwise")), NAMES)
    found = made.advantages(rewards, weights)
    assert found.shape == (3, 4, 2)
    for step in (0, 1):
        alone = made.advantages(rewards[:, :, step], weights[[step]])
        assert torch.equal(found[..., step], alone[..., 0])


def test_gains_are_not_compared_with_the_rewards_of_copies() -> None:
    Method(MethodSettings(advantage=Spec(use="cme"), credit=Spec(use="final")), NAMES)
    with pytest.raises(UserError, match=r"'stepwise' gives gains, and method.advantage 'cme' would compare them"):
        Method(MethodSettings(advantage=Spec(use="cme"), credit=Spec(use="stepwise")), NAMES)


def test_a_step_is_credited_with_what_it_adds() -> None:
    seen = {step: torch.full((1, 2, 2), float(step**2)) for step in (1, 2, 4, 5)}
    made = Method(MethodSettings(credit=Spec(use="stepwise")), NAMES)
    assert made.credited(seen, torch.tensor([1, 4]))[0, 0].tolist() == [[3, 3], [9, 9]]
    made.credit = lambda before, after, final: after[..., 0]
    with pytest.raises(UserError, match=r"method.credit gives shape \(1, 2, 2\), expected .* = \(1, 2, 2, 2\)"):
        made.credited(seen, torch.tensor([1, 4]))


def test_examples_and_kinds_change_the_weights_but_not_their_sum() -> None:
    settings = MethodSettings(advantage=Spec(use="weighted_sum"), kind_weights={"property": {"identity": 0.25}})
    made = Method(settings, NAMES)
    examples = [Example("a", "p", ()), Example("b", "p", (), kind="property"),
                Example("c", "p", (), kind="property", weights={"prompt": 0.0, "identity": 3.0})]  # fmt: skip
    factors = made.factors(examples)
    assert factors.tolist() == [[1, 1], [1, 0.25], [0, 3]]
    rewards = torch.tensor([[[1.0, 4.0], [3.0, 2.0]]] * 3)
    found = made.advantages(rewards, torch.tensor([[0.5, 0.5]]), factors)[..., 0]
    z = 1 / math.sqrt(2)
    assert found.flatten().tolist() == pytest.approx([0, 0, -0.6 * z, 0.6 * z, z, -z], abs=1e-6)


def test_groups_that_fail_count_more() -> None:
    even = torch.tensor([[0.5, 0.5]])
    rewards = torch.tensor([[[0.1, 4.0], [0.3, 2.0]], [[0.5, 4.0], [0.7, 5.0]], [[0.9, 1.0], [1.0, 1.0]]])
    plain = Method(MethodSettings(advantage=Spec(use="weighted_sum")), NAMES).advantages(rewards, even)
    settings = MethodSettings(
        advantage=Spec(use="weighted_sum"), advantage_clamp=0.9, difficulty=DifficultySettings(reward="prompt", low=0.1)
    )
    found = Method(settings, NAMES).advantages(rewards, even)
    weights = torch.tensor([0.64, 0.16, 0.1]) / 0.3  # (1 - 0.2)^2, (1 - 0.6)^2, and the lower bound
    torch.testing.assert_close(found, (plain * weights[:, None, None]).clamp(-0.9, 0.9))


def test_weights_by_difficulty_need_a_reward_and_final_images() -> None:
    with pytest.raises(UserError, match=r"method.difficulty.reward: there is no reward 'promt'. Did you mean 'prompt'"):
        Method(MethodSettings(difficulty=DifficultySettings(reward="promt")), NAMES)
    with pytest.raises(UserError, match=r"'stepwise' gives gains, and method.difficulty weighs groups"):
        Method(MethodSettings(credit=Spec(use="stepwise"), difficulty=DifficultySettings(reward="prompt")), NAMES)


def test_weights_for_what_does_not_train_are_refused() -> None:
    with pytest.raises(UserError, match=r"method.kind_weights.property: there is no reward 'identiy'. Did you mean"):
        Method(MethodSettings(kind_weights={"property": {"identiy": 0.5}}), NAMES)
    with pytest.raises(UserError, match=r"weights of example 'a': expected factors that are not negative"):
        method().factors([Example("a", "p", (), weights={"prompt": -1.0})])
    with pytest.raises(UserError, match=r"method.rewards: there is no reward 'grey'"):
        Method(MethodSettings(rewards=("prompt", "grey")), NAMES, ("identity_grey",))


def test_a_metric_may_train_in_place_of_a_reward() -> None:
    made = Method(MethodSettings(rewards=("prompt", "identity_grey")), NAMES, ("identity_grey",))
    assert made.names == ("prompt", "identity_grey")
