import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from customized_grpo.page.formats import summary
from customized_grpo.store.scores import (
    Estimate,
    Scores,
    change,
    finite_mean,
    level,
    read_scores,
    since_first,
    worst_gain,
    write_scores,
    write_table,
)
from store.tables import BASE, SUBJECTS, TASKS, table


def small(values: np.ndarray, subjects: tuple[str, ...]) -> Scores:
    names = tuple(f"t{n}" for n in range(len(subjects)))
    return Scores(values, ("prompt",), ("prompt",), names, subjects, ("",) * len(names), ("",) * len(names))


# The table


def test_a_table_of_images_is_a_file_for_other_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    scores = small(np.array([[[1.0], [2.0]], [[3.0], [math.nan]]]), ("x", "y"))
    file = write_table(tmp_path / "scores", scores, [{"image": f"{n}.png"} for n in range(4)])
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    assert {row["prompt_text"] for row in rows} == {""}, "the metric called prompt does not hide the text"
    assert [(r["task"], r["n"], r["prompt"], r["image"]) for r in rows] == [
        ("t0", "0", "1.0", "0.png"), ("t0", "1", "3.0", "1.png"), ("t1", "0", "2.0", "2.png"), ("t1", "1", "", "3.png"),
    ]  # fmt: skip


def test_a_task_is_the_mean_of_its_scored_replicates() -> None:
    found = small(np.array([[[1.0], [math.nan], [2.0]], [[3.0], [math.nan], [math.nan]]]), ("x", "y", "z"))
    np.testing.assert_array_equal(found.per_task("prompt"), [2.0, math.nan, 2.0])
    assert np.isnan(found.per_task("other")).all()


def test_some_tasks_are_selected() -> None:
    chosen = table(3, BASE, 2 * BASE).select([False, True, False, True, False])
    assert (chosen.tasks, chosen.subjects, chosen.iteration) == (("a-1", "b-1"), ("a", "b"), 3)
    np.testing.assert_array_equal(chosen.column("identity"), [[0.4, 0.8]])


def test_the_worst_gain_is_the_smallest_in_standard_deviations() -> None:
    spread = np.std(BASE)
    before = table(0, BASE, 2 * BASE)
    assert worst_gain(before, table(1, BASE + 0.1, 2 * BASE + 0.1)) == pytest.approx(0.1 / (2 * spread))
    assert worst_gain(before, table(1, BASE - 0.1, 2 * BASE + 0.1)) == pytest.approx(-0.1 / spread)
    assert math.isnan(worst_gain(table(0, [0] * 5, [0] * 5), before)), "without spread there is no unit"


def test_means_are_over_what_could_be_scored() -> None:
    found = table(0, [1, math.nan, 2, 6, math.nan], [math.nan] * 5)
    assert found.means() == pytest.approx({"prompt": 3.0, "identity": math.nan}, nan_ok=True)
    assert (found.unscored("prompt"), found.unscored("identity"), table(0, BASE, BASE).unscored("prompt")) == (2, 5, 0)
    assert summary(found) == "prompt 3.000 (2 of 5 unscored)  identity nan (5 of 5 unscored)"


def test_the_mean_of_nothing_is_undefined() -> None:
    values = np.array([[1.0, math.nan, math.inf], [3.0, math.nan, 5.0]])
    np.testing.assert_array_equal(finite_mean(values, axis=0), [2.0, math.nan, 5.0])
    assert finite_mean(values) == 3


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"metrics": ("prompt",)}, r"expected values of shape \(replicates, 5, 1\), got \(1, 5, 2\)"),
        ({"tasks": TASKS[:4]}, r"\(replicates, 4, 2\)"),
        ({"kinds": ("scene",)}, "a subject, a kind and a prompt for each of 5 tasks"),
    ],
)
def test_a_table_whose_parts_do_not_fit_is_refused(changed: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(table(0, BASE, BASE), **changed)


# The file


def test_scores_are_written_and_read_with_what_is_missing(tmp_path: Path) -> None:
    values = np.float32(np.random.default_rng(0).normal(size=(2, 5, 3))).astype(float)
    values[0, 0, 1] = math.nan
    kinds = ("scene", "", "accessory", "scene", "")
    made = Scores(values, ("a", "b", "c"), ("b",), TASKS, SUBJECTS, kinds, tuple("vwxyz"), 7)
    found = read_scores(write_scores(tmp_path / "new" / "e.json", made))
    np.testing.assert_array_equal(found.values, values)
    assert replace(found, values=values) == replace(made, values=values)
    text = (tmp_path / "new" / "e.json").read_text()
    assert "NaN" not in text, "which is no JSON"
    assert json.loads(text)["format"] == 1


EARLIER = {
    "iteration": 3, "metrics": ["prompt", "identity"], "rewards": ["prompt"], "values": [[[0.5, None], [0.25, 1]]],
    "tasks": [{"id": "e0", "subject": "s0", "prompt": "a cat"}, {"id": "e1", "subject": "s1", "prompt": "a dog"}],
}  # fmt: skip


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps(EARLIER))
    found = read_scores(tmp_path / "e.json")
    np.testing.assert_array_equal(found.values, [[[0.5, math.nan], [0.25, 1]]])
    assert (found.iteration, found.metrics, found.rewards) == (3, ("prompt", "identity"), ("prompt",))
    assert (found.tasks, found.subjects, found.prompts) == (("e0", "e1"), ("s0", "s1"), ("a cat", "a dog"))
    assert found.kinds == ("", "")
    bare = {**EARLIER, "tasks": [{"id": "e0"}, {"id": "e1"}]}
    (tmp_path / "e.json").write_text(json.dumps({key: bare[key] for key in bare if key != "rewards"}))
    found = read_scores(tmp_path / "e.json")
    assert (found.subjects, found.rewards) == (("e0", "e1"), ("prompt", "identity"))


def test_earlier_versions_can_read_the_file(tmp_path: Path) -> None:
    """They took the keys of EARLIER and no notice of others."""
    (tmp_path / "e.json").write_text(json.dumps(EARLIER))
    content = json.loads(write_scores(tmp_path / "e.json", read_scores(tmp_path / "e.json")).read_text())
    content["tasks"] = [{key: task[key] for key in ("id", "subject", "prompt")} for task in content["tasks"]]
    assert {key: content[key] for key in EARLIER} == EARLIER


@pytest.mark.parametrize(
    "content",
    [None, [], {}, {**EARLIER, "values": 1}, {**EARLIER, "tasks": ["a", "b"]}, {**EARLIER, "values": [[[1, 2]]]},
     {**EARLIER, "iteration": "x"}, {**EARLIER, "format": 2}],
)  # fmt: skip
def test_a_damaged_or_later_file_is_a_value_error(tmp_path: Path, content: object) -> None:
    (tmp_path / "e.json").write_text(json.dumps(content))
    with pytest.raises(ValueError):  # noqa: PT011 - the sentences differ
        read_scores(tmp_path / "e.json")


def test_kinds_are_parts_of_the_table() -> None:
    found = replace(table(0, BASE, BASE), kinds=("a", "b", "a", "", "b"))
    assert found.distinct_kinds() == ["a", "b", ""]
    assert table(0, BASE, BASE).distinct_kinds() == []
    part = found.of_kind("b")
    assert (part.tasks, part.subjects, part.kinds) == (("a-1", "c-0"), ("a", "c"), ("b", "b"))
    np.testing.assert_array_equal(part.per_task("prompt"), [0.2, 0.5])


# Intervals


def test_images_are_counted_where_a_task_is_scored_twice() -> None:
    first = replace(table(0, BASE, BASE), values=np.array([[[1, 0]] * 5, [[1, math.nan]] * 5]))
    after = table(1, [1, 0.5, 0, math.nan, 1], BASE)
    moved = change(first, after, "prompt")
    assert (moved.complete, moved.images) == ((8, 2), (8, 4))
    assert change(first, after, "identity").images == (5, 5)


def test_an_interval_around_a_share_is_of_shares() -> None:
    """Half of the subjects lost all and half gained all: the change is uncertain by more than the level can be."""
    first, last = table(0, [1, 1, 0, 0, 0], BASE), table(1, [0, 0, 1, 1, 0], BASE)
    moved = change(first, last, "prompt").difference
    assert 0.4 + moved.low < 0
    assert since_first([first, last], "prompt")[1].low == 0
    wide = [replace(s, values=3 * s.values) for s in (first, last)]
    assert since_first(wide, "prompt")[1].low == pytest.approx(3 * (0.4 + moved.low)), "no share"


def test_a_bound_that_rounding_keeps_from_zero_is_zero() -> None:
    moved = change(table(0, BASE, BASE), table(1, BASE + np.array([0, 0, 0, 0, 0.3]), BASE), "prompt").difference
    assert moved.low == 0


def test_a_change_is_paired_over_the_tasks_scored_twice() -> None:
    before = table(0, BASE, [math.nan, 1, 2, 3, 4])
    after = table(5, BASE + 0.25, [9, 2, math.nan, 5, 7])
    moved = change(before, after, "prompt")
    assert moved.difference == pytest.approx((0.25, 0.25, 0.25))
    assert moved.difference.verdict == "rose"
    moved = change(before, after, "identity")
    assert (moved.tasks, moved.subjects, moved.unscored) == (3, 3, 2)
    assert moved.before.value == pytest.approx((1 + 3 + 4) / 3)
    assert moved.after.value == pytest.approx((2 + 5 + 7) / 3)
    assert moved.difference.value == pytest.approx(2.0)


def test_a_change_pairs_tasks_by_name_not_by_place() -> None:
    before, after = table(0, BASE, BASE), table(1, BASE, BASE)
    turned = replace(after, tasks=TASKS[::-1], subjects=SUBJECTS[::-1], values=after.values[:, ::-1] + 0.5)
    assert change(before, turned, "prompt").difference == pytest.approx((0.5, 0.5, 0.5))


def test_intervals_resample_subjects() -> None:
    # The third of three subjects, with one task of the five, gained 3. A resample leaves it out with probability
    # (2/3)^3 = 30 %, so the interval reaches 0; it holds nothing else with 1/27 = 4 %, so the interval reaches 3.
    moved = change(table(0, BASE, BASE), table(1, BASE + np.array([0, 0, 0, 0, 3]), BASE), "prompt").difference
    assert moved == pytest.approx((3 / 5, 0, 3), abs=1e-6)
    assert moved.verdict == "unclear"


def test_an_interval_that_touches_zero_is_unclear() -> None:
    assert Estimate(0.6, 2e-8, 3.0).verdict == Estimate(-0.6, -3.0, -2e-8).verdict == "unclear"
    assert Estimate(2e-8, 2e-8, 2e-8).verdict == "rose"
    assert Estimate(1.0, math.nan, math.nan).verdict == "unclear"


def test_one_subject_has_no_interval() -> None:
    one = small(np.array([[[1.0], [2.0]]]), ("s", "s"))
    assert level(one, "prompt").value == 1.5
    assert math.isnan(level(one, "prompt").low)
    assert change(one, one, "prompt").difference.verdict == "unclear"


def test_bars_since_the_first_evaluation_are_those_of_the_paired_change() -> None:
    first, last = table(0, BASE, BASE), table(4, BASE + np.array([0.1, 0.1, 0.3, 0.3, 0.2]), BASE)
    start, end = since_first([first, last], "prompt")
    moved = change(first, last, "prompt")
    assert start.value == pytest.approx(0.3)
    assert math.isnan(start.low)
    assert end == pytest.approx([0.3 + x for x in moved.difference])
    assert since_first([first], "prompt") == [level(first, "prompt")]
    assert since_first([], "prompt") == []
