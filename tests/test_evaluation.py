import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

import fakes
from customized_grpo import evaluation as evaluations
from customized_grpo.display import show_changes
from customized_grpo.errors import UserError
from customized_grpo.evaluation import Evaluation, EvaluationSettings, batches, evaluate
from customized_grpo.randomness import normal
from customized_grpo.report.record import read_evaluation
from customized_grpo.rollout import sample_ode

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
    assert "NaN" not in (tmp_path / "e.json").read_text(), "which is no JSON"
    found, made = read_evaluation(tmp_path / "e.json"), made.scores()
    assert (found.iteration, found.metrics, found.rewards) == (made.iteration, made.metrics, made.rewards)
    assert (found.tasks, found.subjects) == (made.tasks, made.subjects)
    np.testing.assert_array_equal(found.values, made.values)


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


def test_the_grid_shows_the_first_replicate_of_the_first_examples() -> None:
    made = run(fakes.LinearPolicy())
    shown, examples = made.images, fakes.examples(2)
    assert shown.shape == (2, 3, 2, 2)
    torch.testing.assert_close(fakes.red(shown, examples), made.values[0, :2, 0])
    nothing = EvaluationSettings(replicates=1, grid_rows=0)
    assert evaluate(fakes.LinearPolicy(), examples, REWARDS, {}, nothing, 4, 0).images.shape == (0,)


def test_noise_depends_on_the_seed_the_example_and_the_replicate() -> None:
    policy, (first, second) = fakes.LinearPolicy(), fakes.examples(2)
    settings = EvaluationSettings(seed=3, replicates=2)
    found = evaluate(policy, [first, second], REWARDS, {}, settings, 4, 0).values
    noise = normal((fakes.TOKENS, fakes.CHANNELS), [("evaluation", 3, second.id, 1)])
    alone = sample_ode(policy, policy.encode([second]), noise, 4)
    torch.testing.assert_close(found[1, 1], fakes.red(alone, [second]))


def test_batches_hold_whole_groups_of_replicates_of_one_shape() -> None:
    class TwoShapes(fakes.LinearPolicy):
        def shape_key(self, example):
            return example.id in ("e1", "e3")

    tasks = [(replicate, index) for index in range(5) for replicate in range(2)]
    made = batches(TwoShapes(), fakes.examples(5), tasks, 4)
    assert made == [[(0, 0), (1, 0), (0, 2), (1, 2)], [(0, 4), (1, 4)], [(0, 1), (1, 1), (0, 3), (1, 3)]]


@pytest.mark.parametrize(("batch", "replicates", "sizes"), [(5, 2, [4, 4, 2]), (1, 2, [1] * 10), (48, 3, [15])])
def test_a_batch_is_as_large_as_set_or_as_whole_groups_are(batch: int, replicates: int, sizes: list[int]) -> None:
    seen: list[int] = []

    def count(images, examples):
        seen.append(len(images))
        return fakes.red(images, examples)

    settings = EvaluationSettings(replicates=replicates, batch=batch)
    evaluate(fakes.LinearPolicy(), fakes.examples(5), {"count": count}, {}, settings, 4, 0)
    assert seen == sizes


def test_processes_share_the_batches_and_all_get_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, parts, seen = run(fakes.LinearPolicy()), [], []

    def first_pass(accelerator: object, part: object) -> list:
        parts.append(part)
        raise InterruptedError

    def evaluate_on(rank: int) -> Evaluation:
        seen.append(policy := fakes.LinearPolicy())
        process = SimpleNamespace(process_index=rank, num_processes=2)
        settings = EvaluationSettings(replicates=2, batch=2, grid_rows=2)
        return evaluate(policy, fakes.examples(5), REWARDS, METRICS, settings, 4, 0, process)

    monkeypatch.setattr(evaluations, "fail_together", lambda accelerator: nullcontext())
    monkeypatch.setattr(evaluations, "gather_objects", first_pass)
    for rank in (0, 1):
        with pytest.raises(InterruptedError):
            evaluate_on(rank)
    assert [policy.encoded for policy in seen] == [6, 4]
    monkeypatch.setattr(evaluations, "gather_objects", lambda accelerator, part: parts)
    for rank in (0, 1):
        whole = evaluate_on(rank)
        torch.testing.assert_close(whole.values, alone.values, rtol=0, atol=1e-6)
        torch.testing.assert_close(whole.images, alone.images, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "metrics", "replicates"), [(4, ["red", "dark"], 2), (5, ["red"], 2), (5, ["red", "dark"], 3)]
)
def test_an_evaluation_of_something_else_is_not_reused(tmp_path: Path, count, metrics, replicates) -> None:
    path = tmp_path / "not" / "there" / "yet.json"
    run(fakes.LinearPolicy()).save(path)
    assert evaluations.reuse(path, fakes.examples(5), ["red", "dark"], 2).images.shape == (0,)
    with pytest.raises(UserError, match="of other tasks, metrics or replicates"):
        evaluations.reuse(path, fakes.examples(count), metrics, replicates)


@pytest.mark.parametrize("text", [None, "", "{}", "[1]"])
def test_a_damaged_evaluation_is_one_sentence(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "e.json").write_text(text)
    with pytest.raises(UserError, match=r"e.json' is missing or damaged"):
        evaluations.reuse(tmp_path / "e.json", fakes.examples(5), ["red", "dark"], 2)


def test_means_are_over_what_could_be_scored() -> None:
    made = run(fakes.LinearPolicy(), count=2)
    made.values[..., 0] = torch.tensor([[1.0, math.nan], [2.0, 6.0]])
    assert made.means() == pytest.approx({"red": 3.0, "dark": float(made.values[..., 1].mean())})


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
    assert table.values.dtype == torch.float64
    assert table.metrics == ("red", "dark")
    assert table.tasks == ("e0", "e1", "e2", "e3", "e4")


def test_a_cluster_is_the_subject_or_the_example_alone() -> None:
    (example,) = fakes.examples(1)
    assert evaluations.cluster(example) == "s0"
    assert evaluations.cluster(replace(example, subject="")) == "e0"
    numbered = SimpleNamespace(subject_id=7, subject="dog", id="e0")
    assert evaluations.cluster(numbered) == "7"  # pyright: ignore[reportArgumentType]
