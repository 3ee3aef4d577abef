import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fakes
from customized_grpo import evaluation as evaluations
from customized_grpo.display import show_changes
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


def test_what_could_not_be_scored_is_counted_and_is_no_zero() -> None:
    def some(images, examples):
        return torch.where(torch.tensor([example.id == "e1" for example in examples]), math.nan, 0.5)

    settings = EvaluationSettings(replicates=2, grid_rows=0)
    never = {"some": some, "none": lambda images, examples: torch.full((len(images),), math.nan)}
    found = evaluate(fakes.LinearPolicy(), fakes.examples(5), REWARDS, never, settings, 4, 0)
    assert found.means()["some"] == 0.5
    red = found.means()["red"]
    assert found.summary() == f"red {red:.3f}  some 0.500 (2 of 10 unscored)  none nan (10 of 10 unscored)"
    changes = evaluations.changes(found.scores(), found.scores())
    assert [(change.metric, change.tasks, change.unscored) for change in changes] == [("red", 5, 0), ("some", 4, 1)]
    assert changes[1].before.value == 0.5
    console = Console(record=True, width=200)
    show_changes(console, changes, ["red"])
    assert "some (not trained on) (1 of 5 tasks unscored)" in console.export_text()


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
