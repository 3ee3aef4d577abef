"""Conclusions: hand-worked statistics, and verdicts on policies whose truth is known."""

import math

import pytest
import torch

from customized_grpo.errors import UserError
from customized_grpo.functional.statistics import Interval
from customized_grpo.studies.probe import Branches, conclude, fitted_weights, measure_all
from customized_grpo.studies.probe.findings import gradient_cosine, group_correlation, group_variance, judge
from studies.probe import linear

NAN = math.nan


def branches(*groups: list[list[float]], steps: tuple[int, ...] = (0,)) -> Branches:
    return Branches(steps, torch.tensor(groups), None, 0.0)


def test_variance_is_unbiased_within_groups_and_skips_what_is_unscored() -> None:
    groups = [
        [[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]],  # variance 1; constant
        [[10.0, 0.0], [14.0, NAN], [NAN, 2.0]],  # of 10, 14: 8; of 0, 2: 2
        [[1.0, 1.0], [NAN, 1.0 + 1e-7], [NAN, 1.0]],  # one value has no variance; rounding is none
    ]
    expected = torch.tensor([[1.0, 0.0], [8.0, 2.0], [NAN, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(group_variance(torch.tensor(groups)), expected, equal_nan=True)


def test_a_narrow_variance_far_from_zero_keeps_its_digits() -> None:
    rewards = torch.tensor([[[1000.0], [1000.5], [1001.0]]])
    assert float(group_variance(rewards)) == pytest.approx(0.25, rel=1e-12)


def test_correlation_within_groups() -> None:
    groups = [
        [[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]],
        [[1.0, -2.0], [2.0, -4.0], [NAN, 9.0]],
        [[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]],
    ]
    expected = torch.tensor([1.0, -1.0, NAN], dtype=torch.float64)
    torch.testing.assert_close(group_correlation(torch.tensor(groups)), expected, equal_nan=True)


def test_the_average_of_small_groups_is_the_true_variance() -> None:
    values = 3.0 * torch.randn(40_000, 2, 1, generator=torch.Generator().manual_seed(0))
    assert float(group_variance(values).mean()) == pytest.approx(9.0, rel=0.03)


# ---- the verdict


@pytest.mark.parametrize(
    ("low", "high", "answer", "phrase"),
    [
        (0.02, 0.30, "supports", "identity is decided later"),
        (0.01, 0.05, "supports", "though by less than one step"),
        (-0.3, -0.1, "does not support", "the opposite order"),
        (-0.05, 0.08, "does not support", "a difference of one step (0.100) is excluded"),
        (-0.05, 0.11, "undecided", "holds 0 and more than one step"),
        (NAN, NAN, "undecided", "there is no interval"),
    ],
)
def test_the_rule_of_the_verdict(low: float, high: float, answer: str, phrase: str) -> None:
    difference = Interval(*(torch.tensor(x) for x in ((low + high) / 2, low, high)))
    centre = Interval(torch.tensor([0.3, 0.4]), torch.tensor([0.2, 0.3]), torch.tensor([0.4, 0.5]))
    verdict = judge(difference, centre, ("prompt", "identity"), 0.1)
    assert verdict.answer == answer
    assert phrase in verdict.sentence


@pytest.mark.parametrize(
    ("rates", "answer"),
    [((-2.0, 2.0), "supports"), ((2.0, -2.0), "does not support"), ((0.5, 0.5), "does not support")],
    ids=["prompt early", "identity early", "both alike"],
)
def test_the_verdict_is_the_truth_of_the_policy(rates: tuple[float, float], answer: str) -> None:
    probe = linear.probe(rates, examples=24, branches=40, subjects=None, gradients=False)
    subjects = [example.subject for example in probe.examples]
    found = conclude(measure_all(probe), list(probe.rewards), subjects, linear.STEPS)
    assert found.verdict.answer == answer
    truth = linear.centres(rates)
    assert bool(((found.centre.low < truth) & (truth < found.centre.high)).all())
    torch.testing.assert_close(found.shares.estimate, linear.shares(rates), atol=0.05, rtol=0)
    torch.testing.assert_close(found.shares_each.estimate, linear.shares(rates), atol=0.05, rtol=0)
    for shares in (found.shares, found.shares_each):
        torch.testing.assert_close(shares.estimate.sum(0), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(found.weights.estimate.sum(1), torch.ones(4, dtype=torch.float64))
    assert (found.subjects, found.pictures, found.unscored) == (24, 5 * 24 * 40, 0)


def test_little_data_is_undecided() -> None:
    probe = linear.probe((0.5, 0.5), examples=4, branches=2, subjects=None, gradients=False)
    found = conclude(measure_all(probe), ["prompt", "identity"], ["a", "b", "c", "d"], linear.STEPS)
    assert found.verdict.answer == "undecided"


def test_a_single_subject_gives_no_interval() -> None:
    probe = linear.probe((-2.0, 2.0), subjects=1)
    found = conclude(measure_all(probe), ["prompt", "identity"], ["s0"] * 4, linear.STEPS)
    assert found.verdict.answer == "undecided"
    assert bool(found.shares.low.isnan().all())
    assert bool(found.shares.estimate.isfinite().all())
    assert bool(found.cosine.low.isnan().all())


def test_intervals_resample_subjects_and_not_pictures() -> None:
    """Copies of the examples of a subject are no new evidence."""
    probe = linear.probe((-1.0, 1.0), examples=6, branches=4, subjects=None, gradients=False)
    measured, subjects = measure_all(probe), [example.subject for example in probe.examples]
    once = conclude(measured, ["a", "b"], subjects, linear.STEPS)
    copied = [Branches(b.steps, b.rewards.repeat(5, 1, 1), None, 0.0) for b in measured]
    five = conclude(copied, ["a", "b"], subjects * 5, linear.STEPS)
    torch.testing.assert_close(five.shares, once.shares)
    torch.testing.assert_close(five.difference_each, once.difference_each)


def test_a_reward_that_never_moves_is_named() -> None:
    still = [branches([[1.0, 5.0], [2.0, 5.0]]), branches([[1.0, 5.0], [2.0, 5.0]], steps=(0, 1))]
    with pytest.raises(UserError, match="The reward 'b' is the same on all branches"):
        conclude(still, ["a", "b"], ["s"], 2)
    unscored = [branches([[1.0, NAN], [2.0, NAN]]), branches([[1.0, NAN], [2.0, NAN]], steps=(0, 1))]
    with pytest.raises(UserError, match="The reward 'b' could not be scored"):
        conclude(unscored, ["a", "b"], ["s"], 2)


def test_an_example_that_varies_much_rules_the_answer_but_not_the_check() -> None:
    """Nine examples whose second reward moves late by 1, and one in which it moves early by 100."""
    first = torch.tensor([-1.0, 1.0]).repeat(10, 1)
    late, early = first.clone(), first.clone() * 0.01
    late[9], early[9] = 0.01 * late[9], 100 * first[9]
    steps = [
        Branches((0,), torch.stack([first, early], dim=-1), None, 0.0),
        Branches((1,), torch.stack([first, late], dim=-1), None, 0.0),
        Branches((0, 1), torch.stack([first, late], dim=-1), None, 0.0),
    ]
    found = conclude(steps, ["a", "b"], [f"s{i}" for i in range(10)], 2)
    assert float(found.difference.estimate) == pytest.approx(-0.25, abs=0.01)
    assert float(found.difference_each.estimate) == pytest.approx(0.8 * 0.25, abs=0.01)
    assert found.verdict.answer == "undecided"
    assert "A few examples make the difference" in found.verdict.sentence


# ---- gradients


def gram(gradients: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ukd,vld->ukvl", gradients, gradients)


def test_the_cosine_is_of_the_summed_gradients() -> None:
    gradients = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [2.0, 0.0]]])
    counts = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
    expected = torch.tensor([1 / math.sqrt(2), 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(gradient_cosine(gram(gradients), counts), expected)


def test_across_subjects_the_common_noise_drops_out() -> None:
    """Expected gradients e and -e, under noise that both rewards of a subject share and that is ten times as long."""
    direction = torch.zeros(8, 2, 9, dtype=torch.float64)
    direction[:, 0, 8], direction[:, 1, 8] = 1.0, -1.0
    noise = 10 * torch.eye(9, dtype=torch.float64)[:8].unsqueeze(1)
    everyone = torch.ones(1, 8)
    products = gram(direction + noise)
    # Summed: 8 e + noise and -8 e + noise, with 64 of signal and 800 of noise in every product.
    assert float(gradient_cosine(products, everyone)) == pytest.approx((-64 + 800) / (64 + 800))
    assert float(gradient_cosine(products, everyone, across=True)) == pytest.approx(-1.0)


def test_no_gradient_has_no_cosine() -> None:
    assert bool(gradient_cosine(torch.zeros(3, 2, 3, 2), torch.ones(1, 3)).isnan().all())


def test_rewards_of_different_channels_share_no_gradient_direction() -> None:
    """A diagonal policy moves channel 0 by weights that channel 1 does not have: only the noise of both can overlap."""
    probe = linear.probe((-1.0, 1.0), examples=12, branches=64, subjects=None)
    found = conclude(measure_all(probe), ["a", "b"], [e.subject for e in probe.examples], linear.STEPS)
    assert bool((found.cosine.estimate.abs() < 0.35).all())
    assert found.cosine.low.shape == (4,)


# ---- fitted weights


def test_weights_are_shares_against_shares() -> None:
    found = fitted_weights(torch.tensor([[0.6, 0.2], [0.4, 0.8]]), smoothing=0, floor=0.0)
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.25], [1 / 3, 2 / 3]]))


def test_weights_are_clipped_to_the_floor() -> None:
    variance = torch.tensor([[9.0, 1.0], [3.0, 2.0], [0.0, 0.0], [1.0, 10.0]])
    share = variance / variance.sum(0)
    found = fitted_weights(share, smoothing=0, floor=0.2)
    expected = (share / share.sum(1, keepdim=True))[:, 0].nan_to_num(0.5).clamp(0.2, 0.8)
    torch.testing.assert_close(found[:, 0], expected)
    torch.testing.assert_close(found.sum(1), torch.ones(4))


def test_three_rewards_keep_the_floor_and_the_sum() -> None:
    shares = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)) ** 8
    found = fitted_weights(shares, smoothing=0, floor=0.2)
    assert bool((found >= 0.2 - 1e-6).all())
    torch.testing.assert_close(found.sum(1), torch.ones(7))


def test_smoothing_blends_neighbours_and_renormalises_the_ends() -> None:
    shares = torch.tensor([[1.0, 0.25], [0.0, 0.25], [0.0, 0.25], [0.0, 0.25]])
    found = fitted_weights(shares, smoothing=1, floor=0.0)
    first = torch.tensor([0.5 / 0.75, 0.25, 0.0, 0.0])
    second = torch.full((4,), 0.25)
    torch.testing.assert_close(found[:, 0], first / (first + second))


def test_a_floor_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 0 <= floor < 1/2, got 0\.5"):
        fitted_weights(torch.ones(3, 2), floor=0.5)
