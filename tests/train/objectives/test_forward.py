"""NFT and AWM against loops written from the formulas of docs/objectives.md, one row and level at a time; and runs."""

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import fakes
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.functional import forward
from customized_grpo.randomness import generator, normal
from customized_grpo.settings.parse import parse_config
from customized_grpo.store.run import RunFolder
from customized_grpo.train.objectives import make_objective
from customized_grpo.train.objectives.forward import Forward
from customized_grpo.train.rollout import RowNoise, sample_ode
from customized_grpo.train.settings import TrainerConfig
from customized_grpo.train.trainer import Observer, Trainer
from customized_grpo.train.update import Updater

from ..test_trainer import QUICK, records, trainer, weights, without_times
from ..test_update import BASE, SIGMAS, START, C, G, N, P, TwoWeights

SEED, LR, ITERATIONS, T, S = 7, 0.5, 3, len(SIGMAS) - 1, 3


class Exact(TwoWeights):
    """Samples in the precision of its weights."""

    def initial_latents(self, conditioning: Any, noise: Tensor) -> Tensor:
        return noise.to(self.dtype)

    def decode(self, latents: Tensor, conditioning: Any) -> Tensor:
        return latents


# ---- the formulas, one row and one level at a time


class Naive:
    """What a forward objective and `Updater` should do together."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.n = case, 0
        self.weights = torch.tensor(START, dtype=torch.float64)
        self.old, self.gradients = self.weights.clone(), []

    def iterate(self, iteration: int, conditions: Tensor, advantages: Tensor) -> None:
        case, start = self.case, self.weights.clone()
        sampler = self.old if case["use"] == "nft" else start
        x0 = [self.sample(sampler, iteration, row, conditions[row // G]) for row in range(P * G)]
        levels = sorted(torch.randperm(T, generator=generator("levels", SEED, iteration))[:S].tolist())
        for epoch in range(case["inner_epochs"]):
            order = torch.randperm(S, generator=generator("update", SEED, iteration, epoch)).tolist()
            for part in range(case["updates_per_epoch"]):
                w = self.weights.clone().requires_grad_()
                total, chosen = torch.zeros((), dtype=torch.float64), order[part :: case["updates_per_epoch"]]
                for row, column in itertools.product(range(P * G), chosen):
                    sigma, condition = SIGMAS[levels[column]], conditions[row // G]
                    key = (SEED, iteration, row // G, row % G, f"level {column}")
                    eps = normal((N, C), [key])[0].double()
                    x = (1 - sigma) * x0[row] + sigma * eps
                    v, old, before, base = (u[0] * x + u[1] * condition for u in (w, self.old, start, BASE))
                    a = max(-case["advantage_clip"], min(case["advantage_clip"], float(advantages[row, column])))
                    term = self.nft(x, x0[row], sigma, v, old, a) if case["use"] == "nft" else self.awm(
                        x0[row], eps, sigma, v, before, old, a
                    )  # fmt: skip
                    excess = ((v**2).mean() / (base**2).mean()).sqrt() - 1
                    total = total + term + case["beta"] * ((v - base) ** 2).mean()
                    total = total + case["norm_hinge"] * excess.clamp(min=0)
                (gradient,) = torch.autograd.grad(total / (P * G * len(chosen)), w)
                self.gradients.append(gradient)
                self.weights = self.weights - LR * gradient
                self.n += 1
        kept = min(case["decay_rate"] * self.n, 0.3) if case["decay_rate"] else 0.3
        self.old = kept * self.old + (1 - kept) * self.weights

    def sample(self, weights: Tensor, iteration: int, row: int, condition: Tensor) -> Tensor:
        x = normal((N, C), [(SEED, iteration, row // G, row % G, -1)])[0].double()
        for sigma, after in itertools.pairwise(SIGMAS):
            x = x + (after - sigma) * (weights[0] * x + weights[1] * condition)
        return x

    def nft(self, x: Tensor, x0: Tensor, sigma: float, v: Tensor, old: Tensor, a: float) -> Tensor:
        c, mix = self.case["advantage_clip"], self.case["mix"]
        r, errors = a / (2 * c) + 0.5, []
        for velocity in ((1 - mix) * old + mix * v, (1 + mix) * old - mix * v):
            residual = x - sigma * velocity - x0
            errors.append((residual**2).mean() / max(float(residual.detach().abs().mean()), 1e-5))
        return c * (r * errors[0] + (1 - r) * errors[1]) / mix

    def awm(self, x0: Tensor, eps: Tensor, sigma: float, v: Tensor, before: Tensor, old: Tensor, a: float) -> Tensor:
        new, past = (((u - (eps - x0)) ** 2).mean() for u in (v, before))
        ratio = (-sigma * ((new + 1e-10) ** 0.25 - (past + 1e-10) ** 0.25) / 0.25).exp()
        unit, k = a / self.case["advantage_clip"], self.case["clip_range"]
        surrogate = torch.maximum(-unit * ratio, -unit * ratio.clamp(1 - k, 1 + k))
        return surrogate + self.case["old_beta"] * ((v - old) ** 2).mean()


USUAL: dict[str, Any] = {
    "use": "nft", "mix": 1.0, "advantage_clip": 1.25, "clip_range": None, "old_beta": 1.0, "beta": 0.0,
    "norm_hinge": 0.0, "decay_rate": None, "inner_epochs": 1, "updates_per_epoch": 1, "micro_batch": None, "chunk": P,
}  # fmt: skip
AWM = USUAL | {"use": "awm", "clip_range": 1.0}
CASES = [
    USUAL,
    USUAL
    | {"mix": 0.1, "beta": 0.3, "advantage_clip": 0.4, "micro_batch": 2, "decay_rate": 0.05, "updates_per_epoch": 3},
    USUAL | {"norm_hinge": 0.5, "mix": 0.5, "inner_epochs": 2, "chunk": 2, "updates_per_epoch": 2},
    AWM,
    AWM | {"clip_range": 0.01, "inner_epochs": 2, "chunk": 1, "updates_per_epoch": 2, "beta": 0.3, "norm_hinge": 0.1},
    AWM | {"old_beta": 0.0, "advantage_clip": 0.4, "micro_batch": 3, "updates_per_epoch": 3},
]


def make(case: dict[str, Any], dtype: torch.dtype = torch.float64, policy: Any = None) -> tuple[Forward, Updater]:
    names = ("advantage_clip", "decay_rate", "mix" if case["use"] == "nft" else "old_beta")
    tree = {
        "seed": SEED,
        "objective": {"use": case["use"], "levels": S, **{name: case[name] for name in names}},
        "method": {name: case[name] for name in ("clip_range", "beta", "norm_hinge")},
        "rollout": {"num_generations": G, "num_inference_steps": T},
        "training": {
            "optimizer": {"use": "SGD", "lr": LR}, "max_grad_norm": 1e9,
            **{name: case[name] for name in ("inner_epochs", "updates_per_epoch", "micro_batch")},
        },
    }  # fmt: skip
    config = parse_config(tree, TrainerConfig)
    objective = make_objective(policy or Exact(dtype), config)
    assert isinstance(objective, Forward)
    return objective, Updater(objective, config.training, Accelerator(cpu=True), SEED)


def iterate(
    objective: Forward, updater: Updater, iteration: int, conditions: Tensor, advantages: Tensor, chunk: int = P
) -> dict[str, float]:
    plan, rollouts = objective.plan(iteration), []
    with objective.sampling():
        for first in range(0, P, chunk):
            slots = list(range(first, min(first + chunk, P)))
            noise = RowNoise(SEED, iteration, slots, G)
            condition = {"condition": conditions[slots]}
            rollouts.append(objective.collect(condition, plan, noise, lambda name: nullcontext()))
    return updater(iteration, rollouts, advantages)


def drawn(iteration: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Conditions of the prompts, and advantages of the rows."""
    random = torch.Generator().manual_seed(iteration)
    shapes = ((P, N, C), (P * G, S))
    return tuple(torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=["64", "32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_an_iteration_is_what_the_formulas_say(case: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    naive, (objective, updater) = Naive(case), make(case, dtype)
    seen: list[Tensor] = []
    updater.optimizer.register_step_pre_hook(lambda *_: seen.append(updater.parameters[0].grad.double()))
    for iteration in range(1, ITERATIONS + 1):
        naive.iterate(iteration, *drawn(iteration))
        record = iterate(objective, updater, iteration, *drawn(iteration, dtype), chunk=case["chunk"])
        assert ("update/kl" in record) == bool(case["beta"])
    compare = {"rtol": 0, "atol": tolerance}
    torch.testing.assert_close(torch.stack(seen), torch.stack(naive.gradients), **compare)
    torch.testing.assert_close(updater.parameters[0].detach().double(), naive.weights, **compare)
    assert objective.state().keys() == ({"weights"} if case["use"] == "nft" or case["old_beta"] else set())
    for old in objective.state().values():
        torch.testing.assert_close(old.double(), naive.old, **compare)


@pytest.mark.parametrize("usual", [CASES[2], CASES[4]], ids=["nft", "awm"])
def test_every_setting_of_these_cases_acts(usual: dict[str, Any]) -> None:
    def train(case: dict[str, Any]) -> Tensor:
        naive = Naive(case)
        for iteration in range(1, ITERATIONS + 1):
            naive.iterate(iteration, *drawn(iteration))
        return torch.cat([naive.weights, naive.old])

    result = train(usual)
    own = {"mix": 0.1} if usual["use"] == "nft" else {"old_beta": 0.0, "clip_range": 1.0}
    changes = {"advantage_clip": 0.8, "beta": 0.1, "norm_hinge": 0.9, "decay_rate": 0.05, "inner_epochs": 1}
    changes |= {"updates_per_epoch": 3, **own}
    for name, value in changes.items():
        assert float((train(usual | {name: value}) - result).abs().max()) > 1e-5, name


def test_old_velocities_are_those_of_the_old_policy_though_the_trained_one_goes_on() -> None:
    objective, updater = make(USUAL)
    iterate(objective, updater, 1, *drawn(1))
    old, new = objective.state()["weights"], updater.parameters[0].detach().clone()
    assert not torch.equal(old, new)
    with objective.sampling():
        assert torch.equal(updater.parameters[0], old)
    assert torch.equal(updater.parameters[0], new)
    noise, plan = RowNoise(SEED, 2, list(range(P)), G), objective.plan(2)
    rollout = objective.collect({"condition": drawn(2)[0]}, plan, noise, lambda name: nullcontext())
    (complete,) = objective.prepare([rollout], [0])
    at = objective.noised(complete, slice(0, 2), 1)
    expected = old[0] * at.latents + old[1] * complete.conditioning["condition"][:2]
    torch.testing.assert_close(complete.old_velocities[:2, 1], expected)


# ---- whole runs


NFT = {"objective": {"use": "nft", "levels": 3}}
KINDS = {
    "nft": NFT,
    "nft, normalized": {"objective": {"use": "nft", "normalize": "batch", "centre": True, "continuous": True}},
    "awm": {"objective": {"use": "awm"}},
    "stepwise": {"method": {"credit": "stepwise"}},
    "flow_dppo": {"objective": {"use": "grpo", "divergence_threshold": 1e-5}, "method": {"advantage": "weighted_sum"}},
}


@pytest.mark.parametrize("sections", KINDS.values(), ids=KINDS)
def test_a_run_is_resumed_bit_for_bit_and_batches_do_not_matter(tmp_path: Path, sections: dict) -> None:
    training = {**QUICK["training"], "iterations": 4}
    common = {**sections, "training": training, "checkpoint": {"every": 1}}
    straight = trainer(tmp_path / "straight", **common)
    whole = straight.train()

    class StopAfterTwo(Observer):
        def on_iteration(self, record) -> None:
            first.stop_requested = record["iteration"] == 2

    first = trainer(tmp_path / "halves", **common)
    assert first.train(StopAfterTwo()).interrupted
    second = trainer(tmp_path / "halves", **common)
    resumed = second.train(resume=RunFolder.existing(tmp_path / "halves" / "run"))
    assert torch.equal(weights(straight.policy), weights(second.policy))
    assert without_times(records(whole)) == without_times(records(resumed))
    assert straight.objective.state().keys() == second.objective.state().keys()
    for name, tensor in straight.objective.state().items():
        assert torch.equal(second.objective.state()[name], tensor)
    small = trainer(
        tmp_path / "small", **{**common, "training": {**training, "micro_batch": 2}},
        rollout={**QUICK["rollout"], "chunk_prompts": 1},
    )  # fmt: skip
    small.train()
    torch.testing.assert_close(weights(small.policy), weights(straight.policy), rtol=0, atol=1e-5)


def test_training_on_one_reward_raises_it(tmp_path: Path) -> None:
    alone = {"advantage": "weighted_sum", "time_weights": {"use": "constant", "weights": [1.0]}}
    for use in ("nft", "awm"):
        made = trainer(
            tmp_path / use, rewards={"red": fakes.red}, method=alone, objective={"use": use},
            training={**QUICK["training"], "iterations": 15},
        )  # fmt: skip
        assert made.train().changes[0].difference.value > 0.02, use


def test_what_a_run_logs(tmp_path: Path) -> None:
    lines = records(trainer(tmp_path, **NFT).train())
    assert all(0 <= line["nft/clipped"] < 1 and 0 < line["nft/r_std"] < 0.5 for line in lines)
    assert [line["nft/r_mean"] for line in lines] == pytest.approx([0.5] * 3, abs=0.15)
    assert ["update/first_velocity_error" in line for line in lines] == [True, False, False]
    assert lines[0]["update/velocity_norm"] == 1
    assert lines[2]["update/velocity_norm"] not in (1, 0)
    held = records(trainer(tmp_path / "kl", **NFT, method={"beta": 0.1}).train())
    assert held[0]["update/kl"] < held[2]["update/kl"]
    assert held[0]["update/velocity_norm"] == pytest.approx(1, abs=0.2)


def test_advantages_are_centred_and_divided_by_their_deviation(tmp_path: Path) -> None:
    settings = {"use": "nft", "normalize": "batch", "centre": True}
    objective = trainer(tmp_path, objective=settings).objective
    given = torch.tensor([[[1.0], [2.0], [6.0]], [[0.0], [0.5], [3.0]]])
    scored = torch.tensor([[True, True, True], [False, True, True]])
    found, record = objective.advantages(given, scored)
    centred = torch.tensor([[[-2.0], [-1.0], [3.0]], [[0.0], [-1.25], [1.25]]])
    values = torch.tensor([-2.0, -1.0, 3.0, -1.25, 1.25])
    torch.testing.assert_close(found, centred / (values.std(correction=0) + 1e-4))
    assert record["nft/clipped"] == 0
    assert record["nft/r_mean"] == pytest.approx(0.5)
    tight = trainer(tmp_path / "b", objective={"use": "nft", "advantage_clip": 1.0}).objective
    assert tight.advantages(given, scored)[1]["nft/clipped"] == pytest.approx(3 / 5)


def test_training_may_use_fewer_steps_than_evaluation(tmp_path: Path) -> None:
    calls: list[int] = []

    class Counting(fakes.LinearPolicy):
        def velocity(self, latents, sigma, conditioning):
            calls.append(len(latents))
            return super().velocity(latents, sigma, conditioning)

    class Watch(Observer):
        def on_stage(self, stage) -> None:
            calls.clear()

        def on_evaluation(self, evaluation) -> None:
            sampled.append(len(calls))

    sampled: list[int] = []
    evaluation = {**QUICK["evaluation"], "num_inference_steps": 9}
    trainer(tmp_path, policy=Counting(), evaluation=evaluation).train(Watch())
    trainer(tmp_path / "heun", policy=Counting(), evaluation={**evaluation, "solver": "heun"}).train(Watch())
    assert sampled == [9, 9, 9, 17, 17, 17]


def test_any_solver_samples(tmp_path: Path) -> None:
    made = trainer(tmp_path, **NFT, rollout={**QUICK["rollout"], "solver": "heun"})
    slots, examples = made._draw(1)
    rollout = made._collect(1, list(zip(slots, examples, strict=True)), made.objective.plan(1))
    noise = RowNoise(0, 1, slots, 4).per_row((fakes.TOKENS, fakes.CHANNELS), -1)
    expected = sample_ode(made.policy, rollout.conditioning, noise, 5, "heun")
    assert torch.equal(rollout.images, expected)
    assert not torch.equal(expected, sample_ode(made.policy, rollout.conditioning, noise, 5))


def test_an_old_policy_in_the_hosts_memory_is_the_same(tmp_path: Path) -> None:
    made = [
        trainer(tmp_path / str(away), objective={**NFT["objective"], "offload_old": away}) for away in (False, True)
    ]
    for one in made:
        one.train()
    assert [one.objective.copies() for one in made] == [1, 0]
    assert torch.equal(*(weights(one.policy) for one in made))
    for name, own in made[1].policy.trainable_state().items():
        assert made[1].objective.state()[name].data_ptr() != own.data_ptr()


# ---- guards and bad input


def test_a_policy_that_trains_otherwise_than_it_was_asked_is_stopped(tmp_path: Path) -> None:
    class Dropout(fakes.LinearPolicy):
        def velocity(self, latents, sigma, conditioning):
            return super().velocity(latents, sigma, conditioning) * (1.01 if torch.is_grad_enabled() else 1.0)

    with pytest.raises(TrainingError, match=r"first velocity of iteration 1 is off the old policy's by .*dropout off"):
        trainer(tmp_path / "nft", policy=Dropout(), **NFT).train()
    with pytest.raises(TrainingError, match=r"first ratio of iteration 1 is off 1 by .*dropout off"):
        trainer(tmp_path / "awm", policy=Dropout(), objective={"use": "awm"}).train()


def test_a_loss_that_is_not_nfts_is_stopped_in_the_first_iteration_and_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nft_loss, half = forward.nft_loss, {**QUICK["training"], "iterations": 1}
    trainer(tmp_path, **NFT, training=half).train()

    def lopsided(*inputs: Any, **settings: Any) -> forward.NftLoss:
        found = nft_loss(*inputs, **settings)
        return found._replace(losses=found.losses + 0.1 * inputs[0].mean(dim=(1, 2)))

    monkeypatch.setattr(forward, "nft_loss", lopsided)
    sentence = r"gradient of iteration {} is not proportional to 2 r - 1"
    with pytest.raises(TrainingError, match=sentence.format(1)):
        trainer(tmp_path / "fresh", **NFT).train()
    with pytest.raises(TrainingError, match=sentence.format(2)):
        trainer(tmp_path, **NFT).train(resume=RunFolder(tmp_path / "run"))


def test_advantages_that_stay_equal_stop_the_run(tmp_path: Path) -> None:
    rewards = {"prompt": fakes.red, "identity": lambda images, examples: -fakes.red(images, examples)}
    method = {"advantage": "weighted_sum", "time_weights": {"use": "constant", "weights": [0.5, 0.5]}}
    with pytest.raises(TrainingError, match="All advantages were the same in 3 iterations in a row"):
        trainer(tmp_path, rewards=rewards, method=method, **NFT).train()


def test_rewards_that_are_equal_in_every_group_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="The reward 'identity' is the same for all pictures of every group"):
        trainer(tmp_path, rewards={"prompt": fakes.red, "identity": fakes.constant}, **NFT).train()


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        ({"use": "nft", "mix": 0}, r"The setting 'objective.mix' is 0: expected more than 0"),
        ({"use": "nft", "window": [0.5, 0.5]}, r"'objective.window' is \[0.5, 0.5\]: expected two ascending numbers"),
        ({"use": "nft", "levels": 2, "window": [0.85, 0.95]}, r"objective 'nft' .* 0 of 5 steps lie in the window"),
        ({"use": "awm", "weighting": "none"}, r"'objective.weighting' is \"none\": expected 'uniform', 'sigma'"),
        ({"use": "fakes:LinearPolicy"}, r"objective: fakes:LinearPolicy is not derived from .*Objective"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(tmp_path: Path, objective: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        trainer(tmp_path, objective=objective)


def test_guidance_that_a_policy_was_given_is_refused(tmp_path: Path) -> None:
    policy = fakes.LinearPolicy()
    policy.true_cfg_scale = 4.0
    with pytest.raises(UserError, match=r"policy.true_cfg_scale is 4, but the objective nft trains without"):
        trainer(tmp_path, policy=policy, **NFT)


def test_a_model_of_few_steps_is_warned_about(tmp_path: Path) -> None:
    policy = fakes.LinearPolicy()
    policy.step_distilled = True
    with pytest.warns(UserWarning, match=r"LinearPolicy has a model that was distilled to few steps, and nft trains"):
        trainer(tmp_path, policy=policy, **NFT)


def test_a_checkpoint_of_another_objective_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, objective={"use": "awm"}).train()
    with pytest.raises(UserError, match=r'trained with objective.use = "awm", and .* cannot change it to "nft"'):
        trainer(tmp_path, **NFT).train(resume=RunFolder(tmp_path / "run"))


def test_an_old_policy_that_is_switched_on_starts_from_the_trained_weights(tmp_path: Path) -> None:
    def made(old_beta: float, iterations: int) -> Trainer:
        training = {**QUICK["training"], "iterations": iterations}
        return trainer(tmp_path, objective={"use": "awm", "old_beta": old_beta}, training=training)

    made(0.0, 1).train()
    second = made(1.0, 2)
    second._restore(RunFolder(tmp_path / "run"))
    for name, tensor in second.policy.trainable_state().items():
        assert torch.equal(second.objective.state()[name], tensor)
        assert second.objective.state()[name].data_ptr() != tensor.data_ptr()
