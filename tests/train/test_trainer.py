import errno
import json
import math
import os
import signal
import sys
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import fakes
from customized_grpo.assemble import resume_run
from customized_grpo.data import JsonlDataset
from customized_grpo.data.images import to_tensor
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.settings.parse import parse_config
from customized_grpo.store.run import RunFolder, read_run
from customized_grpo.store.scores import Scores, read_scores, write_scores
from customized_grpo.studies.report.remarks import remarks
from customized_grpo.studies.report.run import facts
from customized_grpo.train.evaluation import evaluate
from customized_grpo.train.method import SpreadGuard
from customized_grpo.train.objectives.grpo import Grpo
from customized_grpo.train.settings import TrainerConfig
from customized_grpo.train.trainer import Observer, Result, Trainer
from customized_grpo.train.update import Updater

QUICK = {
    "rollout": {"num_generations": 4, "num_inference_steps": 5},
    "training": {"iterations": 3, "prompts_per_iteration": 2, "optimizer": {"use": "AdamW", "lr": 1e-2}},
    "evaluation": {"examples": 2, "replicates": 1, "every": 2},
    "tracking": {"log_with": []},
}


def trainer(tmp_path: Path, *, policy=None, rewards=None, train=None, **sections) -> Trainer:
    tree = {name: {**QUICK.get(name, {}), **value} for name, value in {**QUICK, **sections}.items()}
    config = parse_config({**tree, "output": str(tmp_path / "run")}, TrainerConfig)
    rewards = rewards or {"prompt": fakes.red, "identity": fakes.dark}
    train = fakes.examples() if train is None else train
    return Trainer(policy or fakes.LinearPolicy(), rewards, train, fakes.examples(2), config)


def weights(policy: fakes.LinearPolicy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.module.parameters()])


def records(result: Result) -> list[dict]:
    return RunFolder(result.run).records()


def without_times(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(("seconds/", "memory/"))} for line in lines]


def test_a_run_trains_and_leaves_everything_behind(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    before = weights(made.policy)
    result = made.train()
    assert not torch.equal(before, weights(made.policy))
    assert [line["iteration"] for line in records(result)] == [1, 2, 3]
    assert records(result)[-1]["samples"] == 3 * 2 * 4
    assert [p.name for p in sorted((result.run / "evaluations").iterdir())] == [
        "iteration-000000.json", "iteration-000002.json", "iteration-000003.json",
    ]  # fmt: skip
    assert (result.run / "samples" / "over_training.png").is_file()
    assert (result.run / "checkpoints" / "iteration-000003" / "adapter" / "weights.safetensors").is_file()
    assert [change.metric for change in result.changes] == ["prompt", "identity"]
    assert json.loads((result.run / "run.json").read_text())["status"] == "finished"


def test_training_on_one_reward_raises_it(tmp_path: Path) -> None:
    sections = {
        "method": {"advantage": "weighted_sum", "time_weights": {"use": "constant", "weights": [1.0]}},
        "training": {**QUICK["training"], "iterations": 20},
    }
    result = trainer(tmp_path, rewards={"red": fakes.red}, **sections).train()
    assert result.changes[0].difference.value > 0.02


def test_all_examples_of_an_iteration_are_encoded_ahead_of_its_chunks(tmp_path: Path, monkeypatch) -> None:
    made, calls = trainer(tmp_path, rollout={"num_generations": 2, "chunk_prompts": 1}), []
    monkeypatch.setattr(made.policy, "encode_ahead", lambda examples: calls.append([x.id for x in examples]))
    collect = made._collect
    monkeypatch.setattr(
        made, "_collect", lambda n, chunk, plan: calls.append(chunk[0][1].id) or collect(n, chunk, plan)
    )
    made.train()
    assert calls[0] == calls[1:3]
    assert len(calls) == 3 * 3


def test_the_first_ratio_is_exactly_one_in_the_rollouts_own_batches(tmp_path: Path) -> None:
    assert [line["update/first_ratio_error"] for line in records(trainer(tmp_path).train())] == [0.0] * 3


@pytest.mark.parametrize(
    "change",
    [{"rollout": {"chunk_prompts": 1}}, {"training": {"micro_batch": 2}}],
    ids=["one prompt per chunk", "small micro-batches"],
)
def test_batching_changes_the_memory_not_the_result(tmp_path: Path, change: dict) -> None:
    one, other = trainer(tmp_path / "a"), trainer(tmp_path / "b", **change)
    one.train()
    other.train()
    torch.testing.assert_close(weights(one.policy), weights(other.policy), rtol=0, atol=1e-5)


def test_equal_seeds_give_equal_runs_and_other_seeds_do_not(tmp_path: Path) -> None:
    runs = [trainer(tmp_path / str(i)) for i in range(2)]
    lines = [without_times(records(run.train())) for run in runs]
    assert lines[0] == lines[1]
    other = trainer(tmp_path / "other")
    other.config = other.config.model_copy(update={"seed": 1})
    assert without_times(records(other.train())) != lines[0]


def test_groups_are_kept_without_changing_a_number(tmp_path: Path) -> None:
    """Of the first iteration, the second, which is evaluated, and the last; in the order of the update's rows."""
    seen, plain = trainer(tmp_path / "a"), trainer(tmp_path / "b", evaluation={"grid_rows": 0})
    results = [made.train() for made in (seen, plain)]
    assert torch.equal(*(weights(made.policy) for made in (seen, plain)))
    assert without_times(records(results[0])) == without_times(records(results[1]))
    folder = results[0].run / "samples" / "groups"
    names = [path.name for path in sorted(folder.glob("*.json"))]
    assert names == [f"iteration-00000{n}.json" for n in (1, 2, 3)]
    content = json.loads((folder / names[0]).read_text())
    assert content["rewards"] == ["prompt", "identity"]
    rewards = np.array([[image["rewards"] for image in group["images"]] for group in content["groups"]])
    assert rewards.shape == (2, 4, 2)
    assert rewards.mean((0, 1))[0] == pytest.approx(records(results[0])[0]["reward/prompt/mean"])
    z = np.array([image["z"] for image in content["groups"][1]["images"]])
    np.testing.assert_allclose(z, (rewards[1] - rewards[1].mean(0)) / rewards[1].std(0, ddof=1), atol=1e-4)
    for group in content["groups"]:
        for image in group["images"]:
            assert len(image["advantages"]) == 2, "of the trained steps"
            with Image.open(folder / image["file"]) as stored:
                assert np.asarray(stored.convert("RGB"))[..., 0].mean() / 255 == pytest.approx(
                    image["rewards"][0], abs=0.03
                )


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_resume_is_exact(tmp_path: Path, ema: float) -> None:
    training = {**QUICK["training"], "ema_decay": ema, "iterations": 4}
    straight = trainer(tmp_path / "straight", training=training, checkpoint={"every": 1})
    whole = straight.train()

    class StopAfterTwo(Observer):
        def on_iteration(self, record) -> None:
            first.stop_requested = record["iteration"] == 2

    first = trainer(tmp_path / "halves", training=training, checkpoint={"every": 1})
    assert first.train(StopAfterTwo()).interrupted
    second = trainer(tmp_path / "halves", training=training, checkpoint={"every": 1})
    resumed = second.train(resume=RunFolder.existing(tmp_path / "halves" / "run"))
    assert torch.equal(weights(straight.policy), weights(second.policy))
    assert without_times(records(whole)) == without_times(records(resumed))
    assert whole.changes == resumed.changes


def test_time_weights_are_looked_up_at_the_true_steps(tmp_path: Path) -> None:
    seen = []
    made = trainer(tmp_path, rollout={**QUICK["rollout"], "steps": {"use": "random_fraction", "fraction": 0.5}})
    look_up = made.method.time_weights
    made.method.time_weights = lambda progress: seen.append(progress) or look_up(progress)
    made.train()
    steps = {round(float(p) * 5) for progress in seen for p in progress}
    assert all(len(progress) == 2 for progress in seen)
    assert steps <= {0, 1, 2, 3}
    assert len(steps) > 2


def test_each_prompt_is_encoded_once_per_iteration(tmp_path: Path) -> None:
    made = trainer(tmp_path, evaluation={"examples": 0})
    before = []

    class Counting(Observer):
        def on_start(self, summary) -> None:
            before.append(made.policy.encoded)

    made.train(Counting())
    assert made.policy.encoded - before[0] == 3 * 2


def test_the_kl_term_is_zero_at_first_and_grows(tmp_path: Path) -> None:
    lines = records(trainer(tmp_path, method={"beta": 0.1}).train())
    assert lines[0]["update/kl"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["update/kl"] > lines[0]["update/kl"]


def test_recomputed_log_probs_hide_the_batching(tmp_path: Path) -> None:
    class Rounding(fakes.LinearPolicy):
        def velocity(self, latents, sigma, conditioning):
            return super().velocity(latents, sigma, conditioning) * (1 + 1e-3 * len(latents))

    training = {**QUICK["training"], "micro_batch": 2}
    with pytest.raises(TrainingError, match="first ratio"):
        trainer(tmp_path / "a", policy=Rounding(), training=training).train()
    made = trainer(tmp_path / "b", policy=Rounding(), training={**training, "old_log_probs": "recompute"})
    assert [line["update/first_ratio_error"] for line in records(made.train())] == [0.0] * 3


# ---- what trains what


class Table(fakes.LinearPolicy):
    """velocity = latents / 2 - weights[example, step]. A larger weight gives a redder picture; the blue of a picture
    tells which example it is of."""

    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.Embedding(6, 5)
        torch.nn.init.zeros_(self.module.weight)

    def encode(self, examples):
        return {"number": torch.tensor([int(example.id[1:]) for example in examples])}

    def velocity(self, latents, sigma, conditioning):
        step = (self.sigmas(5, conditioning)[:5] - sigma[:, None]).abs().argmin(1)
        return latents / 2 - self.module.weight[conditioning["number"], step].view(-1, 1, 1)

    def decode(self, latents, conditioning):
        red = latents.detach().mean((1, 2)) / 20 + 0.5
        blue = conditioning["number"] / 10
        return torch.stack([red, torch.zeros_like(red), blue], 1)[..., None, None].expand(-1, 3, 2, 2)


WANTED = torch.tensor([1.0, -1.0, 0.0, 1.0, 0.0, -1.0])
"""Whether an example wants red, none of it, or does not care."""


def wanted(images, examples):
    numbers = [int(example.id[1:]) for example in examples]
    assert (images[:, 2, 0, 0] * 10).round().int().tolist() == numbers, "pictures of other examples"
    return images[:, 0].mean((1, 2)) * WANTED[numbers]


ONE_REWARD = {"advantage": "weighted_sum", "time_weights": {"use": "constant", "weights": [1.0]}}
SGD = {"optimizer": {"use": "SGD", "lr": 1.0}}


def train_table(tmp_path: Path, rollout: dict, method: dict, training: dict, reward=wanted, **sections):
    """Weights (examples, steps) after iterations in each of which all examples are drawn."""
    made = trainer(
        tmp_path, policy=Table(), rewards={"wanted": reward}, evaluation={"examples": 0},
        rollout={**QUICK["rollout"], "steps": "all_steps", **rollout}, method={**ONE_REWARD, **method},
        training={**QUICK["training"], **SGD, "prompts_per_iteration": 6, **training}, **sections,
    )  # fmt: skip
    lines = records(made.train())
    return made.policy.module.weight.detach(), lines


PAPER = {"clip_range": 1e-4, "ratio_norm": False}
DANCE = {"dynamics": {"use": "dance_sde", "noise_level": 0.4}}


@pytest.mark.parametrize(
    ("rollout", "method", "training"),
    [
        ({}, {}, {}),
        ({"chunk_prompts": 4}, {}, {"micro_batch": 6}),
        ({"chunk_prompts": 1, "share_initial_noise": False}, {}, {"inner_epochs": 2}),
        (DANCE, PAPER, {}),
        ({**DANCE, "chunk_prompts": 2}, PAPER, {"inner_epochs": 2, "updates_per_epoch": 4}),
    ],
    ids=["defaults", "chunks and micro-batches", "single prompts", "the paper's recipe", "the same, off-policy"],
)
def test_each_example_is_trained_by_its_own_rewards(tmp_path: Path, rollout, method, training) -> None:
    weights, _ = train_table(tmp_path, rollout, method, training)
    assert torch.equal(weights.mean(1).sign(), WANTED)
    assert bool((weights[WANTED == 0] == 0).all())


@pytest.mark.parametrize("steps", ["all_steps", {"use": "random_fraction", "fraction": 0.5}], ids=["all", "half"])
@pytest.mark.parametrize("step", range(4))
def test_each_step_is_trained_with_its_own_time_weight(tmp_path: Path, step: int, steps) -> None:
    only = {"use": "piecewise", "boundaries": [step / 5 - 0.1, step / 5 + 0.1], "weights": [[0.0], [1.0], [0.0]]}
    weights, _ = train_table(tmp_path, {"steps": steps}, {"time_weights": only}, {"iterations": 4})
    assert bool((weights[WANTED != 0, step] != 0).all())
    weights[:, step] = 0
    assert bool((weights == 0).all())


def test_stepwise_credit_trains_a_step_with_what_it_adds_to_the_predicted_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward of the image that is predicted at step 2 alone: step 1 adds it, and step 2 takes it away."""
    asked: list[int] = []

    def at_step_two(images, examples):
        asked.append(len(images))
        return wanted(images, examples) * (len(asked) == 4)  # the final images, then those at steps 0, 1, 2, ...

    training = {"iterations": 1, "updates_per_epoch": 1}
    monkeypatch.setattr(SpreadGuard, "check", lambda *arguments: None)  # final images all have reward 0
    weights, _ = train_table(tmp_path, {}, {"credit": "stepwise"}, training, at_step_two)
    assert asked == [24] * 6
    assert torch.equal(weights[:, 1].sign(), WANTED)
    assert bool((weights[WANTED != 0, 2] != 0).all())
    assert bool((weights[:, [0, 3, 4]] == 0).all())


def test_prompts_are_shuffled_in_every_epoch_and_chunks_keep_their_order(tmp_path: Path) -> None:
    def drawn(**rollout) -> list[str]:
        seen: list[str] = []

        def remember(images, examples):
            seen.extend(example.id for example in examples[::4])
            return wanted(images, examples)

        folder = tmp_path / str(rollout.get("chunk_prompts"))
        train_table(folder, rollout, {}, {"prompts_per_iteration": 3, "iterations": 6}, remember)
        return seen

    order = drawn()
    epochs = [order[i : i + 6] for i in range(0, 18, 6)]
    names = [f"e{i}" for i in range(6)]
    assert [sorted(epoch) for epoch in epochs] == [names] * 3
    assert len({tuple(epoch) for epoch in [names, *epochs]}) == 4
    assert drawn(chunk_prompts=1) == drawn(chunk_prompts=2) == order


def test_kinds_can_be_drawn_evenly(tmp_path: Path) -> None:
    data = [replace(example, kind="ab"[n == 4]) for n, example in enumerate(fakes.examples(6))]
    made = trainer(tmp_path, train=data, training={"kinds": {"a": 1, "b": 1}})
    assert [[example.kind for example in made._draw(iteration)[1]] for iteration in (1, 2, 3)] == [["a", "b"]] * 3


def test_gradients_are_scaled_down_to_their_bound(tmp_path: Path) -> None:
    one = {"iterations": 1, "updates_per_epoch": 1}
    weights, lines = train_table(tmp_path / "free", {}, {}, {**one, "max_grad_norm": 100.0})
    norm = lines[0]["update/grad_norm"]
    assert float(weights.norm()) == pytest.approx(norm, rel=1e-4)
    bound = norm / 10
    bounded, _ = train_table(tmp_path / "bound", {}, {}, {**one, "max_grad_norm": bound})
    torch.testing.assert_close(bounded, weights / 10, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({"lr_schedule": "linear"}, [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
        ({"lr_schedule": "constant_with_warmup", "warmup_updates": 4}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
    ],
)
def test_the_learning_rate_follows_its_schedule(tmp_path: Path, schedule: dict, rates: list[float]) -> None:
    """The rate in the record is that of the next optimizer step."""
    _, lines = train_table(tmp_path, {}, {}, {"iterations": 6, "updates_per_epoch": 1, **schedule})
    assert [line["update/learning_rate"] for line in lines] == pytest.approx(rates)


def test_evaluation_uses_the_averaged_weights_and_training_goes_on_with_its_own(tmp_path: Path) -> None:
    made = trainer(tmp_path, training={**QUICK["training"], "ema_decay": 0.9})
    result = made.train()
    own = weights(made.policy)
    measured = read_scores(RunFolder(result.run).evaluation(3)).values

    def evaluated() -> torch.Tensor:
        found = evaluate(made.policy, made.eval_examples, made.rewards, {}, made.config.evaluation, 5, 3)
        return torch.from_numpy(found.scores.values).float()

    with made.update.averaged_weights():
        assert float((weights(made.policy) - own).abs().max()) > 1e-3
        assert torch.equal(evaluated(), torch.from_numpy(measured).float())
    assert torch.equal(weights(made.policy), own)
    assert float((evaluated() - torch.from_numpy(measured)).abs().max()) > 1e-4


# ---- guards


def test_a_constant_reward_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="The reward 'identity' is the same for all pictures"):
        trainer(tmp_path, rewards={"prompt": fakes.red, "identity": fakes.constant}).train()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_noise_level_zero_is_refused_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no noise"):
        trainer(tmp_path, rollout={**QUICK["rollout"], "dynamics": {"use": "dance_sde", "noise_level": 0.0}})


def test_evaluation_that_the_policy_cannot_take_is_refused_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation.resolution is set, which LinearPolicy does not take"):
        trainer(tmp_path, evaluation={**QUICK["evaluation"], "resolution": 64})


def test_examples_that_the_policy_cannot_take_are_refused_before_the_start(tmp_path: Path) -> None:
    """Also those that a later iteration would draw, and files that are no images."""

    class OnlyOne(fakes.LinearPolicy):
        def shape_key(self, example):
            if len(example.references) > 1:
                raise UserError(f"'{example.id}' has {len(example.references)} references")
            return super().shape_key(example)

    two = [replace(example, references=example.references * 2) for example in fakes.examples(1)]
    for train, held_out in ((fakes.examples(5) + two, None), (fakes.examples(5), two)):
        with pytest.raises(UserError, match="'e0' has 2 references"):
            Trainer(OnlyOne(), [fakes.red], train, held_out, parse_config({"output": str(tmp_path)}, TrainerConfig))
    Image.new("RGB", (2, 2)).save(tmp_path / "0.png")
    lines = [{"id": str(n), "prompt": "p", "references": ["0.png"] * (1 + (n == 49))} for n in range(50)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match="'49' has 2 references"):
        Trainer(OnlyOne(), [fakes.red], JsonlDataset(tmp_path / "data.jsonl"))
    (tmp_path / "0.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"0\.png' cannot be read"):
        Trainer(OnlyOne(), [fakes.red], JsonlDataset(tmp_path / "data.jsonl"))


def test_a_policy_without_trainable_parameters_is_refused(tmp_path: Path) -> None:
    policy = fakes.LinearPolicy()
    policy.module.requires_grad_(False)
    with pytest.raises(TrainingError, match="bound to nothing"):
        trainer(tmp_path, policy=policy)


def test_a_policy_that_samples_otherwise_than_it_trains_is_stopped(tmp_path: Path) -> None:
    class Dropout(fakes.LinearPolicy):
        def velocity(self, latents, sigma, conditioning):
            return super().velocity(latents, sigma, conditioning) * (1.01 if torch.is_grad_enabled() else 1.0)

    with pytest.raises(TrainingError, match="first ratio of iteration 1 is off 1"):
        trainer(tmp_path, policy=Dropout()).train()


def test_non_finite_gradients_are_skipped_twice_then_stop(tmp_path: Path) -> None:
    class Breaking(fakes.LinearPolicy):
        def velocity(self, latents, sigma, conditioning):
            velocity = super().velocity(latents, sigma, conditioning)
            if torch.is_grad_enabled():
                velocity.register_hook(lambda gradient: gradient * math.nan)
            return velocity

    made = trainer(tmp_path, policy=Breaking())
    before = weights(made.policy)
    with pytest.raises(TrainingError, match=r"not finite .* for the third time, in iteration 2"):
        made.train()
    assert torch.equal(before, weights(made.policy))
    assert records(Result(tmp_path / "run", [], 0, False))[0]["update/skipped"] == 2


class Shifted(fakes.LinearPolicy):
    """Trains with a velocity that is larger than the one that sampled."""

    shift = 0.0

    def velocity(self, latents, sigma, conditioning):
        return super().velocity(latents, sigma, conditioning) * (1 + self.shift * torch.is_grad_enabled())


@pytest.mark.parametrize("ratio_norm", [True, False])
@pytest.mark.parametrize("clip_range", [1e-2, 1e-3, 1e-4, 1e-5])
def test_no_error_of_the_first_ratio_is_allowed_and_clipped(
    tmp_path: Path, clip_range: float, ratio_norm: bool
) -> None:
    training = {**QUICK["training"], "iterations": 1, "updates_per_epoch": 1}
    for exponent in (-5, -3, -1):
        policy = Shifted(dtype=torch.bfloat16)
        policy.shift = 10.0**exponent
        method = {"clip_range": clip_range, "ratio_norm": ratio_norm}
        folder, held_out = tmp_path / str(exponent), {"examples": 0}
        made = trainer(folder, policy=policy, method=method, training=training, evaluation=held_out)
        if exponent == -1:
            advice = rf"clip_range={clip_range:g}\): .*; set training.old_log_probs=recompute; if that does not help"
            with pytest.raises(TrainingError, match=advice):
                made.train()
            continue
        with suppress(TrainingError):
            (line,) = records(made.train())
            assert line["update/first_ratio_error"] <= clip_range / 10
            assert line["update/clip_share"] == 0


def test_what_is_still_off_with_recomputed_log_probs_is_not_told_to_recompute(tmp_path: Path) -> None:
    policy = Shifted()
    policy.shift = 0.01
    with pytest.raises(TrainingError, match=r"different log-probs; switch dropout off"):
        trainer(tmp_path, policy=policy, training={**QUICK["training"], "old_log_probs": "recompute"}).train()


@pytest.mark.parametrize("ratio_norm", [True, False])
def test_log_probs_and_means_are_recomputed_in_the_updates_own_batches(
    tmp_path: Path, ratio_norm: bool, monkeypatch
) -> None:
    """Those of the first optimizer step come from its own passes, except in the first iteration: to the same bit."""

    class Batchy(fakes.LinearPolicy):
        passes = 0

        def velocity(self, latents, sigma, conditioning):
            self.passes += not torch.is_grad_enabled()
            return super().velocity(latents, sigma, conditioning) * (1 + 0.1 * (len(latents) == 2))

    training = {**QUICK["training"], "micro_batch": 2, "old_log_probs": "recompute", "inner_epochs": 2}
    runs = []
    for name in ("own", "separate"):
        made = trainer(tmp_path / name, policy=Batchy(), training=training, method={"ratio_norm": ratio_norm})
        lines = without_times(records(made.train()))
        assert [line["update/first_ratio_error"] for line in lines] == [0.0] * 3
        runs.append((made.policy.passes, weights(made.policy), lines))
        monkeypatch.setattr(Grpo, "checked", property(lambda objective: False, lambda objective, value: None))
    (passes, *own), (more, *separate) = runs
    assert more - passes == 2 * 1 * 4  # later iterations, steps of the first update, micro-batches
    assert torch.equal(own[0], separate[0])
    assert own[1] == separate[1]


@pytest.mark.parametrize("objective", ["grpo", "nft", "awm"])
def test_the_host_reads_nothing_from_the_device_before_a_backward_pass(
    tmp_path: Path, objective: str, monkeypatch
) -> None:
    """After the first iteration, which checks more. A schedule and its steps are in the memory of the host."""
    backward, reads = Updater._backward, []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                reads.append(args[0].untyped_storage().data_ptr())
            return func(*args, **(kwargs or {}))

    def watch(updater, batch, meter):
        with Watched() if updater.iteration > 1 else nullcontext():
            backward(updater, batch, meter)
        host = [getattr(batch.rollout, name) for name in ("sigmas", "steps") if objective == "grpo"]
        assert not set(reads) - {tensor.untyped_storage().data_ptr() for tensor in host}
        reads.clear()

    monkeypatch.setattr(Updater, "_backward", watch)
    sections = {"training": {**QUICK["training"], "iterations": 2}, "evaluation": {"examples": 0}}
    result = trainer(tmp_path, objective={"use": objective}, **sections).train()
    assert len(records(result)) == 2


@pytest.mark.parametrize(
    ("optimizer", "sentence"),
    [
        ({"use": "SGD", "lr": 0.0}, r"SGD with lr=0.0 does not follow the gradient, so nothing would train"),
        ({"use": "AdamW", "lr": 0.0, "weight_decay": 0.5}, r"AdamW with lr=0.0 does not follow the gradient"),
        ({"use": "AdamW", "lr": math.inf}, r"AdamW with lr=inf is not finite"),
        ({"use": "AdamW", "lr": -1e-3}, r"AdamW could not be constructed with lr=-0.001"),
        ({"use": "LBFGS", "lr": 1e-2}, r"LBFGS cannot take a step .*without a closure"),
        ({"use": "SparseAdam", "lr": 1e-2}, r"SparseAdam cannot take a step with dense gradients"),
        ({"use": "lr_scheduler:LambdaLR"}, r"cannot import 'lr_scheduler'"),
        (
            {"use": "train.test_trainer:WithClosure"},
            r"train.test_trainer:WithClosure cannot take a step .*without a closure",
        ),
        ({"use": "train.test_trainer:Decaying", "lr": 1e-2}, r"Decaying with lr=0.01 does not follow the gradient"),
        ({"use": "fakes:constant"}, r"gives a partial|gives a function"),
    ],
)
def test_an_optimizer_that_cannot_train_is_refused_before_a_folder_is_made(
    tmp_path: Path, optimizer: dict, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        trainer(tmp_path, training={**QUICK["training"], "optimizer": optimizer})
    assert not (tmp_path / "run").exists()


class WithClosure(torch.optim.SGD):
    def step(self, closure):
        return closure()


class Decaying(torch.optim.SGD):
    """Weight decay without the gradient."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1 - group["lr"])


@pytest.mark.parametrize("name", ["Adafactor", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD"])
def test_other_optimizers_train_and_resume(tmp_path: Path, name: str) -> None:
    def made(folder: Path, iterations: int) -> Trainer:
        training = {**QUICK["training"], "optimizer": {"use": name, "lr": 1e-2}, "iterations": iterations}
        return trainer(folder, training=training, evaluation={"examples": 0})

    made(tmp_path, 1).train()
    straight, resumed = made(tmp_path / "straight", 2), made(tmp_path, 2)
    straight.train()
    resumed.train(resume=RunFolder(tmp_path / "run"))
    assert torch.equal(weights(resumed.policy), weights(straight.policy))


def test_a_learning_rate_below_rounding_is_stopped_at_the_first_step(tmp_path: Path) -> None:
    policy = fakes.LinearPolicy()
    with torch.no_grad():
        policy.module.bias.add_(1.0)
        policy.module.weight.add_(1.0)
    optimizer = {"use": "SGD", "lr": 1e-12}
    with pytest.raises(TrainingError, match=r"first optimizer step \(iteration 1\) changed no weight.*rate is 1.0e-12"):
        trainer(tmp_path, policy=policy, training={**QUICK["training"], "optimizer": optimizer}).train()


def test_weights_that_the_velocity_does_not_depend_on_are_noticed_in_spite_of_weight_decay(tmp_path: Path) -> None:
    class Deaf(fakes.LinearPolicy):
        def velocity(self, latents, sigma, conditioning):
            return latents * 0.5 + 0 * self.module(latents) - conditioning["colour"]

    optimizer = {"use": "AdamW", "lr": 1e-2, "weight_decay": 0.1}
    with pytest.raises(TrainingError, match=r"gradient of iteration 1 is exactly 0 although advantages are not"):
        trainer(tmp_path, policy=Deaf(), training={**QUICK["training"], "optimizer": optimizer}).train()


def test_an_iteration_without_advantages_or_learning_rate_is_no_reason_to_stop(tmp_path: Path) -> None:
    def late(progress):
        return torch.stack([(progress > 0.3).to(progress)] * 2, dim=-1)

    made = trainer(
        tmp_path,
        training={**QUICK["training"], "updates_per_epoch": 4, "warmup_updates": 2, "optimizer": {"use": "SGD"}},
        method={"advantage": "weighted_sum"}, rollout={**QUICK["rollout"], "steps": "all_steps"},
    )  # fmt: skip
    made.method.time_weights = late
    made.train()
    assert made.update.moved


# ---- memory


FULL = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "host": MemoryError(),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


class Full(fakes.LinearPolicy):
    """Has no memory left from one of its calls in a stage on."""

    stage, after, error = "", 0, FULL["cuda"]

    def fail(self, stage: str) -> None:
        if stage == self.stage:
            self.after -= 1
            if self.after < 0:
                raise self.error

    def encode(self, examples):
        self.fail("encode")
        return super().encode(examples)

    def velocity(self, latents, sigma, conditioning):
        self.fail("update" if torch.is_grad_enabled() else "rollout")
        return super().velocity(latents, sigma, conditioning)

    def decode(self, latents, conditioning):
        self.fail("decode")
        return super().decode(latents, conditioning)

    def score(self, images, examples):
        self.fail("rewards")
        return fakes.dark(images, examples)


ADVICE = {
    "encode": r"in the stage rollout .*; lower rollout.chunk_prompts or set policy.offload=cpu",
    "rollout": r"in the stage rollout .*; lower rollout.chunk_prompts",
    "decode": r"in the stage rollout .*; lower rollout.chunk_prompts",
    "rewards": r"in the stage rewards \(The reward .*score failed on 8 images.*\); lower the batch_size of the reward",
    "update": r"in the stage update .*; lower training.micro_batch .* policy.gradient_checkpointing=true",
}


@pytest.mark.parametrize(
    ("stage", "error"), [*((stage, "cuda") for stage in ADVICE), *(("update", error) for error in FULL)]
)
def test_memory_that_runs_out_says_what_to_lower_and_keeps_the_finished_iterations(
    tmp_path: Path, stage: str, error: str
) -> None:
    def made(folder: Path) -> Trainer:
        policy = Full()
        rewards = {"prompt": fakes.red, "identity": policy.score}
        return trainer(folder, policy=policy, rewards=rewards, evaluation={"examples": 0})

    class FailInTheThird(Observer):
        def on_iteration(self, record) -> None:
            if record["iteration"] == 2:
                broken.policy.stage, broken.policy.error = stage, FULL[error]

        def on_stage(self, stage) -> None:
            if stage == "update" and broken.iteration == 2:
                broken.spread_guard.streak["identity"] = 1  # of the third iteration, which is done again

    broken = made(tmp_path)
    with pytest.raises(UserError, match=rf"^Memory ran out on cpu {ADVICE[stage]}") as caught:
        broken.train(FailInTheThird())
    assert caught.value.advice.startswith("The last checkpoint is iteration-000002. ")
    state = json.loads((tmp_path / "run" / "checkpoints" / "iteration-000002" / "state.json").read_text())
    assert state["progress"]["streak"] == {}
    straight, resumed = made(tmp_path / "straight"), made(tmp_path)
    lines = records(straight.train())
    assert without_times(records(resumed.train(resume=RunFolder(tmp_path / "run")))) == without_times(lines)
    assert torch.equal(weights(resumed.policy), weights(straight.policy))


def test_memory_that_runs_out_in_an_evaluation_leaves_it_to_the_resumed_run(tmp_path: Path) -> None:
    class FailInTheEvaluation(Observer):
        def on_stage(self, stage) -> None:
            if stage == "evaluation" and broken.iteration == 2:
                broken.policy.stage = "rollout"

    broken, straight, resumed = (trainer(tmp_path / name, policy=Full()) for name in ("run", "straight", "run"))
    with pytest.raises(UserError, match=r"in the stage evaluation .*; lower evaluation.batch") as caught:
        broken.train(FailInTheEvaluation())
    assert "iteration-000002" in caught.value.advice
    expected, found = straight.train(), resumed.train(resume=RunFolder(tmp_path / "run" / "run"))
    assert without_times(records(found)) == without_times(records(expected))
    assert [file.name for file in sorted((found.run / "evaluations").iterdir())] == [
        file.name for file in sorted((expected.run / "evaluations").iterdir())
    ]
    assert found.changes == expected.changes


def test_half_an_iteration_is_never_saved(tmp_path: Path) -> None:
    class FailAfterAStep(Observer):
        def on_iteration(self, record) -> None:
            if record["iteration"] == 2:
                broken.policy.stage, broken.policy.after = "update", 1  # of two optimizer steps

    broken = trainer(tmp_path, policy=Full(), checkpoint={"every": 1}, evaluation={"examples": 0})
    before = broken.update.updates
    with pytest.raises(UserError, match=r"in the stage update") as caught:
        broken.train(FailAfterAStep())
    assert broken.update.updates == before + 2 * 2 + 1
    assert caught.value.advice.startswith("The last checkpoint is iteration-000002. ")
    straight, resumed = (trainer(folder, evaluation={"examples": 0}) for folder in (tmp_path / "straight", tmp_path))
    lines = records(straight.train())
    assert without_times(records(resumed.train(resume=RunFolder(tmp_path / "run")))) == without_times(lines)
    assert torch.equal(weights(resumed.policy), weights(straight.policy))


def test_an_optimizer_without_memory_for_its_state_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path)
    monkeypatch.setattr(made.update.optimizer, "step", fakes.raising(FULL["cuda"]))
    with pytest.raises(UserError, match=r"in the stage update") as caught:
        made.train()
    assert caught.value.advice.startswith("There is no checkpoint yet. ")


def test_a_micro_batch_that_does_not_divide_the_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"micro_batch is 3, which does not divide the 8 rows"):
        trainer(tmp_path, training={**QUICK["training"], "micro_batch": 3})


def test_weights_for_another_number_of_rewards_are_refused(tmp_path: Path) -> None:
    rewards = {"a": fakes.red, "b": fakes.dark, "c": lambda images, examples: images[:, 2].mean((1, 2))}
    with pytest.raises(UserError, match=r"2 weights per step|weights of shape"):
        trainer(tmp_path, rewards=rewards)


@pytest.mark.parametrize(
    ("section", "settings", "sentence"),
    [
        ("rollout", {"steps": {"use": "random_fraction", "fraction": 2.0}}, r"rollout.steps 'random_fraction'.*got 2"),
        (
            "rollout",
            {"dynamics": {"use": "dance_sde", "noise_level": "much"}},
            r"'rollout.dynamics.noise_level' is \"much\"",
        ),
        ("method", {"advantage": {"use": "sars", "gamma": "half"}}, r"'method.advantage.gamma' is \"half\""),
        ("method", {"time_weights": {"use": "constant", "weights": [[1]]}}, r"method.time_weights"),
        ("tracking", {"log_with": ["tensorbord"]}, r"Did you mean 'tensorboard'\?"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_a_folder_is_made(
    tmp_path: Path, section: str, settings: dict, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        trainer(tmp_path, **{section: settings})
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_resumed_for_longer_says_so_and_keeps_what_it_was(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    run, longer = RunFolder(tmp_path / "run"), {**QUICK["training"], "iterations": 5}
    before = run.config.read_text()
    trainer(tmp_path, training=longer).train(resume=run)
    assert "iterations: 5" in run.config.read_text()
    assert (run.path / "config-until-000003.yaml").read_text() == before
    assert [record["iteration"] for record in run.records()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("keep_best", "kept"), [(True, [1, 3]), (False, [3])])
def test_the_best_checkpoint_is_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_best: bool, kept: list[int]
) -> None:
    def write(path: Path, scores: Scores) -> Path:
        gain = (0, 0.3, 0.1, 0.2)[scores.iteration]
        values = np.full_like(scores.values, gain) + np.arange(2)[None, :, None]  # two tasks, one apart
        return write_scores(path, replace(scores, values=values))

    monkeypatch.setattr("customized_grpo.train.trainer.write_scores", write)
    checkpoint = {"every": 1, "keep": 1, "keep_best": keep_best}
    result = trainer(tmp_path, checkpoint=checkpoint, evaluation={"every": 1}).train()
    run = RunFolder(result.run)
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == [f"iteration-{n:06d}" for n in kept]
    best = {"iteration": 1, "worst_reward_gain": pytest.approx(0.6)}  # 0.3 in standard deviations of 0.5
    assert run.facts().get("best_checkpoint") == (best if keep_best else None)
    assert dict(facts(read_run(run.path)))["best checkpoint"] == (
        "iteration 1, worst-reward gain 0.600" if keep_best else None
    )


def test_a_run_stops_early_when_the_worst_reward_no_longer_gains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gains 0, 0.6, 0.2, 0.6, ...: with a patience of two it ends with iteration 3, and a resumed run stays there."""

    def write(path: Path, scores: Scores) -> Path:
        gain = 0 if scores.iteration == 0 else 0.1 if scores.iteration == 2 else 0.3
        return write_scores(
            path, replace(scores, values=np.full_like(scores.values, gain) + np.arange(2)[None, :, None])
        )

    monkeypatch.setattr("customized_grpo.train.trainer.write_scores", write)
    sections = {"evaluation": {"every": 1}, "training": {"iterations": 6, "early_stop": 2}}
    result = trainer(tmp_path, **sections).train()
    assert (result.stopped_early, result.interrupted) == (True, False)
    assert [record["iteration"] for record in records(result)] == [1, 2, 3]
    run = RunFolder(result.run)
    assert run.facts()["status"] == "finished"
    adapter = run.checkpoints / "iteration-000003" / "adapter"
    assert json.loads((adapter / "training.json").read_text()) == {
        "iteration": 3, "worst_reward_gain": pytest.approx(0.6)
    }  # fmt: skip
    assert any("stopped early" in remark.text for remark in remarks(read_run(run.path), None))
    assert trainer(tmp_path, **sections).train(resume=run).stopped_early
    patient = {**sections, "training": {"iterations": 6, "early_stop": 3}}
    trainer(tmp_path, **patient).train(resume=run)
    assert [record["iteration"] for record in run.records()] == [1, 2, 3, 4]
    whole = trainer(tmp_path, **sections | {"training": {"iterations": 4}}).train(resume=run)
    assert not whole.stopped_early
    assert not any("stopped early" in remark.text for remark in remarks(read_run(run.path), None))


def test_early_stopping_needs_evaluations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.early_stop needs held-out evaluations"):
        trainer(tmp_path, training={"early_stop": 1}, evaluation={"examples": 0})


def test_an_unscored_picture_is_counted_and_teaches_nothing(tmp_path: Path) -> None:
    def sometimes(images, examples):
        scores = fakes.dark(images, examples)
        scores[0] = math.nan
        return scores

    lines = records(trainer(tmp_path, rewards={"prompt": fakes.red, "identity": sometimes}).train())
    assert [line["reward/identity/unscored"] for line in lines] == [1, 1, 1]
    assert all(math.isfinite(line["update/loss"]) for line in lines)


def test_pictures_that_nobody_scored_leave_the_statistics(tmp_path: Path) -> None:
    def two_of_four(images, examples):
        return torch.where(torch.arange(len(images)) % 4 < 2, math.nan, fakes.red(images, examples))

    alone = {"advantage": "weighted_sum", "time_weights": {"use": "constant", "weights": [1.0]}}
    made = trainer(tmp_path, rewards={"red": two_of_four}, method=alone)
    count = 4 * len(made.objective.plan(1).progress)  # two pictures of each of two groups, at +-1/sqrt 2
    expected = math.sqrt(0.5 * count / (count - 1))
    assert [line["advantage/std"] for line in records(made.train())] == pytest.approx([expected] * 3, rel=1e-4)


def test_a_reward_that_fails_mid_run_names_itself_and_keeps_what_was_done(tmp_path: Path) -> None:
    calls = []

    def fragile(images, examples):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("the judge hung up")
        return fakes.dark(images, examples)

    with pytest.raises(
        UserError, match=r"train.test_trainer:.*fragile failed on 8 images.*'e\d'.*judge hung up"
    ) as caught:
        trainer(tmp_path, rewards={"prompt": fakes.red, "identity": fragile}, evaluation={"examples": 0}).train()
    assert caught.value.advice.endswith(f"cgrpo train --resume {tmp_path / 'run'}")
    assert (tmp_path / "run" / "checkpoints" / "iteration-000002").is_dir()


FAULTS = {
    r"called sys\.exit\(0\)": lambda: sys.exit(0),
    "was interrupted": lambda: signal.raise_signal(signal.SIGINT) or signal.raise_signal(signal.SIGINT),
    "changed the working directory": lambda: os.chdir("/"),
    "changed whether gradients are recorded": lambda: torch.set_grad_enabled(False),
    "changed the default dtype": lambda: torch.set_default_dtype(torch.float64),
    "returned a meta tensor": lambda: torch.ones(8, device="meta"),
}


@pytest.mark.parametrize("chunks", [None, 1])
@pytest.mark.parametrize("sentence", FAULTS)
def test_a_reward_that_harms_the_process_names_itself_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentence: str, chunks: int | None
) -> None:
    calls = []

    def harmful(images, examples):
        calls.append(1)
        found = FAULTS[sentence]() if len(calls) == 3 else None
        return found if isinstance(found, torch.Tensor) else fakes.dark(images, examples)

    if chunks and sentence == "was interrupted":
        pytest.skip("signals reach the main thread alone")
    monkeypatch.chdir(tmp_path)
    rewards = {"prompt": fakes.red, "identity": harmful}
    with pytest.raises((UserError, KeyboardInterrupt), match=rf"The reward train.test_trainer:.*harmful {sentence}"):
        trainer(Path(), rewards=rewards, rollout={**QUICK["rollout"], "chunk_prompts": chunks}).train()
    assert status(tmp_path) == ("interrupted" if sentence == "was interrupted" else "failed")
    assert torch.is_grad_enabled()


def test_a_reward_that_works_in_place_changes_nothing_for_the_others(tmp_path: Path) -> None:
    def red_in_place(images, examples):
        scores = fakes.red(images, examples)
        images.zero_()
        for example in examples:
            example.references[0].paste((0, 0, 0), (0, 0, 2, 2))
        return scores

    clean = trainer(tmp_path / "a", rewards={"prompt": fakes.red, "identity": fakes.dark}).train()
    other = trainer(tmp_path / "b", rewards={"prompt": red_in_place, "identity": fakes.dark}).train()
    assert without_times(records(clean)) == without_times(records(other))
    for picture in (clean.run / "samples").glob("*.png"):
        assert picture.read_bytes() == (other.run / "samples" / picture.name).read_bytes()


def test_a_reward_that_never_scores_is_the_one_that_is_named(tmp_path: Path) -> None:
    rewards = {"prompt": fakes.red, "identity": lambda images, examples: torch.full((len(images),), math.nan)}
    with pytest.raises(TrainingError, match=r"The reward 'identity' could not score any picture in iteration 1"):
        trainer(tmp_path, rewards=rewards).train()
    huge = {"prompt": fakes.red, "identity": lambda images, examples: 3e38 * fakes.dark(images, examples)}
    assert len(records(trainer(tmp_path / "huge", rewards=huge).train())) == 3


def test_a_folder_with_a_run_in_it_is_left_alone(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="holds something already"):
        trainer(tmp_path).train()
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training data is empty"):
        trainer(tmp_path, train=[])


def test_a_base_evaluation_is_taken_over_when_it_is_of_the_same_tasks(tmp_path: Path) -> None:
    first = trainer(tmp_path / "first").train()
    base = first.run / "evaluations" / "iteration-000000.json"
    evaluation = {**QUICK["evaluation"], "base": str(base)}
    second = trainer(tmp_path / "second", evaluation=evaluation).train()
    assert (second.run / "evaluations" / base.name).read_text() == base.read_text()
    assert second.changes == first.changes
    with pytest.raises(UserError, match="other tasks, metrics or replicates"):
        trainer(tmp_path / "third", evaluation={**evaluation, "replicates": 2}).train()
    base.write_text(base.read_text()[:40])
    with pytest.raises(UserError, match="missing or damaged"):
        trainer(tmp_path / "fourth", evaluation=evaluation).train()


# ---- how a run ends


def status(tmp_path: Path) -> str:
    return RunFolder(tmp_path / "run").status


class Calling(Observer):
    """Calls something at one event."""

    def __init__(self, event: str, call) -> None:
        setattr(self, event, call)


def test_a_run_that_is_still_training_is_not_resumed(tmp_path: Path) -> None:
    said = []

    def resume(record) -> None:
        with pytest.raises(UserError, match=r"Another process is writing to the run folder") as caught:
            trainer(tmp_path).train(resume=RunFolder.existing(tmp_path / "run"))
        with pytest.raises(UserError, match="Another process"):
            resume_run(tmp_path / "run")
        assert status(tmp_path) == "running"
        said.append(caught)

    result = trainer(tmp_path, training={**QUICK["training"], "iterations": 1}).train(Calling("on_iteration", resume))
    assert len(said) == 1
    assert [line["iteration"] for line in records(result)] == [1]


def test_the_status_is_the_last_thing_that_is_written(tmp_path: Path) -> None:
    seen = []

    def look(run: Path, ended: str) -> None:
        facts = RunFolder(run).facts()
        seen.append((ended, facts["status"], facts["seconds"] > 0, (run / "samples" / "over_training.png").is_file()))

    trainer(tmp_path).train(Calling("on_end", look))
    assert seen == [("finished", "running", True, True)]
    assert status(tmp_path) == "finished"


def test_a_tracker_that_does_not_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self) -> None:
        raise RuntimeError("api_key not configured (no-tty).\nCall wandb.login()")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", refuse)
    with pytest.raises(UserError, match=r"a tracker did not start \(RuntimeError: api_key not .*\); log in to it"):
        trainer(tmp_path, tracking={"log_with": ["tensorboard"]}).train()
    assert status(tmp_path) == "failed"


def test_trackers_get_every_evaluation_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(
        "customized_grpo.train.trainer.track_evaluation",
        lambda _, scores, grid: told.append((scores.iteration, grid.is_file())),
    )
    trainer(tmp_path).train()
    assert [told[0], told[-1]] == [(0, True), (3, True)]


@pytest.mark.parametrize("event", ["log", "finish"])
def test_a_tracker_that_fails_later_does_not_end_the_run(tmp_path: Path, monkeypatch, event: str) -> None:
    def hang_up(self, *values: object, **more: object) -> None:
        raise RuntimeError("502 Bad Gateway")

    monkeypatch.setattr(f"accelerate.tracking.TensorBoardTracker.{event}", hang_up)
    with pytest.warns(UserWarning, match=r"A tracker .*502 Bad Gateway.*metrics.jsonl has everything"):
        result = trainer(tmp_path, tracking={"log_with": ["tensorboard"]}).train()
    assert len(records(result)) == 3
    assert status(tmp_path) == "finished"


@pytest.mark.parametrize(
    ("when", "number"),
    [
        ("on_start", signal.SIGTERM), ("on_stage", signal.SIGTERM), ("on_iteration", signal.SIGTERM),
        ("on_iteration", signal.SIGINT), ("on_iteration", signal.SIGHUP),
    ],
)  # fmt: skip
def test_a_signal_at_any_moment_leaves_a_checkpoint_and_says_so(tmp_path: Path, when: str, number: int) -> None:
    before = signal.getsignal(number)
    result = trainer(tmp_path).train(Calling(when, lambda *what: os.kill(os.getpid(), number)))
    assert result.interrupted
    assert status(tmp_path) == "interrupted"
    saved = [p.name for p in (result.run / "checkpoints").glob("*")]
    assert saved == ([] if when != "on_iteration" else ["iteration-000001"])
    assert signal.getsignal(number) == before


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = trainer(tmp_path).train(Calling("on_iteration", lambda record: os.kill(os.getpid(), signal.SIGHUP)))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not result.interrupted


@pytest.mark.parametrize(
    ("event", "how"),
    [
        ("on_start", BrokenPipeError(errno.EPIPE, "closed")), ("on_evaluation", OSError(errno.EIO, "hung up")),
        ("on_iteration", SystemExit(1)), ("on_checkpoint", SystemExit(1)), ("on_end", SystemExit(1)),
    ],
)  # fmt: skip
def test_a_closed_output_ends_a_run_as_a_signal_does(tmp_path: Path, event: str, how: BaseException) -> None:
    def closed(*what: object) -> None:
        raise how

    result = trainer(tmp_path, checkpoint={"every": 1}).train(Calling(event, closed))
    assert status(tmp_path) == ("finished" if event == "on_end" else "interrupted")
    assert len(records(result)) == {"on_end": 3, "on_iteration": 1, "on_checkpoint": 1}.get(event, 0)


def test_a_full_disk_while_logging_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    without_groups = trainer(tmp_path, evaluation={"grid_rows": 0})
    with pytest.raises(UserError, match=r"metrics.jsonl' could not be written \(No space left") as caught:
        without_groups.train(Calling("on_stage", lambda s: s == "update" and monkeypatch.setattr(os, "fsync", full)))
    assert caught.value.advice.endswith(f"cgrpo train --resume {tmp_path / 'run'}")
    assert status(tmp_path) == "killed", "there was no room to say more"
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="has no checkpoint; it starts again from iteration 0"):
        result = trainer(tmp_path).train(resume=RunFolder(tmp_path / "run"))
    assert [line["iteration"] for line in records(result)] == [1, 2, 3]
    assert status(tmp_path) == "finished"


@pytest.mark.parametrize(("error", "ended"), [(KeyboardInterrupt(), "interrupted"), (MemoryError(), "failed")])
def test_whatever_ends_a_run_is_said(tmp_path: Path, error: BaseException, ended: str) -> None:
    def fail(record) -> None:
        raise error

    with pytest.raises(type(error)):
        trainer(tmp_path).train(Calling("on_iteration", fail))
    assert status(tmp_path) == ended


def test_an_evaluation_that_is_damaged_at_the_end_costs_only_the_comparison(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    first.train(Calling("on_iteration", lambda record: setattr(first, "stop_requested", True)))
    (tmp_path / "run" / "evaluations" / "iteration-000000.json").write_text('{"tasks": ["a"], "metrics": []}')
    assert trainer(tmp_path).train(resume=RunFolder(tmp_path / "run")).changes == []
    assert status(tmp_path) == "finished"


def test_weights_of_what_does_not_train_are_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    lines = [
        {"id": str(n), "prompt": "p", "references": ["0.png"], "weights": {"promt": 2} if n else {}} for n in (0, 1)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"weights of example '1': there is no reward 'promt'"):
        trainer(tmp_path, train=JsonlDataset(tmp_path / "data.jsonl"))


def test_copies_of_the_references_are_scored_once_for_each_example(tmp_path: Path) -> None:
    method = {"advantage": {"use": "cme"}, "time_weights": {"use": "constant", "weights": [0.5, 0.5]}}
    made = trainer(tmp_path, method=method)
    made.train()
    examples = {example.id: example for example in fakes.examples()}
    assert made.copies
    for name, found in made.copies.items():
        copy = torch.stack([to_tensor(examples[name].references[0])])
        assert found[0].item() == pytest.approx(float(fakes.red(copy, [examples[name]])), abs=0.02)
