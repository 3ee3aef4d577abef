"""The update against a loop written from the formulas of docs/concepts.md, one row and one step at a time."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from customized_grpo import distributed
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.functional.sde import flow_sde
from customized_grpo.policies.contract import Policy
from customized_grpo.randomness import generator
from customized_grpo.settings import Spec
from customized_grpo.structures import Conditioning, Example
from customized_grpo.train.checkpoint import TrainingState
from customized_grpo.train.objectives.grpo import Grpo, Trajectories
from customized_grpo.train.settings import GrpoSettings, MethodSettings, TrainerConfig, TrainingSettings
from customized_grpo.train.update import Updater

SEED, LR, NOISE = 7, 0.5, 0.7
P, G, S, N, C = 3, 2, 3, 2, 2
SIGMAS = [1.0, 0.85, 0.65, 0.4, 0.2, 0.0]
STEPS = [0, 1, 3]
BASE, START = (0.4, -0.2), (0.7, 0.3)
ITERATIONS = 2


class TwoWeights(Policy):
    """velocity = a * latents + b * condition; the base policy has other weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.module = nn.Module()
        self.module.weights = nn.Parameter(torch.tensor(START, dtype=dtype))
        self.device, self.dtype = torch.device("cpu"), dtype
        self.switched_off = False

    def encode(self, examples: Sequence[Example]) -> Conditioning:
        raise NotImplementedError

    def latent_shape(self, conditioning: Conditioning) -> tuple[int, int]:
        return N, C

    def sigmas(self, num_inference_steps: int, conditioning: Conditioning) -> Tensor:
        return torch.tensor(SIGMAS, dtype=self.dtype)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        a, b = BASE if self.switched_off else self.module.weights
        return a * latents + b * conditioning["condition"]

    def decode(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        raise NotImplementedError

    @contextmanager
    def base(self) -> Iterator[None]:
        self.switched_off = True
        yield
        self.switched_off = False

    def trainable_state(self) -> dict[str, Tensor]:
        return {"weights": self.module.weights.detach()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.module.weights.copy_(state["weights"])

    def save(self, folder: Path) -> None:
        raise NotImplementedError


class Data(NamedTuple):
    """What one iteration sampled, for all B = P * G rows, in float64."""

    latents: Tensor
    noise: Tensor
    condition: Tensor
    advantage: Tensor


def draw(iteration: int) -> Data:
    random = torch.Generator().manual_seed(iteration)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    return Data(normal(P * G, S, N, C), normal(P * G, S, N, C), normal(P * G, N, C), normal(P * G, S))


# ---- the formulas, one row and one step at a time


def step_mean(weights: Any, x: Tensor, condition: Tensor, step: int) -> tuple[Tensor, float]:
    """Flow-GRPO's mean and std: g = a sqrt(sigma / (1 - sigma)), where sigmas[1] stands for sigma = 1."""
    sigma, dt = SIGMAS[step], SIGMAS[step + 1] - SIGMAS[step]
    g = NOISE * math.sqrt(sigma / (1 - (SIGMAS[1] if sigma == 1 else sigma)))
    v = weights[0] * x + weights[1] * condition
    mean = x * (1 + g**2 * dt / (2 * sigma)) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, g * math.sqrt(-dt)


def log_density(y: Tensor, mean: Tensor, std: float) -> Tensor:
    return (-((y - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2).mean()


def mean(values: Sequence[Any]) -> Any:
    return sum(values) / len(values)


def learning_rate(schedule: str, warmup: int, n: int, total: int) -> float:
    """Of the optimizer step after n others."""
    if schedule != "constant" and n < warmup:
        return LR * n / warmup
    done = (n - warmup) / (total - warmup)
    return LR * {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}.get(schedule, 1.0)


class Naive:
    """What `Updater` should do."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.weights, self.n = case, torch.tensor(START, dtype=torch.float64), 0
        self.average, self.gradients = self.weights.clone(), []
        self.parts = case["updates_per_epoch"]
        self.total = ITERATIONS * case["inner_epochs"] * self.parts

    def update(self, iteration: int, data: Data) -> dict[str, float]:
        case, sampled, records = self.case, self.weights.clone(), []
        for epoch in range(case["inner_epochs"]):
            order = torch.randperm(S, generator=generator("update", SEED, iteration, epoch)).tolist()
            for part in range(self.parts):
                weights = self.weights.clone().requires_grad_()
                chosen = [(row, column) for row in range(P * G) for column in order[part :: self.parts]]
                terms = [self.terms(weights, sampled, data, *pair) for pair in chosen]
                kl = mean([term[1] for term in terms])
                loss = mean([term[0] for term in terms]) + case["beta"] * kl
                (gradient,) = torch.autograd.grad(loss, weights)
                norm = math.hypot(*gradient.tolist())
                records.append([loss.item(), kl.item(), *(mean([term[n] for term in terms]) for n in (2, 3)), norm])
                gradient = gradient * min(1.0, case["max_grad_norm"] / (norm + 1e-6))
                self.gradients.append(gradient)
                self.weights = self.weights - learning_rate(*case["schedule"], self.n, self.total) * gradient
                self.n += 1
                decay = min(case["ema_decay"], (1 + self.n) / (10 + self.n))
                self.average = decay * self.average + (1 - decay) * self.weights
        names = ("update/loss", "update/kl", "update/clip_share", "update/approx_kl", "update/grad_norm")
        return {name: mean([record[i] for record in records]) for i, name in enumerate(names)}

    def terms(
        self, weights: Tensor, sampled: Tensor, data: Data, row: int, column: int
    ) -> tuple[Any, Any, bool, float]:
        """Surrogate, KL, whether the clip stops the gradient, and the estimated KL to the policy that sampled."""
        x, condition, step = data.latents[row, column], data.condition[row], STEPS[column]
        old, std = step_mean(sampled, x, condition, step)
        y = old + std * data.noise[row, column]
        new, base = (step_mean(w, x, condition, step)[0] for w in (weights, BASE))
        log_ratio = log_density(y, new, std) - log_density(y, old, std)
        moved = log_ratio.exp().item() - 1 - log_ratio.item()
        if self.case["ratio_norm"]:
            log_ratio = (log_ratio + ((new - old) ** 2).mean() / (2 * std**2)) * std
        ratio, c, a = log_ratio.exp(), self.case["clip_range"], data.advantage[row, column]
        stopped = bool(ratio > 1 + c) if a > 0 else bool(ratio < 1 - c)
        surrogate = -a * ratio.clamp(1 - c, 1 + c).detach() if stopped else -a * ratio
        return surrogate, ((new - base) ** 2).mean() / (2 * std**2), stopped, moved


# ---- the cases


AXES: dict[str, list[Any]] = {
    "ratio_norm": [False, True],
    "beta": [0.0, 0.3],
    "inner_epochs": [1, 2],
    "updates_per_epoch": [1, 2],
    "micro_batch": [None, 2, 3],
    "chunk_prompts": [P, 2, 1],
    "old_log_probs": ["rollout", "recompute"],
    "ema_decay": [0.0, 0.05, 0.9],
    "clip_range": [1e-3, 0.2],
    "max_grad_norm": [0.02, 100.0],
    "schedule": [("constant", 0), ("constant_with_warmup", 2), ("linear", 1), ("cosine", 1), ("cosine", 0)],
}


def pairs(case: dict[str, Any]) -> set[Any]:
    """All pairs of (setting, value) in a case."""
    return set(itertools.combinations(case.items(), 2))


def pairwise_cover() -> list[dict[str, Any]]:
    """All corners of the first four axes, and more until any two values of any two axes meet in some case."""
    names = list(AXES)
    uncovered = {
        pair for a, b in itertools.combinations(names, 2)
        for pair in itertools.product([(a, v) for v in AXES[a]], [(b, v) for v in AXES[b]])
    }  # fmt: skip
    starts = list(map(dict, itertools.product(*([(name, value) for value in AXES[name]] for name in names[:4]))))
    cases = []
    while starts or uncovered:
        case = starts.pop(0) if starts else dict(min(uncovered, key=repr))
        for name in sorted(names, key=lambda name: -len(AXES[name])):
            if name not in case:
                gain = {value: len(uncovered & pairs(ordered(case | {name: value}))) for value in AXES[name]}
                case[name] = max(AXES[name], key=gain.__getitem__)
        cases.append(ordered(case))
        uncovered -= pairs(cases[-1])
    return cases


def ordered(case: dict[str, Any]) -> dict[str, Any]:
    return {name: case[name] for name in AXES if name in case}


CASES = pairwise_cover()


def rollouts(data: Data, weights: Tensor, case: dict[str, Any], dtype: torch.dtype) -> list[Trajectories]:
    """What sampling with the given weights would have left, `chunk_prompts` prompts in each."""
    steps = [step_mean(weights, data.latents[:, i], data.condition, step) for i, step in enumerate(STEPS)]
    means, stds = torch.stack([mean for mean, _ in steps], 1), [std for _, std in steps]
    after = torch.stack([means[:, i] + std * data.noise[:, i] for i, std in enumerate(stds)], 1)
    old = [[log_density(after[b, s], means[b, s], stds[s]) for s in range(S)] for b in range(P * G)]
    old = torch.tensor(old, dtype=torch.float64)
    if case["old_log_probs"] == "recompute":
        old = old + 0.05  # recomputed, they do not matter
    found = []
    for first in range(0, P * G, case["chunk_prompts"] * G):
        some = slice(first, first + case["chunk_prompts"] * G)
        found.append(
            Trajectories(
                latents=data.latents[some].to(dtype),
                next_latents=after[some].to(dtype),
                log_probs=old[some].to(dtype),
                sigmas=torch.tensor(SIGMAS, dtype=dtype),
                steps=torch.tensor(STEPS),
                images=torch.empty(0),
                conditioning={"condition": data.condition[some].to(dtype)},
                means=means[some].to(dtype) if case["ratio_norm"] else None,
            )
        )
    return found


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def make_updater(
    case: dict[str, Any], dtype: torch.dtype, accelerator: Any, unused: bool = False
) -> tuple[Updater, list[Tensor]]:
    """And the gradients that its optimizer will see."""
    policy = TwoWeights(dtype)
    if unused:
        policy.module.unused = nn.Parameter(torch.tensor(1.0, dtype=dtype))
    training = TrainingSettings(
        iterations=ITERATIONS,
        lr_schedule=case["schedule"][0],
        warmup_updates=case["schedule"][1],
        **{name: case[name] for name in TrainingSettings.model_fields if name in case},
        **({} if "optimizer" in case else {"optimizer": Spec(use="SGD", lr=LR)}),
    )
    method = MethodSettings(**{name: case[name] for name in MethodSettings.model_fields if name in case})
    config = TrainerConfig(training=training, method=method)
    objective = Grpo(GrpoSettings(), policy, config)
    objective.dynamics = lambda *step, sigma_max: flow_sde(*step, noise_level=NOISE, sigma_max=sigma_max)
    updater = Updater(objective, config.training, accelerator, SEED)
    seen: list[Tensor] = []
    updater.optimizer.register_step_pre_hook(lambda *_: seen.append(updater.parameters[0].grad.double()))
    return updater, seen


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())).replace(" ", ""))
def test_an_update_is_what_the_formulas_say(
    case: dict[str, Any], dtype: torch.dtype, tolerance: float, accelerator: Accelerator
) -> None:
    naive, (updater, gradients) = Naive(case), make_updater(case, dtype, accelerator)
    for iteration in range(1, ITERATIONS + 1):
        data = draw(iteration)
        sampled = rollouts(data, naive.weights, case, dtype)
        expected = naive.update(iteration, data)
        record = updater(iteration, sampled, data.advantage.to(dtype))
        assert ("update/kl" in record) == bool(case["beta"])
        for name in expected.keys() & record.keys():
            assert record[name] == pytest.approx(expected[name], abs=tolerance), name
    weights = updater.policy.module.weights.detach()
    assert weights.dtype == dtype
    compare = {"rtol": 0, "atol": tolerance}
    torch.testing.assert_close(torch.stack(gradients), torch.stack(naive.gradients), **compare)
    torch.testing.assert_close(weights.double(), naive.weights, **compare)
    with updater.averaged_weights():
        averaged = updater.policy.module.weights.detach().clone()
    torch.testing.assert_close(averaged.double(), naive.average, **compare)
    assert torch.equal(updater.policy.module.weights, weights)


USUAL = {"ratio_norm": False, "beta": 0.3, "inner_epochs": 2, "updates_per_epoch": 2, "ema_decay": 0.9,
         "clip_range": 1e-3, "max_grad_norm": 0.02, "schedule": ("cosine", 1)}  # fmt: skip
ONE_UPDATE = USUAL | {"inner_epochs": 1, "updates_per_epoch": 1, "micro_batch": None, "chunk_prompts": P,
                      "old_log_probs": "rollout", "max_grad_norm": 100.0, "schedule": ("constant", 0)}  # fmt: skip


def test_every_setting_of_these_cases_acts() -> None:
    """So that a setting which the update ignores cannot agree with the formulas by chance."""

    def train(case: dict[str, Any]) -> tuple[Tensor, list[dict[str, float]]]:
        naive = Naive(case)
        records = [naive.update(iteration, draw(iteration)) for iteration in range(1, ITERATIONS + 1)]
        return torch.cat([naive.weights, naive.average]), records

    result, records = train(USUAL)
    assert all(0.1 < record["update/clip_share"] < 0.9 for record in records)
    for name in USUAL:
        for value in AXES[name]:
            if value != USUAL[name]:
                assert float((train(USUAL | {name: value})[0] - result).abs().max()) > 1e-4, (name, value)


@pytest.mark.parametrize(
    ("dtype", "clip_range", "allowed"),
    [(torch.float32, 0.2, 1e-5), (torch.float32, 5e-5, 5e-6), (torch.float64, 0.2, 1e-3), (torch.float64, 1e-3, 1e-4)],
)
def test_the_first_ratio_may_be_off_by_so_much(
    dtype: torch.dtype, clip_range: float, allowed: float, accelerator: Accelerator
) -> None:
    case = ONE_UPDATE | {"clip_range": clip_range}
    for off in (0.8 * allowed, -0.8 * allowed, 1.2 * allowed, -1.2 * allowed):
        updater, _ = make_updater(case, dtype, accelerator)
        (sampled,) = rollouts(draw(1), torch.tensor(START, dtype=torch.float64), case, dtype)
        sampled = replace(sampled, log_probs=sampled.log_probs - off)
        if abs(off) > allowed:
            with pytest.raises(TrainingError, match="first ratio of iteration 1 is off 1 by"):
                updater(1, [sampled], draw(1).advantage.to(dtype))
        else:
            record = updater(1, [sampled], draw(1).advantage.to(dtype))
            assert record["update/first_ratio_error"] == pytest.approx(abs(off), abs=1e-6)
            assert record["update/ratio_max"] == pytest.approx(math.exp(abs(off)), abs=1e-6)


def test_the_first_ratio_may_be_off_by_exactly_a_tenth_of_the_clip_range(accelerator: Accelerator) -> None:
    (sampled,) = rollouts(draw(1), torch.tensor(START, dtype=torch.float64), ONE_UPDATE, torch.float64)
    sampled = replace(sampled, log_probs=sampled.log_probs - 1e-4)
    error = 1.0
    for clip_range in (0.2, None):
        case = ONE_UPDATE | {"clip_range": clip_range or 10 * error}
        record = make_updater(case, torch.float64, accelerator)[0](1, [sampled], draw(1).advantage)
        error = record["update/first_ratio_error"]
    assert case["clip_range"] / 10 == error


# ---- a resumed run


class ReadsOnce(torch.optim.SGD):
    """An optimizer that does not keep one of its arguments."""

    def __init__(self, params: Any, lr: float, warmth: int = 0) -> None:
        super().__init__(params, lr)


def restored(
    old: dict[str, Any], new: dict[str, Any], changed: list[str], accelerator: Accelerator, updates: int = 1
) -> Updater:
    """An updater with the optimizer `new`, from a checkpoint after some updates with `old`."""
    updater, _ = make_updater(ONE_UPDATE | {"optimizer": Spec(**old)}, torch.float64, accelerator)
    sampled = rollouts(draw(1), torch.tensor(START, dtype=torch.float64), ONE_UPDATE, torch.float64)
    for _ in range(updates):
        updater(1, sampled, draw(1).advantage)
    updater.optimizer.param_groups[0]["weight_decay"] = 0.25  # as if something had moved it
    state = TrainingState(1, {}, trainable=updater.policy.trainable_state(), ema=updater.ema, **updater.state())
    again, _ = make_updater(ONE_UPDATE | {"optimizer": Spec(**new)}, torch.float64, accelerator)
    again.restore(state, changed)
    assert torch.equal(again.policy.module.weights, updater.policy.module.weights)
    assert again.ema is not None
    assert torch.equal(again.ema["weights"], updater.ema["weights"])
    return again


def test_a_changed_argument_acts_and_all_else_goes_on(accelerator: Accelerator) -> None:
    adam = {"use": "AdamW", "lr": LR, "eps": 1e-8}
    again = restored(adam, {**adam, "eps": 1e-6, "lr": 0.1, "weight_decay": 0.5}, ["eps", "lr"], accelerator)
    (group,) = again.optimizer.param_groups
    assert (group["eps"], group["lr"], group["weight_decay"]) == (1e-6, 0.1, 0.25)
    assert again.optimizer.state_dict()["state"][0]["step"] == 1
    assert again.scheduler.state_dict()["last_epoch"] == 1


@pytest.mark.parametrize(
    ("old", "argument", "why"),
    [
        ({"use": "AdamW", "lr": LR}, {"amsgrad": True}, "amsgrad .* the checkpoint has no 'max_exp_avg_sq'"),
        (
            {"use": "train.test_update:ReadsOnce", "lr": LR},
            {"warmth": 1},
            "warmth .* train.test_update:ReadsOnce reads it once",
        ),
    ],
)
def test_an_argument_that_cannot_act_any_more_is_refused(
    old: dict[str, Any], argument: dict[str, Any], why: str, accelerator: Accelerator
) -> None:
    with pytest.raises(UserError, match=f"training.optimizer.{why}"):
        restored(old, {**old, **argument}, list(argument), accelerator)
    restored(old, {**old, **argument}, [], accelerator)


def test_before_the_first_step_the_optimizer_lacks_nothing(accelerator: Accelerator) -> None:
    adam = {"use": "AdamW", "lr": LR}
    again = restored(adam, {**adam, "amsgrad": True}, ["amsgrad"], accelerator, updates=0)
    assert again.optimizer.param_groups[0]["amsgrad"]


# ---- several processes


class TwoProcesses:
    """This process and another one, whose gradients and norm are given."""

    num_processes = 2
    device = torch.device("cpu")

    def __init__(self, gradients: list[Tensor], apart: float = 0.0) -> None:
        self.gradients, self.apart = gradients, apart

    def reduce(self, tensors: Sequence[Tensor], reduction: str) -> list[Tensor]:
        assert reduction == "mean"
        return [(mine + other) / 2 for mine, other in zip(tensors, self.gradients, strict=True)]

    def gather(self, norm: Tensor) -> Tensor:
        return torch.cat([norm, norm + self.apart])


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> type[TwoProcesses]:
    monkeypatch.setattr(distributed, "gather_object", lambda found: [*found, *found])
    return TwoProcesses


def update_beside(other: TwoProcesses | Accelerator) -> tuple[Updater, dict[str, float], list[Tensor]]:
    """One update of a policy with a third weight, which gets no gradient; the gradients of the other two."""
    updater, seen = make_updater(ONE_UPDATE, torch.float64, other, unused=True)
    sampled = rollouts(draw(1), torch.tensor(START, dtype=torch.float64), ONE_UPDATE, torch.float64)
    return updater, updater(1, sampled, draw(1).advantage), seen


def test_gradients_are_averaged_over_processes(accelerator: Accelerator, two_processes: type[TwoProcesses]) -> None:
    _, _, (alone,) = update_beside(accelerator)
    others = [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)]
    updater, record, (together,) = update_beside(two_processes(others))
    torch.testing.assert_close(together, (alone + others[0]) / 2, rtol=0, atol=1e-12)
    assert updater.parameters[1].item() == pytest.approx(1 + LR * 0.5)
    assert record["update/grad_norm"] == pytest.approx(math.hypot(*together.tolist(), 0.5))


@pytest.mark.parametrize("apart", [1e-3, math.nan])
def test_processes_that_train_apart_are_stopped(two_processes: type[TwoProcesses], apart: float) -> None:
    zeros = [torch.zeros(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    with pytest.raises(TrainingError, match="Gradients differ between processes"):
        update_beside(two_processes(zeros, apart))


def test_a_gradient_that_is_not_finite_on_all_processes_is_skipped(two_processes: type[TwoProcesses]) -> None:
    gradients = [torch.full((2,), math.nan, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    updater, record, _ = update_beside(two_processes(gradients))
    assert record["update/skipped"] == 1
    assert updater.policy.module.weights.tolist() == pytest.approx(START)
