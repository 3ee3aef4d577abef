"""Conclusions: hand-worked statistics, and verdicts on policies whose truth is known."""

import math

import pytest
import torch

from customized_grpo.errors import UserError
from customized_grpo.functional.statistics import Interval
from customized_grpo.studies.probe import Branches, conclude, measure_all
from customized_grpo.studies.probe.findings import judge
from studies.probe import linear

NAN = math.nan


def branches(*groups: list[list[float]], steps: tuple[int, ...] = (0,)) -> Branches:
    return Branches(steps, torch.tensor(groups), None, 0.0)


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
    assert (found.subjects, found.images, found.unscored) == (24, 5 * 24 * 40, 0)


def test_a_schedule_of_two_steps_has_one_probed_step() -> None:
    alone = branches([[1.0, 5.0], [2.0, 6.0]])
    assert conclude([alone, alone], ["a", "b"], ["s"], 2).steps == (0,)


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


def test_intervals_resample_subjects_and_not_images() -> None:
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


def test_rewards_of_different_channels_share_no_gradient_direction() -> None:
    """A diagonal policy moves channel 0 by weights that channel 1 does not have: only the noise of both can overlap."""
    probe = linear.probe((-1.0, 1.0), examples=12, branches=64, subjects=None)
    found = conclude(measure_all(probe), ["a", "b"], [e.subject for e in probe.examples], linear.STEPS)
    assert bool((found.cosine.estimate.abs() < 0.35).all())
    assert found.cosine.low.shape == (4,)
