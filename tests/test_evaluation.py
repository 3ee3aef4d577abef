import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fakes
from customized_grpo import evaluation as evaluations
from customized_grpo.evaluation import Evaluation, EvaluationSettings, evaluate

REWARDS = {"red": fakes.red}
METRICS = {"dark": fakes.dark}


def run(policy, batch: int = 48, iteration: int = 0, count: int = 5) -> Evaluation:
    settings = EvaluationSettings(replicates=2, batch=batch, grid_rows=2)
    return evaluate(policy, fakes.examples(count), REWARDS, METRICS, settings, 4, iteration)


def test_noise_is_fixed_whatever_the_batches_and_the_company() -> None:
    whole, pieces = run(fakes.LinearPolicy()), run(fakes.LinearPolicy(), batch=3)
    assert whole.values.shape == (2, 5, 2)
    torch.testing.assert_close(whole.values, pieces.values, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.values[:, :3], run(fakes.LinearPolicy(), count=3).values, rtol=0, atol=1e-6)
    assert not torch.equal(whole.values[0], whole.values[1])


def test_scores_are_saved_and_loaded_with_what_is_missing(tmp_path: Path) -> None:
    made = run(fakes.LinearPolicy())
    made.values[0, 0, 1] = math.nan
    made.save(tmp_path / "e.json")
    loaded = evaluations.reuse(tmp_path / "e.json", fakes.examples(5), ["red", "dark"], 2)
    torch.testing.assert_close(loaded.values, made.values, equal_nan=True, rtol=0, atol=0)
    assert loaded.metrics == ("red", "dark")
    assert loaded.rewards == ("red",)


def test_changes_pair_tasks_and_know_their_sign() -> None:
    before = run(fakes.LinearPolicy())
    better = fakes.LinearPolicy()
    with torch.no_grad():
        better.module.bias[0] -= 0.3
    change = evaluations.changes(before.scores(), run(better, iteration=1).scores())[0]
    assert change.metric == "red"
    assert 0 < change.difference.low <= change.difference.value <= change.difference.high
    same = evaluations.changes(before.scores(), run(fakes.LinearPolicy()).scores())[0]
    assert same.difference == pytest.approx((0, 0, 0), abs=1e-6)


def test_changes_are_of_what_both_have() -> None:
    before, after = run(fakes.LinearPolicy()).scores(), run(fakes.LinearPolicy(), count=3).scores()
    after = replace(after, metrics=("red", "new"))
    found = evaluations.changes(before, after)
    assert [(change.metric, change.tasks) for change in found] == [("red", 3)]


def test_one_subject_alone_has_no_interval() -> None:
    before, after = (run(fakes.LinearPolicy(), iteration=n, count=1) for n in (0, 1))
    change = evaluations.changes(before.scores(), after.scores())[0].difference
    assert change.value == 0
    assert math.isnan(change.low)
    assert math.isnan(change.high)


def test_the_table_knows_whose_picture_it_is() -> None:
    table = run(fakes.LinearPolicy()).table()
    assert table.clusters == ("s0", "s1", "s2", "s0", "s1")
    assert table.values.shape == (2, 5, 2)
