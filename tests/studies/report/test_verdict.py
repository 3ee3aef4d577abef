"""Numbers by hand: which kind is the worst, and how the headline says it."""

import math
from dataclasses import replace

import numpy as np
import pytest

from customized_grpo.page.formats import parts
from customized_grpo.studies.report.verdict import Verdict
from store.tables import BASE, by_kind, ones, table

METRICS = ("prompt", "identity", "oracle_prompt", "oracle_right")
SPREAD = np.linspace(-0.1, 0.1, 12)


def refusing(subjects: int = 12) -> Verdict:
    """Of recolourings ten images were fully right and one is left; the scenes gain in everything."""
    few = slice(None, subjects)
    before = by_kind(
        0, METRICS, property=[0.6 + SPREAD[few], 0.5 + SPREAD[few], 0.5 + SPREAD[few], ones(10, 12)[few]],
        scene=[0.6 + SPREAD, 0.5 + SPREAD, 0.5 + SPREAD, ones(3, 12)],
    )  # fmt: skip
    after = by_kind(
        3, METRICS, property=[0.65 + SPREAD[few], 0.7 + SPREAD[few], 0.5 + SPREAD[few], ones(1, 12)[few]],
        scene=[0.8 + SPREAD, 0.6 + SPREAD, 0.6 + SPREAD, ones(6, 12)],
    )  # fmt: skip
    return Verdict(before, after)


def test_the_worst_kind_is_the_headline_in_numbers() -> None:
    verdict = refusing()
    answer, lead = verdict.headline()
    assert answer == "Worst kind, property: fully right 10 of 12 → 1 of 12 images."
    assert verdict.worst is not None
    # 13 of 24 images were right: a standard deviation of sqrt(13 * 11) / 24.
    assert verdict.worst.gain == pytest.approx((1 - 10) / 12 / (math.sqrt(13 * 11) / 24))
    low, high = verdict.worst.change.difference[1:]
    assert -1 <= low < -0.75 < high < 0
    interval = f"[{low:.3f}, {high:.3f}]".replace("-", "−")
    told = f"This is a clear fall: −0.750 {interval}. All kinds together: fully right 13 of 24 → 7 of 24 images."
    assert lead == told


def test_tasks_are_ranked_by_what_fell_most_in_standard_deviations() -> None:
    """Over tasks, oracle_prompt varies by 0.5 and oracle_right by 0.25: a fall of 0.1 weighs more in the latter."""
    metrics = ("prompt", "identity", "oracle_prompt", "oracle_right")
    before = by_kind(0, metrics, a=[0, 0, [0.0, 1.0], [0.25, 0.75]])
    after = by_kind(1, metrics, a=[9, 9, [-0.1, 0.8], [0.15, 0.75]])
    gains = Verdict(before, after).gains()
    assert gains[0] == (pytest.approx(-0.4), "fully right 0.250 → 0.150")
    assert gains[1] == (pytest.approx(-0.4), "prompt shown 1.000 → 0.800")


def test_a_kind_of_nine_subjects_is_shown_and_decides_nothing() -> None:
    verdict = refusing(subjects=9)
    assert verdict.worst is not None
    assert verdict.worst.kind == "scene"
    assert [row.title for row in verdict.table().rows] == [
        "all (21 subjects)",
        "property (9 subjects)",
        "scene (12 subjects)",
    ]
    assert refusing(subjects=10).worst.kind == "property"  # pyright: ignore[reportOptionalMemberAccess]


def test_a_subject_counts_once_and_only_where_it_is_scored_twice() -> None:
    verdict = refusing()
    pairs = tuple(f"{task.split()[0]} {n // 2}" for n, task in enumerate(verdict.before.tasks))
    assert Verdict(replace(verdict.before, subjects=pairs), verdict.after).worst is None, "six subjects of each kind"
    values = verdict.after.values.copy()
    values[0, :3, 3] = math.nan
    found = Verdict(verdict.before, replace(verdict.after, values=values)).worst
    assert found is not None
    assert (found.kind, found.change.metric) == ("property", "oracle_prompt"), "fully right has nine subjects left"


def test_without_a_kind_that_counts_all_tasks_are_the_headline() -> None:
    few = {"a": [BASE, BASE], "b": [BASE, BASE]}
    verdict = Verdict(by_kind(0, ("prompt", "identity"), **few), by_kind(1, ("prompt", "identity"), **few))
    answer, lead = verdict.headline()
    assert answer == "Prompt 0.300 → 0.300 and identity 0.300 → 0.300 on held-out subjects."
    assert lead.endswith("No kind of prompt has 10 subjects, so all tasks are taken together.")
    one = Verdict(table(0, BASE, BASE), table(1, BASE, BASE))
    assert one.by_kind == {}
    assert one.headline()[1].endswith("All tasks are of one kind, so there is no verdict by kind.")


def test_what_was_not_trained_on_decides_and_rewards_only_without_it() -> None:
    """A creature that takes on a new colour is less like its reference, and that is no failure."""
    spread = np.linspace(0, 0.4, 10)
    before = by_kind(0, METRICS[:3], property=[spread, spread, spread], scene=[spread, spread, spread])
    after = by_kind(1, METRICS[:3], property=[spread, spread - 0.3, spread + 0.4], scene=[spread, spread, spread + 0.1])
    verdict = Verdict(before, after)
    assert verdict.deciding == ["oracle_prompt"]
    assert verdict.worst is not None
    assert verdict.worst.kind == "scene"
    rewards = Verdict(*(replace(s, metrics=METRICS[:2], values=s.values[:, :, :2]) for s in (before, after)))
    assert rewards.worst is not None
    assert (rewards.worst.kind, rewards.worst.change.metric) == ("property", "identity")


def test_a_share_says_in_how_many_images_it_is_complete() -> None:
    values = [np.where(ones(n, 10), 1, 0.5) for n in (8, 2, 5, 6)]
    before = by_kind(0, METRICS[:3], property=[0.5, 0.5, values[0]], scene=[0.5, 0.5, values[2]])
    after = by_kind(1, METRICS[:3], property=[0.5, 0.5, values[1]], scene=[0.5, 0.5, values[3]])
    assert Verdict(before, after).headline()[0] == (
        "Worst kind, property: prompt shown 0.900 → 0.600, complete in 8 of 10 → 2 of 10 images."
    )


def test_the_lead_is_not_unsure_where_complete_images_clearly_fell() -> None:
    """Nine of ten complete images are lost, and what they lose others gain: the mean hardly moves."""
    first = np.where(ones(10, 26), 1, 0.25)
    last = first - 0.5 * ones(9, 26) + 0.48 * ones(9, 26)[::-1]
    before = by_kind(0, METRICS[:3], property=[0.5, 0.5, first], scene=[0.5, 0.5, first])
    after = by_kind(1, METRICS[:3], property=[0.5, 0.5, last], scene=[0.5, 0.5, first])
    lead = Verdict(before, after).headline()[1]
    assert lead.startswith("Complete images clearly fell: −0.346 [−0.")


def test_a_metric_that_only_one_evaluation_has_is_left_out() -> None:
    verdict = refusing()
    older = replace(verdict.before, metrics=METRICS[:3], values=verdict.before.values[:, :, :3])
    assert [change.metric for change in Verdict(older, verdict.after).changes] == [
        "prompt",
        "identity",
        "oracle_prompt",
    ]


def test_the_table_has_kinds_and_metrics() -> None:
    shown = refusing().table()
    assert list(shown.columns) == ["prompt", "identity", "prompt shown*", "fully right*"]
    assert parts(shown.rows[1].cells[0]) == ("0.600 → 0.650", "+0.050 [no spread]")
    assert parts(shown.rows[1].cells[3])[0] == "10 of 12 → 1 of 12"
