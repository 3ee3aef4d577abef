"""Branch a trajectory at one step at a time, and measure how the noise of that step changes the rewards.

Notation: P examples, M branches, K rewards, T inference steps, S probed steps, U subjects, N latent tokens, C channels.

All branches of an example share one deterministic trajectory up to step s. Step s is drawn M times, each time with
fresh noise, and every branch continues deterministically. The branches differ by the noise of step s alone, so their
variance is what that step decides.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.functional import sde
from customized_grpo.functional.advantages import standardize
from customized_grpo.policies.contract import Policy, batches, rows
from customized_grpo.randomness import generator, normal, seed_global
from customized_grpo.rewards.scoring import RewardFunction, score
from customized_grpo.settings import Role, Settings
from customized_grpo.structures import Conditioning, Example
from customized_grpo.train.evaluation import cluster
from customized_grpo.train.rollout import complete_dynamics
from customized_grpo.train.trajectory import Dynamics, trajectory


class ProbeSettings(Settings):
    """How much is measured."""

    examples: Annotated[int, Role.KEPT] = Field(default=24, ge=2)
    """P: (reference, prompt) pairs, drawn from the training data."""
    branches: Annotated[int, Role.KEPT] = Field(default=8, ge=2)
    """M: continuations of each trajectory at each step. A single one has no variance."""
    gradients: Annotated[bool, Role.KEPT] = True
    """Also the cosine between the gradients of the rewards at each step."""
    include_last: Annotated[bool, Role.KEPT] = False
    """Probe the step that ends at sigma 0 too; training leaves it out unless asked."""
    batch: Annotated[int, Role.RUNTIME] = Field(default=64, ge=1)
    """Images sampled at once, rounded down to whole groups. It affects memory, and the result only by rounding."""
    seed: Annotated[int, Role.KEPT] = 0
    """Seed for the noise and for the choice of examples."""


@dataclass(frozen=True)
class Branches:
    """Rewards and gradients of the branches at one step, or at all probed steps together."""

    steps: tuple[int, ...]
    """The stochastic steps, ascending: one, or all that are probed."""
    rewards: Tensor
    """(P, M, K) float32, raw units; NaN where a reward could not score."""
    gram: Tensor | None
    """(U, K, U, K) float64: inner products of the policy gradients of every subject and reward at this step."""
    seconds: float

    @property
    def name(self) -> str:
        return f"step-{self.steps[0]:03d}" if len(self.steps) == 1 else "all-steps"


@dataclass(frozen=True)
class Trajectory:
    """The deterministic trajectories of a few examples."""

    examples: tuple[Example, ...]
    conditioning: Conditioning
    sigmas: Tensor
    """(T + 1,)"""
    latents: tuple[Tensor, ...]
    """T of (P, N, C): before each step."""


def choose(dataset: Sequence[Example], settings: ProbeSettings) -> list[Example]:
    """A fixed random choice of examples, in the order of the dataset.

    Raises:
        UserError: if the dataset has fewer than two.
    """
    if len(dataset) < 2:
        raise UserError(f"The probe needs two examples or more, but the training data has {len(dataset)}.")
    order = torch.randperm(len(dataset), generator=generator("probe examples", settings.seed))
    return [dataset[i] for i in sorted(order[: settings.examples].tolist())]


class Probe:
    """Measures one policy on P fixed examples with K rewards. A draw is a function of (seed, example, step, branch).

    Raises:
        UserError: with fewer than two rewards or examples, or if two examples have one id.
    """

    def __init__(
        self, policy: Policy, rewards: Mapping[str, RewardFunction], examples: Sequence[Example],
        settings: ProbeSettings, dynamics: Dynamics, num_inference_steps: int,
    ) -> None:  # fmt: skip
        if len(rewards) < 2:
            raise UserError(f"The probe compares rewards, but there is only '{next(iter(rewards), None)}'; name two.")
        ids = [example.id for example in examples]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice or len(ids) < 2:
            raise UserError(f"The probe needs two different examples or more, got {', '.join(twice or ids) or 'none'}.")
        self.policy, self.rewards, self.examples, self.settings = policy, dict(rewards), tuple(examples), settings
        self.dynamics, self.num_inference_steps = dynamics, num_inference_steps
        self.steps = tuple(range(num_inference_steps - (0 if settings.include_last else 1)))
        self.subjects = tuple(dict.fromkeys(cluster(example) for example in examples))
        self.rows = {example.id: row for row, example in enumerate(self.examples)}

    def measure(self, steps: tuple[int, ...]) -> Branches:
        """Branch every example with noise in `steps` only; with gradients if that is a single step."""
        started, branches = time.perf_counter(), self.settings.branches
        seed_global("probe", self.settings.seed, *steps)
        values = torch.empty(len(self.examples), branches, len(self.rewards))
        for shared in self.trajectories:
            by_row = [example for example in shared.examples for _ in range(branches)]
            scores = score(self.branch(shared, steps), by_row, self.rewards)
            values[[self.rows[e.id] for e in shared.examples]] = scores.view(len(shared.examples), branches, -1)
        gradients = self.settings.gradients and len(steps) == 1
        gram = _gram(self.subject_gradients(steps[0], values)) if gradients else None
        return Branches(steps, values, gram, time.perf_counter() - started)

    @cached_property
    def trajectories(self) -> list[Trajectory]:
        """The shared trajectories, in chunks of examples that are encoded together."""
        size = max(1, self.settings.batch // self.settings.branches)
        return [self._trajectory(some) for some in batches(self.policy, self.examples, size)]

    @torch.no_grad()
    def _trajectory(self, examples: list[Example]) -> Trajectory:
        policy, conditioning = self.policy, self.policy.encode(examples)
        sigmas = policy.sigmas(self.num_inference_steps, conditioning).to(policy.device)
        keys = [("probe initial", self.settings.seed, example.id) for example in examples]
        noise = normal(policy.latent_shape(conditioning), keys).to(policy.device)
        latents = policy.initial_latents(conditioning, noise)
        steps = trajectory(policy.velocity, conditioning, latents, sigmas[:-1])  # nothing branches after the last step
        kept = (latents, *(step.next_latents for step in steps))
        return Trajectory(tuple(examples), conditioning, sigmas, kept)

    @torch.no_grad()
    def branch(self, shared: Trajectory, steps: tuple[int, ...]) -> Tensor:
        """Images (P * M, 3, H, W) of trajectories that are stochastic in `steps` alone; row b is of example b // M."""
        first = min(steps)
        branched = trajectory(
            self.policy.velocity, shared.conditioning, shared.latents[first], shared.sigmas, start=first,
            dynamics=complete_dynamics(self.dynamics, shared.sigmas),
            noise=lambda index: self._noise(shared.examples, index, shared.latents[index]) if index in steps else None,
        )  # fmt: skip
        for step in branched:
            if step.index in steps and not bool((step.gaussian.std > 0).all()):
                raise UserError(
                    f"Step {step.index} has no noise under these dynamics, so nothing branches there; raise "
                    f"noise_level, or leave the last step out."
                )
        return self.policy.decode(step.next_latents, step.conditioning)

    def subject_gradients(self, step: int, values: Tensor) -> Tensor:
        """The policy gradient of every reward on its own at one step, summed over the examples of each subject.

        The gradient is that of mean_m z[m, k] log_prob[m], which is the clipped surrogate's at ratio 1, with z the
        standard score of one reward among the branches. All branches leave from one point, so one forward pass serves
        them.

        Args:
            step: the step that was branched at.
            values: shape (P, M, K), the rewards of the branches.

        Returns:
            Shape (U, K, D) float32 on the CPU, D trainable parameters: U * K * D * 4 bytes.
        """
        z, parameters = standardize(values), self.policy.trainable_parameters()
        if not parameters:
            raise UserError("The policy has no trainable parameter, so no gradient; probe with --no-gradients.")
        num_rewards = len(self.rewards)
        total = torch.zeros(len(self.subjects), num_rewards, sum(p.numel() for p in parameters))
        for shared in self.trajectories:
            for row, example in enumerate(shared.examples):
                log_probs = self._log_probs(shared, row, step)
                subject = self.subjects.index(cluster(example))
                for k in range(num_rewards):
                    objective = (z[self.rows[example.id], :, k].to(log_probs) * log_probs).mean()
                    gradient = torch.autograd.grad(
                        objective, parameters, retain_graph=k + 1 < num_rewards, materialize_grads=True
                    )
                    total[subject, k] += torch.cat([g.flatten().float().cpu() for g in gradient])
        return total

    def _log_probs(self, shared: Trajectory, row: int, step: int) -> Tensor:
        """(M,) log-probabilities of the branches of one example, with the gradient of the policy."""
        one, branches = slice(row, row + 1), self.settings.branches
        latents = shared.latents[step][one]
        sigma, sigma_next = (shared.sigmas[i].expand(1) for i in (step, step + 1))
        with torch.enable_grad():
            velocity = self.policy.velocity(latents, sigma, rows(shared.conditioning, one))
            gaussian = complete_dynamics(self.dynamics, shared.sigmas)(latents, velocity, sigma, sigma_next)
            gaussian = sde.Gaussian(gaussian.mean.expand(branches, -1, -1), gaussian.std.expand(branches, -1, -1))
            noise = self._noise(shared.examples[row : row + 1], step, gaussian.mean)
            return sde.log_prob(gaussian, sde.sample(gaussian, noise=noise))

    def _noise(self, examples: Sequence[Example], step: int, latents: Tensor) -> Tensor:
        """The noise of these examples' branches at one step: (P * M, N, C), on the device of `latents`."""
        branches = range(self.settings.branches)
        keys = [("probe", self.settings.seed, example.id, step, m) for example in examples for m in branches]
        return normal(latents.shape[1:], keys).to(latents.device)


def measure_all(
    probe: Probe,
    known: Mapping[tuple[int, ...], Branches] | None = None,
    *,
    on_finished: Callable[[Branches], None] = lambda branches: None,
) -> list[Branches]:
    """The branches at every probed step, and last those at all of them together.

    Args:
        probe: to measure with.
        known: measurements that are not repeated.
        on_finished: called with each new measurement, to save it.
    """
    found = dict(known or {})
    wanted = [*((step,) for step in probe.steps), probe.steps]
    for steps in wanted:
        if steps not in found:
            found[steps] = probe.measure(steps)
            on_finished(found[steps])
    return [found[steps] for steps in wanted]


def _gram(gradients: Tensor) -> Tensor:
    """Inner products of (U, K, D): shape (U, K, U, K), float64, a slice of D at a time."""
    subjects, rewards, _ = gradients.shape
    gram = torch.zeros(subjects * rewards, subjects * rewards, dtype=torch.float64)
    for part in gradients.flatten(0, 1).split(2**18, dim=1):
        gram += part.double() @ part.double().mT
    return gram.view(subjects, rewards, subjects, rewards)
