"""Before a run: what stops it at once, and what it will cost."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from customized_grpo.errors import UserError
from customized_grpo.policies.contract import Policy, repeat
from customized_grpo.randomness import generator
from customized_grpo.settings.build import named_after
from customized_grpo.store.run import RunFolder
from customized_grpo.structures import Example
from customized_grpo.train.memory import MemoryEstimate, Workload, estimate_memory, explain_full_device
from customized_grpo.train.method import Method
from customized_grpo.train.objectives import Objective
from customized_grpo.train.trajectory import Solver

if TYPE_CHECKING:
    from customized_grpo.train.settings import TrainerConfig


def check_sizes(config: "TrainerConfig", examples: int, processes: int) -> None:
    """Raise UserError for an empty dataset or batches that do not divide."""
    training = config.training
    if examples == 0:
        raise UserError("The training data is empty; give at least one example.")
    if training.prompts_per_iteration % processes:
        raise UserError(
            f"training.prompts_per_iteration is {training.prompts_per_iteration}, which {processes} processes do "
            f"not divide; whole groups stay on one process, so make it a multiple of {processes}."
        )
    rows = training.prompts_per_iteration // processes * config.rollout.num_generations
    if training.micro_batch and rows % training.micro_batch:
        raise UserError(
            f"training.micro_batch is {training.micro_batch}, which does not divide the {rows} rows of an iteration "
            f"(prompts x num_generations per process)."
        )


def check_examples(policy: Policy, method: Method, train: Any, held_out: Sequence[Example]) -> None:
    """Raise UserError for an example whose references are too many or too few for the policy, or are no images.

    So is one for training with weights of rewards that do not train.

    Args:
        policy: asked for the `shape_key` of each.
        method: asked for the `factors` of those for training.
        train: the training data; only a list, or a dataset with `outlines`, is looked at before it is used.
        held_out: the examples of the evaluations.
    """
    known = train.outlines() if hasattr(train, "outlines") else train if isinstance(train, list | tuple) else ()
    for example in held_out:
        policy.shape_key(example)
    for example in known:
        policy.shape_key(example)
        method.factors([example])


def check_plan(objective: Objective, method: Method) -> None:
    """Raise UserError if the steps or levels, time weights or aggregation cannot be computed as they are set."""
    settings, draw = objective.config.rollout, generator("check")
    progress = objective.plan(1).progress
    with named_after(f"method.time_weights '{method.settings.time_weights.use}'"):
        weights = method.weights(progress, settings.num_inference_steps, draw)
    with named_after(f"method.advantage '{method.settings.advantage.use}'"):
        rewards = torch.randn(2, settings.num_generations, len(method.names), generator=draw)
        method.advantages(rewards, weights, copies=rewards[:, :1])
    if method.credit is not None:
        with named_after("method.credit"):
            method.credited(dict.fromkeys(range(len(progress) + 1), rewards), torch.arange(len(progress)))


# ---- what it will cost


@dataclass(frozen=True)
class Job:
    """What a run will work with."""

    config: "TrainerConfig"
    objective: Objective
    optimizer: torch.optim.Optimizer
    example: Example
    """Stands for all."""
    rewards: Mapping[str, object]
    metrics: Mapping[str, object]
    held_out: int
    """Examples in one evaluation."""
    processes: int
    iteration: int
    """Iterations that are done already."""

    @property
    def policy(self) -> Policy:
        return self.objective.policy

    @property
    def trained(self) -> int:
        """S, of the first iteration."""
        return len(self.objective.plan(1).progress)


@dataclass(frozen=True)
class Summary:
    """What is about to run."""

    run: Path
    model: str
    trainable_parameters: int
    total_parameters: int
    rewards: tuple[str, ...]
    samples_per_iteration: int
    start_iteration: int
    iterations: int
    device: str
    processes: int
    expected_seconds: float | None
    """Transformer passes at their measured cost, times their number; rewards and decoding come on top. None if
    `training.preflight` is off."""
    memory: MemoryEstimate | None
    """Of the device, at the fullest moment. None if `training.preflight` is off."""
    verified: str | None = None
    """What the recipe was run on."""


def summarize(job: Job, run: RunFolder, *, write: bool = True) -> Summary:
    """What is about to run, measured with a few passes if wanted; written into the run folder too."""
    config, policy = job.config, job.policy
    memory = seconds = None
    if config.training.preflight:
        with explain_full_device(policy.device):
            memory = expected_memory(job)
        with explain_full_device(policy.device, estimate=memory):
            seconds = expected_seconds(job)
    summary = Summary(
        run=run.path,
        model=policy.name,
        trainable_parameters=sum(p.numel() for p in policy.trainable_parameters()),
        total_parameters=sum(p.numel() for p in policy.module.parameters()),
        rewards=tuple(job.rewards),
        samples_per_iteration=config.training.prompts_per_iteration * config.rollout.num_generations,
        start_iteration=job.iteration,
        iterations=config.training.iterations,
        device=str(policy.device),
        processes=job.processes,
        expected_seconds=seconds,
        memory=memory,
        verified=config.verified,
    )
    if not write:
        return summary
    fields = ("model", "trainable_parameters", "total_parameters", "rewards", "samples_per_iteration", "processes")
    shown = {name: getattr(summary, name) for name in fields}
    shown |= {"memory_gib": round(memory.total / 2**30, 3)} if memory else {}
    run.describe(name=run.path.name, summary=shown)
    return summary


def expected_memory(job: Job) -> MemoryEstimate:
    """Of the device, at the fullest moment of encoding, sampling, decoding and updating."""
    others = [*job.rewards.values(), *job.metrics.values()]
    return estimate_memory(job.policy, job.optimizer, job.example, workload(job), others)


def workload(job: Job) -> Workload:
    """What decides the memory of one process."""
    mine, chunk, size = _batches(job)
    config, held_out = job.config, job.config.evaluation
    frozen = config.method.needs_base and job.policy.keep_base()
    return Workload(
        rows=mine,
        chunk=chunk,
        micro_batch=size,
        sampled=max(chunk, min(held_out.batch, job.held_out * held_out.replicates)),
        kept=job.objective.kept(job.trained),
        predicted=job.objective.predicted(job.trained),
        base=config.method.needs_base,
        copies=(config.training.ema_decay > 0) + job.objective.copies() + frozen,
        swapped=bool(job.objective.state()),
    )


TIMED_ROWS = 8
"""A CPU takes nearly the same time per row with more."""


def expected_seconds(job: Job) -> float:
    """Transformer passes still to come, at the cost of one forward and one forward with backward measured now."""
    config, training, held_out = job.config, job.config.training, job.config.evaluation
    mine, _, size = _batches(job)
    if job.policy.device.type == "cpu":
        size = min(size, TIMED_ROWS)  # on a GPU the passes also show that their memory is there
    forward, learning = pass_seconds(job.policy, job.example, size)
    left, updated = training.iterations - job.iteration, job.trained * training.inner_epochs
    passes = _passes(config.rollout.num_inference_steps, config.rollout.solver)
    passes += job.objective.extra_passes(job.trained)
    iteration = mine / size * (passes * forward + updated * learning)
    pictures = job.held_out * held_out.replicates / job.processes
    times = (left // held_out.every if held_out.every else 1) + (job.iteration == 0)
    evaluation = pictures / size * _passes(config.evaluation_steps, held_out.solver) * forward
    return left * iteration + times * evaluation


def _passes(steps: int, solver: Solver) -> int:
    return 2 * steps - 1 if solver == "heun" else steps


def _batches(job: Job) -> tuple[int, int, int]:
    """Rows of this process: in an iteration, in a chunk of its rollout, and in a pass of its update."""
    settings, training = job.config.rollout, job.config.training
    mine = training.prompts_per_iteration // job.processes * settings.num_generations
    chunk = min(mine, (settings.chunk_prompts or mine) * settings.num_generations)
    return mine, chunk, min(training.micro_batch or chunk, chunk)


def pass_seconds(
    policy: Policy, example: Example, size: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Seconds of one transformer forward, and of one forward with backward, on `size` rows; after a warm-up."""
    conditioning = repeat(policy.encode([example]), size)
    latents = torch.zeros(size, *policy.latent_shape(conditioning), device=policy.device)
    sigma = torch.full((size,), 0.5, device=policy.device)

    def seconds(backward: bool) -> float:
        begin = clock()
        with torch.set_grad_enabled(backward):
            velocity = policy.velocity(latents, sigma, conditioning)
        if backward:
            velocity.square().mean().backward()
            for parameter in policy.trainable_parameters():
                parameter.grad = None
        float(velocity.detach().sum())
        return clock() - begin

    seconds(True)
    return seconds(False), seconds(True)
