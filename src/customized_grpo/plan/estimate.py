"""The plan of a run: does it fit, how long does it take, and which setting is the fastest that fits."""

import math
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn

from customized_grpo.config import Config
from customized_grpo.errors import UserError
from customized_grpo.plan.fakes import FakeFamily, fake_reward, without_contents
from customized_grpo.plan.hardware import Gpu
from customized_grpo.plan.rows import count_rows
from customized_grpo.plan.whole import CountOperations, Operations, WholeModel, combined
from customized_grpo.policies.contract import Policy
from customized_grpo.rewards.environments import ENVIRONMENTS
from customized_grpo.settings import Spec, make_spec
from customized_grpo.settings.build import construct
from customized_grpo.structures import Example
from customized_grpo.train.memory import (
    LOWER,
    Moments,
    Passes,
    Workload,
    by_stage,
    kept_bytes,
    optimizer_bytes,
    size_of,
)
from customized_grpo.train.objectives import make_objective
from customized_grpo.train.preflight import Job, check_sizes, workload

SHARE = 0.4
"""Share of a GPU's peak rate that all operations together reach."""
HOST_BANDWIDTH = 10e9
"""Bytes per second between host and GPU, for memory that is not pinned."""
REFERENCE = (1024, 1024)
"""Width and height of a reference, in pixels."""
REWARD_PIXELS = 224
"""Width and height to which image processors of rewards resize any image, unless the model takes fewer pixels."""
SHARDED = ("weights", "adapter", "optimizer", "average", "gradients", "optimizer step", "transformer away")
"""Parts of memory that are divided among the GPUs where the transformer is sharded."""


@dataclass(frozen=True)
class Choice:
    """Settings that decide whether a run fits, and hardly change its result."""

    micro_batch: int
    checkpointing: bool
    offload: str
    quantize: str

    def settings(self, other: "Choice") -> str:
        """The settings to change to get this choice from another one."""
        named = {
            "training.micro_batch": (self.micro_batch, other.micro_batch),
            "policy.gradient_checkpointing": (str(self.checkpointing).lower(), str(other.checkpointing).lower()),
            "policy.offload": (self.offload, other.offload),
            "policy.quantize": (self.quantize, other.quantize),
        }
        return " ".join(f"{name}={mine}" for name, (mine, its) in named.items() if mine != its)


class Sizes(NamedTuple):
    """Parameters by part."""

    transformer: int
    trained: int
    encoders: int
    vae: int


class RewardCost(NamedTuple):
    """What one reward or metric needs on the GPU."""

    weights: int
    scoring: int
    """Bytes while a batch is scored, besides the weights."""
    operations: Operations
    """Of one image."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    resident: Mapping[str, int]
    """By part, for the whole run."""
    stages: Mapping[str, Mapping[str, int]]
    """By stage and part, besides those."""

    def of(self, stage: str) -> int:
        """Bytes in one stage, resident parts included."""
        return sum(self.resident.values()) + sum(self.stages[stage].values())

    @property
    def fullest(self) -> str:
        """The stage that needs most."""
        return max(self.stages, key=self.of)

    @property
    def peak(self) -> int:
        return self.of(self.fullest)


class Planner:
    """Counts one configuration once, and estimates it for any GPU and any choice of settings.

    Args:
        config: the configuration of the run.
        gpus: number of processes, one for each GPU; prompts are divided among them.
        references: number of reference images of each example.
        example: stands for all; None is one with square references.

    Raises:
        UserError: for a policy whose sizes are not known, or prompts that the GPUs do not divide.
    """

    def __init__(self, config: Config, gpus: int = 1, references: int = 1, example: Example | None = None) -> None:
        self.config = config
        self._divide(gpus)
        pictures = tuple(Image.new("RGB", REFERENCE) for _ in range(references))
        self.example = example or Example("plan", "a picture", pictures)
        self.rewards: dict[str, RewardCost] = {}
        self.uncounted: list[str] = []
        get = config.policy.arguments.get
        checkpointing, quantize = bool(get("gradient_checkpointing", False)), get("quantize", "none")
        self.models: dict[tuple[bool, str], _Model] = {}
        with without_contents():
            self._count_rewards()
            self.family = FakeFamily(config.policy)
            self.first = self._model(checkpointing, quantize)
        self.given = Choice(self.work.micro_batch, checkpointing, get("offload", "none"), quantize)
        """As configured."""

    def _divide(self, gpus: int) -> None:
        check_sizes(self.config, 1, gpus)
        self.gpus, self.rows = gpus, count_rows(self.config, gpus)
        self.shards = gpus if self.config.training.sharding != "none" else 1

    def among(self, gpus: int) -> "Planner":
        """A planner for another number of GPUs, which shares all counts."""
        other = copy(self)
        other._divide(gpus)
        return other

    @property
    def work(self) -> Workload:
        """The workload of one GPU, as configured."""
        return workload(replace(self.first.job, processes=self.gpus))

    def model(self, choice: Choice) -> "_Model":
        """The counts of a choice."""
        return self._model(choice.checkpointing, choice.quantize)

    def _model(self, checkpointing: bool, quantize: str) -> "_Model":
        key = checkpointing, quantize
        if key not in self.models:
            with without_contents():
                self.models[key] = _Model(self, *key)
        return self.models[key]

    def memory(self, choice: Choice) -> Memory:
        """The memory that one GPU needs."""
        model = self.model(choice)
        work = replace(self.work, micro_batch=choice.micro_batch)
        with without_contents():
            stages = by_stage(model.whole, work, model.trained, step=model.trained)
        if choice.offload != "none":
            stages["encode"] |= {"encoders": model.encoders, "VAE": model.vae}
            stages["decode"] |= {"VAE": model.vae}
        if choice.offload == "swap":
            stages["encode"]["transformer away"] = -model.frozen - model.trained
        stages["rewards"] = {"scoring": max((cost.scoring for cost in self.rewards.values()), default=0)}
        return Memory(self.resident(choice), {name: self._divided(parts) for name, parts in stages.items()})

    def resident(self, choice: Choice) -> dict[str, int]:
        """What is in the memory of one GPU for the whole run, by part."""
        model = self.model(choice)
        asleep = {} if choice.offload != "none" else {"encoders": model.encoders, "VAE": model.vae}
        parts = {
            "weights": model.frozen,
            "adapter" if model.frozen else "weights": model.trained,
            "optimizer": model.optimizer,
            "average": model.trained * self.work.copies,
            **asleep,
            "rewards": sum(cost.weights for cost in self.rewards.values()),
            "rollouts": kept_bytes(model.whole, self.work),
        }
        return self._divided(parts)

    def _divided(self, parts: Mapping[str, int]) -> dict[str, int]:
        """The share of one GPU."""
        return {name: math.ceil(n / self.shards) if name in SHARDED else n for name, n in parts.items() if n}

    def operations(self, choice: Choice) -> dict[str, Operations]:
        """By stage, of one GPU in the mean iteration."""
        model, rows = self.model(choice), self.rows
        prompts = self.config.training.prompts_per_iteration / self.gpus
        forward, learn = model.whole.operations("forward"), model.whole.operations("learn")
        beside = -rows.trained if model.whole.base else 0  # base passes, which `learn` counts and `frozen` too
        scored = [(rows.decoded, self.rewards[name].operations) for name in self.config.rewards if name in self.rewards]
        return {
            "encode": combined((prompts, model.encoding)),
            "rollout": combined((rows.sampled, forward)),
            "decode": combined((rows.decoded, model.decoding)),
            "rewards": combined(*scored),
            "update": combined((rows.trained, learn), (rows.frozen + beside, forward)),
        }

    def seconds(self, choice: Choice, gpu: Gpu, share: float = SHARE) -> dict[str, float]:
        """Expected seconds by stage of the mean iteration. "moves" copies encoders and VAE to the GPU and back."""
        found = {name: _seconds(counts, gpu, share) for name, counts in self.operations(choice).items()}
        if choice.offload != "none":
            model, training = self.model(choice), self.config.training
            mine = training.prompts_per_iteration / self.gpus
            transformer = (model.frozen + model.trained) * (choice.offload == "swap")
            chunks = math.ceil(mine / (self.config.rollout.chunk_prompts or mine))
            moved = model.encoders + transformer + (1 + chunks) * model.vae
            found["moves"] = 2 * moved / HOST_BANDWIDTH
        return found

    def evaluation_seconds(self, choice: Choice, gpu: Gpu, share: float = SHARE) -> float:
        """Expected seconds of one evaluation."""
        model, held_out = self.model(choice), self.config.evaluation
        images = held_out.examples * held_out.replicates / self.gpus
        steps = self.config.evaluation_steps * (2 if held_out.solver == "heun" else 1)
        scored = [(1, cost.operations) for cost in self.rewards.values()]
        each = combined((steps, model.whole.operations("forward")), (1, model.decoding), *scored)
        return images * _seconds(each, gpu, share)

    def hours(self, choice: Choice, gpu: Gpu, share: float = SHARE) -> float:
        """Expected hours of the whole run with its evaluations."""
        length, every = self.config.training.iterations, self.config.evaluation.every
        times = 1 + (length // every if every else 1)
        iterations = length * sum(self.seconds(choice, gpu, share).values())
        return (iterations + times * self.evaluation_seconds(choice, gpu, share)) / 3600

    # ---- what to set

    def fastest(self, gpu: Gpu, share: float = SHARE) -> Choice | None:
        """The fastest choice that fits; with quantised weights only where nothing else fits, None if that does not."""
        schemes = [self.given.quantize]
        if self.config.policy.arguments.get("trainable", "lora") == "lora":
            schemes += [scheme for scheme in ("int8", "nf4") if scheme not in schemes]
        for scheme in schemes:
            fitting = [choice for choice in self._choices(scheme, True) if self._fits(choice, gpu)]
            if fitting:  # what fits without checkpointing fits with it
                fitting += [choice for choice in self._choices(scheme, False) if self._fits(choice, gpu)]
                return min(fitting, key=lambda c: (sum(self.seconds(c, gpu, share).values()), -c.micro_batch))
        return None

    def _fits(self, choice: Choice, gpu: Gpu) -> bool:
        """Whether a choice fits. Resident parts are compared first, because counting them is fast."""
        return sum(self.resident(choice).values()) <= gpu.usable and self.memory(choice).peak <= gpu.usable

    def _choices(self, scheme: str, checkpointing: bool) -> Iterator[Choice]:
        """Choices with every micro-batch that divides the rows, as far as the source of the log-probs allows it."""
        work, training = self.work, self.config.training
        sizes = [n for n in range(1, work.chunk + 1) if work.chunk % n == 0]
        if training.old_log_probs == "rollout" and training.micro_batch is None:
            sizes = [work.chunk]
        yield from (
            Choice(size, checkpointing, offload, scheme) for offload in ("none", "cpu", "swap") for size in sizes
        )

    def advice(self, choice: Choice, gpu: Gpu) -> str:
        """What to lower first where a choice does not fit."""
        memory = self.memory(choice)
        if sum(memory.resident.values()) > gpu.usable:
            largest = max(memory.resident, key=lambda part: memory.resident[part])
            if largest in SHARDED and self.shards < self.gpus and choice.quantize == "none":
                return "set training.sharding=fsdp2"
            return RESIDENT.get(largest, RESIDENT["weights"])
        return LOWER[
            {"encode": "rollout", "decode": "rollout", "optimizer": "update"}.get(memory.fullest, memory.fullest)
        ]

    def left_out(self, choice: Choice) -> list[str]:
        """What needs memory or time and is not counted."""
        found = [*self.uncounted]
        if self.rewards:
            found.append("texts of rewards")
        if self.family.kind.PIPELINE == "QwenImageEditPlusPipeline":
            found.append("the vision tower of the text encoder while it works")
        if self.gpus > 1:
            found.append("communication between GPUs")
        if choice.quantize != "none":
            found.append("that kernels of quantised layers are slower than bfloat16")
        return found

    # ---- rewards

    def _count_rewards(self) -> None:
        slots = {"reward": self.config.rewards, "metric": self.config.metrics}
        for slot, specs in slots.items():
            for name, spec in specs.items():
                started = spec.arguments.get("reward")  # in a process of its own, on the same machine
                inner = (
                    spec
                    if started is None
                    else make_spec({"use": started} if isinstance(started, str) else started, f"{slot}s.{name}.reward")
                )
                model = fake_reward(inner, slot)
                if inner.arguments.get("device") == "cpu":
                    self.uncounted.append(f"{name} (on the CPU)")
                elif model is None:
                    self.uncounted.append(_named(name, spec, inner))
                else:
                    self.rewards[name] = _reward_cost(model, int(inner.arguments.get("batch_size", 64)))


RESIDENT = {
    "weights": "set policy.quantize=int8 or nf4 (LoRA), or take a GPU with more memory",
    "encoders": "set policy.offload=cpu or swap",
    "VAE": "set policy.offload=cpu",
    "adapter": "lower policy.lora.rank",
    "optimizer": "lower policy.lora.rank, or train a LoRA",
    "average": "set training.ema_decay=0",
    "rewards": "set device=cpu for rewards and metrics",
    "rollouts": "lower training.prompts_per_iteration",
}
"""What to do if the resident parts alone do not fit, by the largest of them."""


class _Model:
    """The counts of one fake policy."""

    def __init__(self, planner: Planner, checkpointing: bool, quantize: str) -> None:
        config, family, example = planner.config, planner.family, planner.example
        few = {kind: min(2, count) for kind, count in family.blocks.items()}
        missing = {kind: count - few[kind] for kind, count in family.blocks.items() if count > few[kind]}
        make = partial(family.policy, checkpointing=checkpointing, quantize=quantize)
        small, larger = make(few), {kind: make({**few, kind: few[kind] + 1}) for kind in missing}
        with Moments(small.device) as seen, CountOperations() as encoded:
            small.encode([example])
        base = config.method.needs_base
        passes = {kind: Passes(policy, example, base) for kind, policy in larger.items()}
        self.whole = WholeModel(small, example, passes, missing, base)
        whole = self.whole.extrapolated([_sizes(policy, config) for policy in (small, *larger.values())])
        self.frozen, self.trained, self.optimizer = (int(whole[name]) for name in ("frozen", "trained", "optimizer"))
        if planner.models:  # the others share what the first one encoded
            first = planner.first
            self.encoding, self.whole.encoding = first.encoding, first.whole.encoding
        else:
            self.encoding, self.whole.encoding = encoded.counts, max(seen.bytes)
        with CountOperations() as decoded:
            self.whole.decode(2)
        self.decoding = combined((1 / 2, decoded.counts))
        encoders = [getattr(small.pipeline, name) for name in family.kind.TEXT_ENCODERS]
        self.encoders, self.vae = sum(map(_bytes, encoders)), _bytes(small.pipeline.vae)
        self.sizes = Sizes(
            int(whole["parameters"]), int(whole["trained parameters"]), sum(map(_count, encoders)),
            _count(small.pipeline.vae),
        )  # fmt: skip
        objective = make_objective(small, config)
        optimizer = construct(config.training.optimizer, "optimizer", params=small.trainable_parameters())
        held_out = config.evaluation.examples
        self.job = Job(config, objective, optimizer, example, {}, {}, held_out, planner.gpus, iteration=0)


def _sizes(policy: Policy, config: Config) -> dict[str, int]:
    """Bytes and parameters of a policy, all of which are linear in the number of its blocks."""
    trained = policy.trainable_parameters()
    optimizer = construct(config.training.optimizer, "optimizer", params=trained)
    return {
        "frozen": _bytes(policy.module) - size_of(trained),
        "trained": size_of(trained),
        "optimizer": optimizer_bytes(optimizer),
        "trained parameters": sum(p.numel() for p in trained),
        "parameters": _count(policy.module),
    }


def _named(name: str, spec: Spec, inner: Spec) -> str:
    """A reward that is not counted, with the memory that its own environment is known to need."""
    outer, kind = (part.use.rpartition(":")[2] for part in (spec, inner))
    known = ENVIRONMENTS.get(kind.lower()) or ENVIRONMENTS.get(kind.removesuffix("Reward").lower())
    within = kind if inner is spec else f"{outer} of {kind}"
    return f"{name} ({within}: {known.memory})" if known else f"{name} ({within})"


def _bytes(module: nn.Module) -> int:
    return size_of([*module.parameters(), *module.buffers()])


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _reward_cost(model: Any, batch: int) -> RewardCost:
    side = min(REWARD_PIXELS, getattr(model.config, "vision_config", model.config).image_size)
    pixels = torch.zeros(2, 3, side, side)
    see = getattr(model, "get_image_features", model)
    with torch.no_grad(), Moments(torch.device("cpu")) as seen, CountOperations() as counted:
        see(pixel_values=pixels)
    return RewardCost(_bytes(model), max(seen.bytes) * batch // 2, combined((1 / 2, counted.counts)))


def _seconds(counts: Operations, gpu: Gpu, share: float) -> float:
    return sum(count / (gpu.rate(dtype) * share) for dtype, count in counts.items())


def check_share(share: float) -> None:
    """Raise UserError unless the share is more than 0 and at most 1."""
    if not 0 < share <= 1:
        raise UserError(f"--share is {share:g}; it must be more than 0 and at most 1.")
