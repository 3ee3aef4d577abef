"""Every rule by hand, on the side where it holds and on the side where it does not."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from customized_grpo.studies.report.alarms import (
    alarms,
    copying,
    diversity_that_halved,
    few_subjects,
    kinds_that_got_worse,
    refusing,
    untrained_that_fell,
)
from customized_grpo.studies.report.verdict import Verdict
from store.tables import by_kind, ones

METRICS = ("prompt", "identity", "oracle_prompt")
SPREAD = np.linspace(-0.1, 0.1, 12)
NOISE = np.resize([0.02, -0.02], 12)


def moved(property: tuple[Any, ...], scene: tuple[Any, ...], subjects: int = 12) -> Verdict:
    """Twelve subjects of each kind (or fewer recolourings), whose metrics changed by what is given."""
    base = [0.5 + SPREAD] * 3
    first, second = ([b + step for b, step in zip(base, steps, strict=True)] for steps in (property, scene))
    return Verdict(
        by_kind(0, METRICS, property=[b[:subjects] for b in base], scene=base),
        by_kind(1, METRICS, property=[column[:subjects] for column in first], scene=second),
    )


def test_a_kind_got_worse_if_the_interval_is_below_zero() -> None:
    (remark,) = kinds_that_got_worse(moved((0, 0, NOISE - 0.1), (0, 0, NOISE)))
    assert remark.text.startswith("property got worse: prompt shown 0.500 → 0.400 (−0.100 [−0.1")
    assert remark.serious
    assert list(kinds_that_got_worse(moved((0, 0, NOISE - 0.001), (0, 0, NOISE)))) == [], "the interval reaches 0"
    assert list(kinds_that_got_worse(moved((-0.1, -0.1, 0), (0, 0, 0)))) == [], "rewards do not decide here"


def lost_colours(lost: int, identity: float = 0.0) -> Verdict:
    """Of 26 recolourings 10 are complete and so many no longer, at the same mean: what they lose, others gain."""
    first = np.where(ones(10, 26), 1, 0.25)
    last = first - 0.5 * ones(lost, 26) + 0.5 * ones(lost, 26)[::-1]
    before, after = ({"property": [0.5, base, shown], "scene": [0.5, 0.5, first]}
                     for base, shown in ((0.5, first), (0.5 + identity, last)))  # fmt: skip
    return Verdict(by_kind(0, METRICS, **before), by_kind(1, METRICS, **after))


def test_a_kind_got_worse_if_complete_images_are_lost_while_the_mean_holds() -> None:
    (remark,) = kinds_that_got_worse(lost_colours(9))
    assert remark.text.startswith("property got worse: prompt shown 0.538 → 0.538, complete in 10")
    assert ", complete in 10 of 26 → 1 of 26 images (−0.346 [−0." in remark.text
    assert remark.serious
    assert list(kinds_that_got_worse(lost_colours(1))) == [], "one of 26 may be chance"


def test_complete_images_of_the_prompt_are_lost_where_identity_rises() -> None:
    (remark,) = copying(lost_colours(9, identity=0.1))
    assert "complete in 10 of 26 → 1 of 26 images (−0.346 [−0." in remark.text
    assert remark.serious
    assert list(copying(lost_colours(1, identity=0.1))) == []
    assert list(copying(lost_colours(9))) == [], "identity did not rise"


def test_an_alarm_on_few_subjects_is_said_and_not_serious() -> None:
    (remark,) = kinds_that_got_worse(moved((0, 0, -0.1), (0, 0, 0), subjects=9))
    assert remark.text.endswith("(9 subjects: too few to be sure).")
    assert not remark.serious


def test_identity_that_rises_where_the_prompt_falls() -> None:
    (remark,) = copying(moved((0, 0.2, -0.1), (0.1, 0.1, 0.1)))
    assert remark.text == (
        "property: identity 0.500 → 0.700 (+0.200 [no spread]) rose while prompt shown 0.500 → 0.400 "
        "(−0.100 [no spread]) fell: the reference is copied, or what the prompt asks is refused; "
        "67% of the gain in identity over all tasks is from here."
    )
    assert remark.serious
    assert list(copying(moved((0, 0.2, 0), (0, 0.2, 0)))) == [], "the prompt did not fall"
    assert list(copying(moved((0, 0.2, 0), (0, 0, -0.1)))) == [], "another kind is another matter"
    assert "all of the gain" in next(copying(moved((0, 0.2, -0.1), (0, -0.1, 0)))).text


@pytest.mark.parametrize(("permitted", "alarm"), [(0.6, True), (0.7, False), (0.8, False), (np.nan, True)])
def test_identity_that_rises_above_what_the_prompt_permits(permitted: float, alarm: bool) -> None:
    """Identity went from 0.5 to 0.7; without targets a kind that changes the subject counts if nothing else rose."""
    verdict = moved((0, 0.2 + NOISE, 0), (0, 0.2 + NOISE, 0.1))
    table = np.full((24, 3), np.nan)
    table[:, 1] = permitted + np.resize(SPREAD, 24)
    found = [remark.text for remark in refusing(Verdict(replace(verdict.before, permitted=table), verdict.after))]
    where = ["property", "scene"] if np.isfinite(permitted) else ["property"]
    assert [text.split(":")[0] for text in found] == (where if alarm else [])
    why = "to 0.100 above what true images score (0.600)" if permitted == 0.6 else "where prompts change the subject"
    assert all(why in text for text in found)


def test_identity_may_rise_with_the_prompt_or_stay_high() -> None:
    assert list(refusing(moved((0.1, 0.2, 0), (0, 0.2, 0)))) == [], "the prompt rose too; scenes leave the subject"
    verdict = moved((0, 0, 0), (0, 0, 0))
    assert list(refusing(Verdict(replace(verdict.before, permitted=np.zeros((24, 3))), verdict.after))) == []


def test_copying_is_looked_for_without_kinds_too() -> None:
    before, after = (by_kind(n, METRICS, one=[0.5, 0.5 + n / 10, 0.5 - n / 10 + 0 * SPREAD]) for n in (0, 1))
    (remark,) = copying(Verdict(before, after))
    assert remark.text.startswith("identity 0.500 → 0.600")
    assert "of the gain" not in remark.text


def test_what_was_not_trained_on_and_fell() -> None:
    (remark,) = untrained_that_fell(moved((0.1, 0, -0.1), (0.1, 0, -0.1)))
    assert remark.text.endswith("which was not trained on, fell while prompt rose: reward hacking?")
    (remark,) = untrained_that_fell(moved((0, 0, -0.1), (0, 0, -0.1)))
    assert remark.text.endswith("which was not trained on, fell.")
    assert list(untrained_that_fell(moved((-0.1, 0, 0), (-0.1, 0, 0)))) == []


def test_diversity_that_halved() -> None:
    def told(fall: float) -> list[str]:
        before, after = (by_kind(n, ("diversity",), one=[0.2 + NOISE - n * fall]) for n in (0, 1))
        return [remark.text for remark in diversity_that_halved(Verdict(before, after))]

    (text,) = told(0.11)
    assert text.startswith("diversity 0.200 → 0.090")
    assert text.endswith("is half or less: the images of a task become one.")
    assert told(0.09) == []


def test_few_subjects_are_named() -> None:
    (remark,) = few_subjects(moved((0, 0, 0), (0, 0, 0), subjects=9))
    assert remark.text == "Fewer than 10 subjects, so shown but not deciding the headline: property (9)."
    assert list(few_subjects(moved((0, 0, 0), (0, 0, 0), subjects=10))) == []
    three = by_kind(0, METRICS, one=[0.5, 0.5, SPREAD[:3]])
    (remark,) = few_subjects(Verdict(three, three))
    assert remark.text == "Only 3 subjects: intervals that resample so few subjects are too narrow."
    assert remark.serious
    one = by_kind(0, METRICS, one=[0.5, 0.5, [0.5]])
    assert [remark.text for remark in few_subjects(Verdict(one, one))] == [
        "There is one held-out subject, so there are no intervals."
    ]


def test_what_stayed_as_it_was_alarms_nobody() -> None:
    metrics = (*METRICS, "oracle_right")
    same = by_kind(0, metrics, a=[0.5 + SPREAD] * 3 + [ones(0, 12)], b=[0.5 + SPREAD] * 3 + [ones(12, 12)])
    assert alarms(Verdict(same, same)) == []
