import io
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import fakes
from customized_grpo.cli.display import show_scores, show_verdict
from customized_grpo.data.images import to_tensor
from customized_grpo.errors import UserError
from customized_grpo.page.formats import summary
from customized_grpo.policies.contract import batches
from customized_grpo.randomness import normal
from customized_grpo.store.scores import Scores, read_scores, write_scores
from customized_grpo.studies.report.verdict import Verdict
from customized_grpo.train import evaluation as evaluations
from customized_grpo.train.evaluation import Evaluation, evaluate
from customized_grpo.train.rollout import sample_ode
from customized_grpo.train.settings import EvaluationSettings
from store.tables import by_kind, ones

REWARDS = {"red": fakes.red}
METRICS = {"dark": fakes.dark}


def run(policy, batch: int = 48, iteration: int = 0, count: int = 5) -> Evaluation:
    settings = EvaluationSettings(replicates=2, batch=batch, grid_rows=2)
    return evaluate(policy, fakes.examples(count), REWARDS, METRICS, settings, 4, iteration)


def table(policy=None, **options) -> Scores:
    return run(policy or fakes.LinearPolicy(), **options).scores


def test_noise_is_fixed_whatever_the_batches_and_the_company() -> None:
    whole = table().values
    assert whole.shape == (2, 5, 2)
    np.testing.assert_allclose(whole, table(batch=3).values, rtol=0, atol=1e-6)
    np.testing.assert_allclose(whole[:, :3], table(count=3).values, rtol=0, atol=1e-6)
    assert not np.array_equal(whole[0], whole[1])


def test_scores_are_float32_numbers_in_float64() -> None:
    values = table().values
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, values.astype(np.float32))


def test_memory_that_runs_out_says_what_to_lower() -> None:
    class Full(fakes.LinearPolicy):
        def decode(self, latents, conditioning):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with pytest.raises(UserError, match=r"on cpu .*lower evaluation\.batch"):
        table(Full())


def test_global_draws_repeat_and_differ_between_pictures() -> None:
    class Drawing(fakes.LinearPolicy):
        def decode(self, latents, conditioning):
            drawn.append(float(torch.rand(())))
            return super().decode(latents, conditioning)

    drawn: list[float] = []
    for _ in range(2):
        table(Drawing(), batch=1, count=3)
    assert drawn[:6] == drawn[6:]
    assert len(set(drawn)) == 6


def test_another_runs_scores_are_taken_over_as_they_are(tmp_path: Path) -> None:
    made = table()
    made.values[0, 0, 1] = math.nan
    write_scores(tmp_path / "e.json", made)
    loaded = evaluations.reuse(tmp_path / "e.json", fakes.examples(5), ["red", "dark"], 2)
    np.testing.assert_array_equal(loaded.scores.values, made.values)
    write_scores(tmp_path / "copy.json", loaded.scores)
    assert (tmp_path / "copy.json").read_text() == (tmp_path / "e.json").read_text()
    assert read_scores(tmp_path / "e.json").rewards == ("red",)
    assert (loaded.examples, loaded.images.shape) == ((), (0,))


def test_what_could_not_be_scored_is_counted_and_is_no_zero() -> None:
    def some(images, examples):
        return torch.where(torch.tensor([example.id == "e1" for example in examples]), math.nan, 0.5)

    settings = EvaluationSettings(replicates=2, grid_rows=0)
    never = {"some": some, "none": lambda images, examples: torch.full((len(images),), math.nan)}
    found = evaluate(fakes.LinearPolicy(), fakes.examples(5), REWARDS, never, settings, 4, 0).scores
    assert found.means()["some"] == 0.5
    red = found.means()["red"]
    assert summary(found) == f"red {red:.3f}  some 0.500 (2 of 10 unscored)  none nan (10 of 10 unscored)"
    changes = evaluations.changes(found, found)
    assert [(change.metric, change.tasks, change.unscored) for change in changes] == [("red", 5, 0), ("some", 4, 1)]
    assert changes[1].before.value == 0.5
    console = Console(record=True, width=200)
    show_verdict(console, Verdict(found, found))
    assert "some (not trained on) (1 of 5 tasks unscored)" in console.export_text()


def test_targets_say_how_near_to_the_reference_the_prompt_permits(tmp_path: Path) -> None:
    """Only of the base policy, only in metrics of identity, and NaN without a target."""
    examples = [replace(e, target=Image.new("RGB", (8, 8), (51 * n, 0, 0)) if n < 4 else None)
                for n, e in enumerate(fakes.examples(5))]  # fmt: skip
    settings, metrics = EvaluationSettings(replicates=2, batch=4), {"identity": fakes.red}
    policy, rewards = fakes.LinearPolicy(), {"prompt": fakes.dark}
    base, later = (evaluate(policy, examples, rewards, metrics, settings, 4, n).scores for n in (0, 1))
    expected = np.stack([np.full(5, np.nan), [0, 0.2, 0.4, 0.6, np.nan]], axis=1)
    assert later.permitted is None
    np.testing.assert_array_equal(base.values, later.values)
    write_scores(tmp_path / "base.json", base)
    for found in (base, read_scores(tmp_path / "base.json")):
        assert found.permitted is not None
        np.testing.assert_allclose(found.permitted, expected, rtol=1e-6)
    kept = base.select([False, True, True, False, False]).permitted
    np.testing.assert_allclose(kept, expected[1:3], rtol=1e-6)
    reused = evaluations.reuse(tmp_path / "base.json", examples, ["prompt", "identity"], 2).scores.permitted
    np.testing.assert_allclose(reused, expected, rtol=1e-6)


def test_the_grid_shows_the_first_replicate_of_the_first_examples() -> None:
    made = run(fakes.LinearPolicy())
    shown, examples = made.images, fakes.examples(2)
    assert shown.shape == (2, 3, 2, 2)
    np.testing.assert_allclose(fakes.red(shown, examples), made.scores.values[0, :2, 0], rtol=1e-6)
    assert [example.id for example in made.examples] == ["e0", "e1", "e2", "e3", "e4"]
    others = torch.stack([to_tensor(Image.open(io.BytesIO(content))) for content in made.small])
    expected = made.scores.values[0, 2:, 0]
    np.testing.assert_allclose(fakes.red(others, fakes.examples(3)), expected, atol=0.05)
    none = evaluate(fakes.LinearPolicy(), examples, REWARDS, {}, EvaluationSettings(replicates=1, grid_rows=0), 4, 0)
    assert (none.images.shape, none.examples, none.small, none.marks) == ((0,), (), (), ())


def test_a_metric_marks_what_is_right_in_the_images_that_are_kept() -> None:
    class Marking:
        def __call__(self, images, examples):
            return fakes.dark(images, examples)

        def marks(self, images, examples):
            assert images.shape == (1, 3, 2, 2)
            return [{example.id: True} for example in examples]

    settings = EvaluationSettings(replicates=2, grid_rows=2)
    made = evaluate(fakes.LinearPolicy(), fakes.examples(5), REWARDS, {"m": Marking()}, settings, 4, 0)
    assert made.marks == tuple({f"e{n}": True} for n in range(5))
    assert run(fakes.LinearPolicy()).marks == ({},) * 5


def test_an_evaluation_and_a_verdict_are_printed_by_kind() -> None:
    console, spread = Console(record=True, width=200), np.linspace(0.4, 0.6, 12)
    before, after = (by_kind(n, ("prompt", "identity", "oracle_right"), scene=[spread, spread, ones(5 + n, 12)],
                             colour=[spread, spread + n / 10, ones(8 - 6 * n, 12)]) for n in (0, 1))  # fmt: skip
    show_scores(console, "held-out, iteration   1", after)
    show_verdict(console, Verdict(before, after))
    said = console.export_text()
    assert "\n  scene   prompt 0.500  identity 0.500  fully right 6 of 12\n" in said
    assert "\n  colour  prompt 0.500  identity 0.600  fully right 2 of 12\n" in said
    assert "\nWorst kind, colour: fully right 8 of 12 → 2 of 12 images.\n" in said
    assert "colour (12 subjects)" in said
    assert "! colour got worse: fully right 8 of 12 → 2 of 12 images" in said


def test_noise_depends_on_the_seed_the_example_and_the_replicate() -> None:
    policy, (first, second) = fakes.LinearPolicy(), fakes.examples(2)
    settings = EvaluationSettings(seed=3, replicates=2)
    found = evaluate(policy, [first, second], REWARDS, {}, settings, 4, 0).scores.values
    noise = normal((fakes.TOKENS, fakes.CHANNELS), [("evaluation", 3, second.id, 1)])
    alone = sample_ode(policy, policy.encode([second]), noise, 4)
    np.testing.assert_allclose(found[1, 1], fakes.red(alone, [second]), rtol=1e-6)


def test_batches_hold_whole_groups_of_replicates_of_one_shape() -> None:
    class TwoShapes(fakes.LinearPolicy):
        def shape_key(self, example):
            return example.id in ("e1", "e3")

    examples, tasks = fakes.examples(5), [(replicate, index) for index in range(5) for replicate in range(2)]
    made = batches(TwoShapes(), tasks, 4, lambda task: examples[task[1]])
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
        np.testing.assert_allclose(whole.scores.values, alone.scores.values, rtol=0, atol=1e-6)
        torch.testing.assert_close(whole.images, alone.images, rtol=0, atol=1e-6)
        assert whole.small == alone.small


@pytest.mark.parametrize(
    ("count", "metrics", "replicates"), [(4, ["red", "dark"], 2), (5, ["red"], 2), (5, ["red", "dark"], 3)]
)
def test_an_evaluation_of_something_else_is_not_reused(tmp_path: Path, count, metrics, replicates) -> None:
    path = tmp_path / "not" / "there" / "yet.json"
    write_scores(path, table())
    assert evaluations.reuse(path, fakes.examples(5), ["red", "dark"], 2).images.shape == (0,)
    with pytest.raises(UserError, match="has other tasks, metrics or replicates"):
        evaluations.reuse(path, fakes.examples(count), metrics, replicates)


@pytest.mark.parametrize("text", [None, "", "{}", "[1]"])
def test_a_damaged_evaluation_is_one_sentence(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "e.json").write_text(text)
    with pytest.raises(UserError, match=r"e.json' is missing or damaged"):
        evaluations.reuse(tmp_path / "e.json", fakes.examples(5), ["red", "dark"], 2)


def test_changes_pair_tasks_and_know_their_sign() -> None:
    before = table()
    better = fakes.LinearPolicy()
    with torch.no_grad():
        better.module.bias[0] -= 0.3
    change = evaluations.changes(before, table(better, iteration=1))[0]
    assert change.metric == "red"
    assert 0 < change.difference.low <= change.difference.value <= change.difference.high
    same = evaluations.changes(before, table())[0]
    assert same.difference == pytest.approx((0, 0, 0), abs=1e-6)


def test_changes_are_of_what_both_have() -> None:
    before, after = table(), table(count=3)
    after = replace(after, metrics=("red", "new"))
    found = evaluations.changes(before, after)
    assert [(change.metric, change.tasks) for change in found] == [("red", 3)]


def test_one_subject_alone_has_no_interval() -> None:
    before, after = (table(iteration=n, count=1) for n in (0, 1))
    change = evaluations.changes(before, after)[0].difference
    assert change.value == 0
    assert math.isnan(change.low)
    assert math.isnan(change.high)


def test_the_table_knows_its_tasks() -> None:
    found = table()
    assert found.subjects == ("s0", "s1", "s2", "s0", "s1")
    assert (found.metrics, found.rewards) == (("red", "dark"), ("red",))
    assert found.tasks == ("e0", "e1", "e2", "e3", "e4")
    assert found.prompts == tuple(example.prompt for example in fakes.examples(5))
    assert found.kinds == ("",) * 5
    asked = [SimpleNamespace(id="x", prompt="p", subject="s", kind=kind) for kind in ("scene", None)]
    values = np.zeros((1, 2, 1))
    made = evaluations.tabulate(values, asked, ["red"], ["red"], 3)  # pyright: ignore[reportArgumentType]
    assert (made.kinds, made.iteration) == (("scene", ""), 3)


def test_a_cluster_is_the_subject_or_the_example_alone() -> None:
    (example,) = fakes.examples(1)
    assert evaluations.cluster(example) == "s0"
    assert evaluations.cluster(replace(example, subject="")) == "e0"
    numbered = SimpleNamespace(subject_id=7, subject="dog", id="e0")
    assert evaluations.cluster(numbered) == "7"  # pyright: ignore[reportArgumentType]


def test_images_are_evaluated_with_the_evaluations_own_guidance_and_size() -> None:
    seen: list[dict] = []

    class Guided(fakes.LinearPolicy):
        @contextmanager
        def sampled_with(self, **settings):
            seen.append(settings)
            yield
            seen.append({})

        def encode(self, examples):
            assert seen[-1], "outside"
            return super().encode(examples)

    used = {"guidance_scale": 2.0, "true_cfg_scale": None, "resolution": 512}
    settings = EvaluationSettings(examples=2, replicates=1, **used)
    evaluate(Guided(), fakes.examples(2), {"red": fakes.red}, {}, settings, 2, 0)
    assert seen == [used, {}]
    with pytest.raises(UserError, match=r"evaluation.guidance_scale is set, which LinearPolicy does not take; remove"):
        evaluate(fakes.LinearPolicy(), fakes.examples(2), {"red": fakes.red}, {}, settings, 2, 0)
