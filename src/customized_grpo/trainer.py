"""GRPO for competing rewards: draw prompts, sample groups, score, turn scores into advantages, update. On accelerate."""

import inspect
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import Field
from torch import Tensor

from customized_grpo import checkpoint as checkpoints
from customized_grpo import evaluation as evaluations
from customized_grpo.build import bind, construct
from customized_grpo.checkpoint import TrainingState
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.evaluation import Change, Evaluation
from customized_grpo.functional import sde
from customized_grpo.functional.advantages import advantages, conflict_statistics, standardize
from customized_grpo.functional.surrogate import clipped_surrogate, gaussian_kl, normalized_log_ratio
from customized_grpo.grids import save_grid, save_history
from customized_grpo.policies.contract import Policy, rows
from customized_grpo.randomness import generator
from customized_grpo.rollout import RowNoise, collect, complete_dynamics
from customized_grpo.scoring import RewardFunction, named, score_groups
from customized_grpo.settings import Settings, Spec
from customized_grpo.tracking import RunFolder, now, peak_memory_gib, provenance, start_trackers
from customized_grpo.types import Example, Rewards, Rollout

if TYPE_CHECKING:
    from customized_grpo.config import TrainerConfig


class MethodSettings(Settings):
    """From rewards to a loss."""

    advantage: Spec = Spec(use="sars", gamma=0.4)  # pyright: ignore[reportCallIssue]
    """sars, weighted_sum, raw_sum, gdpo, minimum, maximum, harmonic, product, identity_gate, log_tamed, conflict_drop,
    or package.module:name."""
    time_weights: Spec = Spec(use="sigmoid_crossover")
    """sigmoid_crossover (TDW), constant, linear, cosine, reversed_, piecewise, tabulated, from_file, by_loop_index, or
    package.module:name."""
    advantage_clamp: float = Field(5.0, gt=0)
    """Bound on an advantage, in standard scores."""
    clip_range: float = Field(1e-3, gt=0)
    """c of the clipped surrogate. The paper's recipe has 1e-4."""
    ratio_norm: bool = False
    """GRPO-Guard's normalised log-ratio."""
    beta: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the base policy; needs an adapter."""


class TrainingSettings(Settings):
    """The update and its length."""

    iterations: int = Field(40, ge=1)
    """Rollouts followed by their updates."""
    prompts_per_iteration: int = Field(8, ge=1)
    """Over all processes, which must divide it."""
    optimizer: Spec = Spec(use="AdamW", lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)  # pyright: ignore[reportCallIssue]
    """From torch.optim, or package.module:name."""
    lr_schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """By name as in diffusers' `get_scheduler`."""
    warmup_updates: int = Field(0, ge=0)
    """Optimizer steps of warm-up."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    inner_epochs: int = Field(1, ge=1)
    """Passes over each rollout."""
    updates_per_epoch: int = Field(2, ge=1)
    """Optimizer steps in one pass; the trained steps are shared out among them."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows in one forward pass; None takes a whole chunk, which reproduces the rollout's numbers exactly."""
    old_log_probs: Literal["rollout", "recompute"] = "rollout"
    """Where the ratio's denominator comes from. `recompute` runs a pass in the update's own batches first: for bfloat16
    with a micro-batch other than the rollout's, where rounding alone would move the ratio past the clip range."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Average of the trained weights per optimizer step, used in evaluation and in the saved adapter; 0 is none."""


class Observer:
    """What a display overrides. All methods do nothing here."""

    def on_start(self, summary: "Summary") -> None: ...

    def on_stage(self, stage: str) -> None: ...

    def on_iteration(self, record: Mapping[str, float]) -> None: ...

    def on_evaluation(self, evaluation: Evaluation) -> None: ...

    def on_checkpoint(self, path: Path) -> None: ...


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
    expected_seconds: float
    """Transformer passes at their measured cost, times their number; rewards and decoding come on top."""


@dataclass(frozen=True)
class Result:
    """What came out."""

    run: Path
    changes: list[Change]
    seconds: float
    interrupted: bool


class Trainer:
    """Train a policy on competing rewards.

    Args:
        policy: with an adapter (or everything) open for training.
        rewards: functions or objects `(images, examples) -> (B,)`, in column order, or a mapping with names.
        train_dataset: a sequence of examples.
        eval_dataset: held-out examples; None for no evaluation.
        config: see `TrainerConfig`.
        metrics: measured in evaluation, never trained on.

    Raises:
        UserError: if the parts do not fit together.
    """

    def __init__(
        self,
        policy: Policy,
        rewards: Sequence[RewardFunction] | Mapping[str, RewardFunction],
        train_dataset: Sequence[Example],
        eval_dataset: Sequence[Example] | None = None,
        config: "TrainerConfig | None" = None,
        metrics: Mapping[str, RewardFunction] | None = None,
    ) -> None:
        from customized_grpo.config import TrainerConfig

        self.policy, self.rewards, self.metrics = policy, named(rewards), dict(metrics or {})
        self.config = config or TrainerConfig()
        self.train_dataset = train_dataset
        count = self.config.evaluation.examples
        self.eval_examples = [eval_dataset[i] for i in range(min(count, len(eval_dataset)))] if eval_dataset else []
        self.accelerator = Accelerator(cpu=policy.device.type == "cpu")
        self.advantage = bind(self.config.method.advantage, "advantage")
        self.time_weights = bind(self.config.method.time_weights, "time_weights")
        self.dynamics = bind(self.config.rollout.dynamics, "dynamics")
        self.plan = bind(self.config.rollout.steps, "steps")
        self.parameters = policy.trainable_parameters()
        if not self.parameters:
            raise TrainingError("The policy has no trainable parameter: the adapter is bound to nothing.")
        self.optimizer: torch.optim.Optimizer = construct(
            self.config.training.optimizer, "optimizer", params=self.parameters
        )
        self.scheduler = self._make_scheduler()
        decay = self.config.training.ema_decay
        self.ema = {n: t.clone() for n, t in policy.trainable_state().items()} if decay else None
        self.iteration, self.samples, self.updates, self.skipped, self.constant_streak = 0, 0, 0, 0, 0
        self.updates_at_start = 0
        self.clock = Clock()
        self.stop_requested = False
        self._check()

    # ---- the loop

    def train(
        self, observer: Observer | None = None, *, resume: RunFolder | None = None, config_yaml: str | None = None
    ) -> Result:
        """Run to the end, or until SIGINT/SIGTERM, which leaves a checkpoint.

        Args:
            observer: told what happens, for a display.
            resume: a run folder to go on in; None starts a new one at `config.output`.
            config_yaml: text of RUN/config.yaml; None writes the trainer's own settings.
        """
        observer, started = observer or Observer(), time.monotonic()
        self.observer = observer
        run = self._open_run(resume, config_yaml)
        if self.accelerator.is_main_process:
            observer.on_start(self._summary(run))
        with self._signals():
            try:
                first = self._evaluate(run, 0) if self.iteration == 0 else None
                last = first
                while self.iteration < self.config.training.iterations and not self._should_stop():
                    self.iteration += 1
                    record = self._iterate()
                    last = self._evaluate(run, self.iteration) if self._evaluation_is_due() else None
                    self._track(run, record, observer)
                    if self._checkpoint_is_due():
                        self._save(run)
            except BaseException as error:
                self._close(run, "failed", started)
                if isinstance(error, UserError):
                    self._save_before(run)
                raise
        return self._finish(run, first, last, started)

    def _iterate(self) -> dict[str, float]:
        """One iteration: numbered as in docs/concepts.md."""
        self.clock.reset()
        self.updates_at_start = self.updates
        # 1. draw prompts, sample groups
        slots, examples = self._draw()
        plan = self._step_plan()
        self._stage("rollout")
        chunks = self._chunks(slots, examples)
        rollouts = [self._collect(chunk, plan) for chunk in chunks]
        # 2. score
        self._stage("rewards")
        with self.clock("rewards"):
            scored = [self._score(rollout, chunk) for rollout, chunk in zip(rollouts, chunks, strict=True)]
            values = self._gather(torch.cat([rewards.values for rewards in scored]))
        # 3. scores to advantages, over the groups of all processes
        record = self._reward_record(values)
        advantage = self._advantages(values, rollouts[0], record)
        # 4. update
        self._stage("update")
        with self.clock("update"):
            record |= self._update(rollouts, advantage)
        self.samples += values.shape[0] * values.shape[1]
        return record

    # ---- 1. prompts and groups

    def _draw(self) -> tuple[list[int], list[Example]]:
        """This process's slots and examples. Slot i of iteration n is a place in a stream of shuffled epochs."""
        count, length = self.config.training.prompts_per_iteration, len(self.train_dataset)
        share = count // self.accelerator.num_processes
        slots = list(range(share * self.accelerator.process_index, share * (self.accelerator.process_index + 1)))
        places = [divmod((self.iteration - 1) * count + slot, length) for slot in slots]
        orders = {
            epoch: torch.randperm(length, generator=generator("order", self.config.seed, epoch))
            for epoch in {epoch for epoch, _ in places}
        }
        return slots, [self.train_dataset[int(orders[epoch][place])] for epoch, place in places]

    def _step_plan(self) -> Any:
        draw = generator("steps", self.config.seed, self.iteration)
        return self.plan(self.iteration - 1, self.config.rollout.num_inference_steps, generator=draw)

    def _chunks(self, slots: list[int], examples: list[Example]) -> list[list[tuple[int, Example]]]:
        """(slot, example) pairs in chunks whose examples can be encoded together."""
        by_shape: dict[Any, list[tuple[int, Example]]] = {}
        for pair in zip(slots, examples, strict=True):
            by_shape.setdefault(self.policy.shape_key(pair[1]), []).append(pair)
        size = self.config.rollout.chunk_prompts or len(slots)
        return [group[i : i + size] for group in by_shape.values() for i in range(0, len(group), size)]

    def _collect(self, chunk: list[tuple[int, Example]], plan: Any) -> Rollout:
        with self.clock("rollout"):
            conditioning = self.policy.encode([example for _, example in chunk])
        settings = self.config.rollout
        noise = RowNoise(self.config.seed, self.iteration, [slot for slot, _ in chunk], settings.num_generations)
        return collect(
            self.policy, conditioning, plan, noise, settings, self.dynamics,
            stage=self.clock, keep_means=self.config.method.ratio_norm,
        )  # fmt: skip

    # ---- 2. and 3. scores and advantages

    def _score(self, rollout: Rollout, chunk: list[tuple[int, Example]]) -> Rewards:
        examples = [example for _, example in chunk]
        return score_groups(rollout.images, examples, self.rewards, self.config.rollout.num_generations)

    def _reward_record(self, values: Tensor) -> dict[str, float]:
        """Statistics of raw rewards (P, G, K) of all processes; stops the run on rewards without spread."""
        record: dict[str, float] = {}
        z = standardize(values)
        for k, name in enumerate(self.rewards):
            column = values[..., k]
            record[f"reward/{name}/mean"] = float(column.nanmean())
            spread = (column - column.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
            record[f"reward/{name}/spread"] = float(spread.nanmean())
            record[f"reward/{name}/unscored"] = int(column.isnan().sum())
        flat = [name for k, name in enumerate(self.rewards) if not bool((z[..., k] != 0).any())]
        self.constant_streak = self.constant_streak + 1 if flat else 0
        if flat and (self.iteration == 1 or self.constant_streak >= 3):
            unscored = int(values.isnan().any(-1).sum())
            raise TrainingError(
                f"The reward '{flat[0]}' is the same for all pictures of every group in iteration {self.iteration} "
                f"({unscored} of {values.shape[0] * values.shape[1]} pictures unscored), so it teaches nothing; "
                f"check the reward, raise rollout noise, or remove it."
            )
        if len(self.rewards) > 1:
            conflict = conflict_statistics(z)
            record |= {f"conflict/{'share' if k == 'conflict' else k}": float(v) for k, v in conflict._asdict().items()}
        return record

    def _advantages(self, values: Tensor, rollout: Rollout, record: dict[str, float]) -> Tensor:
        """This process's advantages, shape (P * G, S), from the rewards (P, G, K) of all processes."""
        weights = self._weights(rollout).to(values)
        if weights.shape != (len(rollout.steps), values.shape[-1]):
            raise UserError(
                f"method.time_weights gives weights of shape {tuple(weights.shape)} for {len(rollout.steps)} steps and "
                f"{values.shape[-1]} rewards ({', '.join(self.rewards)}); use constant with one weight per reward."
            )
        try:
            everyone = advantages(self.advantage, values, weights, self.config.method.advantage_clamp)
        except ValueError as error:
            raise UserError(f"method.advantage '{self.config.method.advantage.use}': {error}") from error
        record["advantage/std"] = float(everyone.std())
        record["advantage/clamped"] = float((everyone.abs() >= self.config.method.advantage_clamp).float().mean())
        share = len(everyone) // self.accelerator.num_processes
        own = everyone[share * self.accelerator.process_index :][:share]
        return own.flatten(0, 1).to(self.policy.device)

    def _weights(self, rollout: Rollout) -> Tensor:
        """(S, K) at the progress of the TRUE steps."""
        parameters = inspect.signature(self.time_weights).parameters
        extra: dict[str, Any] = {}
        if "generator" in parameters:
            extra["generator"] = generator("weights", self.config.seed, self.iteration)
        if "num_inference_steps" in parameters:
            extra["num_inference_steps"] = self.config.rollout.num_inference_steps
        return self.time_weights(rollout.progress, **extra)

    # ---- 4. the update

    def _update(self, rollouts: list[Rollout], advantage: Tensor) -> dict[str, float]:
        """inner_epochs x updates_per_epoch optimizer steps. advantage: (rows of all chunks, S)."""
        training, meter = self.config.training, Meter()
        starts = [0]
        for rollout in rollouts:
            starts.append(starts[-1] + len(rollout.log_probs))
        old = [self._old_log_probs(rollout) for rollout in rollouts]
        num_steps = advantage.shape[1]
        parts = min(training.updates_per_epoch, num_steps)
        for epoch in range(training.inner_epochs):
            shuffle = generator("update", self.config.seed, self.iteration, epoch)
            order = torch.randperm(num_steps, generator=shuffle)
            for part in range(parts):
                columns = order[part::parts].tolist()
                for rollout, start, before in zip(rollouts, starts, old, strict=False):
                    size = training.micro_batch or len(rollout.log_probs)
                    for row in range(0, len(rollout.log_probs), size):
                        some = slice(row, min(row + size, len(rollout.log_probs)))
                        share = (some.stop - some.start) / (len(advantage) * len(columns))
                        for column in columns:
                            target = advantage[start + some.start : start + some.stop, column]
                            first = epoch == 0 and part == 0
                            self._backward(rollout, some, column, before[some, column], target, share, first, meter)
                self._step(meter)
        return meter.record() | {
            "update/learning_rate": self.optimizer.param_groups[0]["lr"],
            "update/skipped": self.skipped,
        }

    def _backward(
        self,
        rollout: Rollout,
        some: slice,
        column: int,
        old_log_prob: Tensor,
        advantage: Tensor,
        share: float,
        first: bool,
        meter: "Meter",
    ) -> None:
        """Accumulate the gradient of one micro-batch: rows `some` at trained step `column`."""
        method = self.config.method
        step = self._gaussian(rollout, some, column)
        log_ratio = sde.log_prob(step, rollout.next_latents[some, column]) - old_log_prob
        drift = float(log_ratio.detach().abs().max())
        meter.maximum("update/ratio_max", math.exp(min(drift, 80.0)))
        if first:
            meter.maximum("update/first_ratio_error", drift)
            self._guard_first_ratio(drift)
        if method.ratio_norm:
            assert rollout.means is not None
            log_ratio = normalized_log_ratio(log_ratio, step, sde.Gaussian(rollout.means[some, column], step.std))
        surrogate = clipped_surrogate(log_ratio, advantage, method.clip_range)
        loss = surrogate.losses.mean()
        if method.beta:
            with torch.no_grad(), self.policy.base():
                base = self._gaussian(rollout, some, column)
            kl = gaussian_kl(step, base).mean()
            meter.mean("update/kl", float(kl.detach()), share)
            loss = loss + method.beta * kl
        meter.mean("update/loss", float(loss.detach()), share)
        meter.mean("update/clip_share", float(surrogate.clip_share), share)
        (loss * share).backward()

    def _gaussian(self, rollout: Rollout, some: slice, column: int) -> sde.Gaussian:
        latents = rollout.latents[some, column]
        sigma, sigma_next = (
            rollout.sigmas[int(rollout.steps[column]) + i].expand(len(latents)) for i in (0, 1)
        )  # fmt: skip
        velocity = self.policy.velocity(latents, sigma, rows(rollout.conditioning, some))
        return complete_dynamics(self.dynamics, rollout.sigmas)(latents, velocity, sigma, sigma_next)

    @torch.no_grad()
    def _old_log_probs(self, rollout: Rollout) -> Tensor:
        if self.config.training.old_log_probs == "rollout":
            return rollout.log_probs
        size = self.config.training.micro_batch or len(rollout.log_probs)
        old = torch.empty_like(rollout.log_probs)
        for row in range(0, len(old), size):
            some = slice(row, row + size)
            for column in range(old.shape[1]):
                old[some, column] = sde.log_prob(
                    self._gaussian(rollout, some, column), rollout.next_latents[some, column]
                )
        return old

    def _step(self, meter: "Meter") -> None:
        """Average gradients over processes, check, clip, step."""
        missing = [p for p in self.parameters if p.grad is None]
        for p in missing:
            p.grad = torch.zeros_like(p)
        if self.accelerator.num_processes > 1:
            reduced = self.accelerator.reduce([p.grad for p in self.parameters], reduction="mean")
            for p, gradient in zip(self.parameters, reduced, strict=True):
                p.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.training.max_grad_norm)
        self._guard_synchronised(norm)
        meter.mean("update/grad_norm", float(norm), 1.0)
        if bool(norm.isfinite()):
            self.optimizer.step()
            self.scheduler.step()
            self.updates += 1
            if self.ema is not None:
                decay = min(self.config.training.ema_decay, (1 + self.updates) / (10 + self.updates))
                for name, tensor in self.policy.trainable_state().items():
                    self.ema[name].lerp_(tensor, 1 - decay)
        else:
            self._skip(norm)
        self.optimizer.zero_grad(set_to_none=True)

    # ---- guards

    def _check(self) -> None:
        training, processes = self.config.training, self.accelerator.num_processes
        if len(self.train_dataset) == 0:
            raise UserError("The training data is empty; give at least one example.")
        if training.prompts_per_iteration % processes:
            raise UserError(
                f"training.prompts_per_iteration is {training.prompts_per_iteration}, which {processes} processes do "
                f"not divide; whole groups stay on one process, so make it a multiple of {processes}."
            )
        rows_per_process = training.prompts_per_iteration // processes * self.config.rollout.num_generations
        if training.micro_batch and rows_per_process % training.micro_batch:
            raise UserError(
                f"training.micro_batch is {training.micro_batch}, which does not divide the {rows_per_process} rows of "
                f"an iteration (prompts x num_generations per process)."
            )
        probe = torch.zeros(1, 1, 1)
        dynamics = complete_dynamics(self.dynamics, torch.tensor([1.0, 0.8, 0.0]))
        std = dynamics(probe, probe, torch.tensor([0.8]), torch.tensor([0.6])).std
        if not bool((std > 0).all()):
            raise UserError(
                f"rollout.dynamics '{self.config.rollout.dynamics.use}' has no noise (std {float(std):g}), but training "
                f"needs stochastic steps; set a noise_level above 0."
            )

    def _guard_first_ratio(self, drift: float) -> None:
        """Before the first optimizer step the policy is the one that sampled, so the ratio must be 1."""
        tolerance = 1e-5 if self.policy.dtype == torch.float32 else 1e-3
        if not drift <= tolerance:
            raise TrainingError(
                f"The first ratio of iteration {self.iteration} is off 1 by {drift:.1e} (allowed {tolerance:.0e} in "
                f"{str(self.policy.dtype).removeprefix('torch.')}): sampling and training compute different log-probs. "
                f"Set training.old_log_probs=recompute, or switch dropout off."
            )

    def _guard_synchronised(self, norm: Tensor) -> None:
        if self.accelerator.num_processes > 1:
            norms = self.accelerator.gather(norm.detach().reshape(1))
            if not bool((norms == norms[0]).all() | norms.isnan().all()):
                raise TrainingError(
                    f"Gradients differ between processes ({norms.tolist()}): they are not synchronised, so every "
                    f"process would train another model."
                )

    def _skip(self, norm: Tensor) -> None:
        self.skipped += 1
        if self.skipped >= 3:
            raise TrainingError(
                f"The gradient is not finite ({float(norm)}) for the third time, in iteration {self.iteration}; "
                f"lower the learning rate or train in float32. The last checkpoint is untouched."
            )

    # ---- evaluation, tracking, checkpoints

    def _evaluation_is_due(self) -> bool:
        every, last = self.config.evaluation.every, self.iteration == self.config.training.iterations
        return last or bool(every and self.iteration % every == 0)

    def _evaluate(self, run: RunFolder, iteration: int) -> Evaluation | None:
        if not self.eval_examples:
            return None
        self._stage("evaluation")
        with self.clock("evaluation"), self._averaged_weights():
            evaluation = evaluations.evaluate(
                self.policy, self.eval_examples, self.rewards, self.metrics, self.config.evaluation,
                self.config.rollout.num_inference_steps, iteration, self.accelerator,
            )  # fmt: skip
            if self.accelerator.is_main_process:
                evaluation.save(run.evaluation(iteration))
                save_grid(evaluation, run.samples)
                self.observer.on_evaluation(evaluation)
        return evaluation

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Inside it the policy has the averaged weights, where there is an average."""
        if self.ema is None:
            yield
            return
        own = {name: tensor.clone() for name, tensor in self.policy.trainable_state().items()}
        self.policy.load_trainable_state(self.ema)
        try:
            yield
        finally:
            self.policy.load_trainable_state(own)

    def _track(self, run: RunFolder, record: dict[str, float], observer: Observer) -> None:
        if not self.accelerator.is_main_process:
            return
        record = {"iteration": self.iteration, "samples": self.samples, **record, **self.clock.record()}
        record["memory/peak_gib"] = peak_memory_gib(self.policy.device)
        run.log(record)
        self.accelerator.log({k: v for k, v in record.items() if k != "iteration"}, step=self.iteration)
        observer.on_iteration(record)

    def _checkpoint_is_due(self) -> bool:
        last = self.iteration == self.config.training.iterations
        return last or self.stop_requested or self.iteration % self.config.checkpoint.every == 0

    def _save(self, run: RunFolder) -> None:
        rng = gather_object([torch.get_rng_state()])
        if self.accelerator.is_main_process:
            state = TrainingState(
                self.iteration,
                {n: getattr(self, n) for n in ("samples", "updates", "skipped", "constant_streak")},
                self.optimizer.state_dict(),
                self.scheduler.state_dict(),
                self.policy.trainable_state(),
                self.ema,
                rng,
            )
            path = checkpoints.save(run.checkpoints, state, self.policy, run.config.read_text(encoding="utf-8"))
            checkpoints.prune(run.checkpoints, self.config.checkpoint.keep)
            self.observer.on_checkpoint(path)
        self.accelerator.wait_for_everyone()

    def _save_before(self, run: RunFolder) -> None:
        """Keep the finished iterations when a reward or an example fails: that happens before the update."""
        if self.accelerator.num_processes == 1 and self.iteration > 1 and self.updates_at_start == self.updates:
            self.iteration -= 1
            self._save(run)

    def _restore(self, run: RunFolder) -> None:
        found = checkpoints.checkpoints(run.checkpoints)
        if not found:
            return
        state = checkpoints.load(found[-1])
        self.policy.load_trainable_state(state.trainable)
        try:
            self.optimizer.load_state_dict(dict(state.optimizer))
        except ValueError as error:
            raise UserError(f"The optimizer state in '{found[-1]}' is of another model: {error}") from error
        self.scheduler.load_state_dict(dict(state.scheduler))
        if self.ema is not None and state.ema is not None:
            self.ema = {n: t.to(self.ema[n]) for n, t in state.ema.items()}
        for name, value in state.progress.items():
            setattr(self, name, value)
        self.iteration = state.iteration
        if self.accelerator.process_index < len(state.rng):
            torch.set_rng_state(state.rng[self.accelerator.process_index])

    # ---- the run folder

    def _open_run(self, resume: RunFolder | None, config_yaml: str | None) -> RunFolder:
        from customized_grpo.config import to_yaml

        run = resume
        if self.accelerator.is_main_process and resume is None:
            run = RunFolder.create(self.config.output)
            run.config.write_text(config_yaml or to_yaml(self.config), encoding="utf-8")
            run.describe(**provenance())
        if self.accelerator.num_processes > 1:
            run = RunFolder(Path(gather_object([str(run.path) if run else ""])[0]))
        assert run is not None
        if resume is not None:
            self._restore(run)
            if self.accelerator.is_main_process:
                run.rewind(self.iteration)
                run.describe(status="running", finished=None)
        start_trackers(self.accelerator, self.config.tracking, run)
        return run

    def _summary(self, run: RunFolder) -> Summary:
        total = sum(p.numel() for p in self.policy.module.parameters())
        settings = self.config.rollout
        summary = Summary(
            run=run.path,
            model=self.policy.name,
            trainable_parameters=sum(p.numel() for p in self.parameters),
            total_parameters=total,
            rewards=tuple(self.rewards),
            samples_per_iteration=self.config.training.prompts_per_iteration * settings.num_generations,
            start_iteration=self.iteration,
            iterations=self.config.training.iterations,
            device=str(self.policy.device),
            expected_seconds=self._expected_seconds(),
        )
        fields = ("model", "trainable_parameters", "total_parameters", "rewards", "samples_per_iteration")
        run.describe(name=run.path.name, summary={name: getattr(summary, name) for name in fields})
        return summary

    def _expected_seconds(self) -> float:
        """Time one forward and one forward with backward on a chunk, and count how many there will be."""
        settings, training = self.config.rollout, self.config.training
        count = training.prompts_per_iteration // self.accelerator.num_processes
        prompts = min(count, settings.chunk_prompts or count)
        example = self.train_dataset[0]
        with torch.no_grad():
            conditioning = self.policy.encode([example] * prompts * settings.num_generations)
        size = min(training.micro_batch or prompts * settings.num_generations, prompts * settings.num_generations)
        small = rows(conditioning, slice(0, size))
        latents = torch.zeros(size, *self.policy.latent_shape(small), device=self.policy.device)
        sigma = torch.full((size,), 0.5, device=self.policy.device)

        def forward(backward: bool) -> float:
            begin = time.perf_counter()
            with torch.set_grad_enabled(backward):
                velocity = self.policy.velocity(latents, sigma, small)
            if backward:
                velocity.square().mean().backward()
            float(velocity.detach().sum())
            return time.perf_counter() - begin

        forward(True)
        sampling, learning = forward(False), forward(True)
        self.optimizer.zero_grad(set_to_none=True)
        per_row = 1 / size * count * settings.num_generations
        trained = len(self._step_plan().trained) * training.inner_epochs
        iteration = per_row * (settings.num_inference_steps * sampling + trained * learning)
        evaluated = len(self.eval_examples) * self.config.evaluation.replicates / self.accelerator.num_processes
        every = self.config.evaluation.every
        times = 2 + (training.iterations - 1) // every if every else 2
        evaluation = evaluated / size * settings.num_inference_steps * sampling * times
        return iteration * (training.iterations - self.iteration) + evaluation

    def _close(self, run: RunFolder, status: str, started: float) -> None:
        if self.accelerator.is_main_process:
            run.describe(status=status, finished=now(), seconds=round(time.monotonic() - started, 1))

    def _finish(self, run: RunFolder, first: Evaluation | None, last: Evaluation | None, started: float) -> Result:
        interrupted = self.iteration < self.config.training.iterations
        self._close(run, "interrupted" if interrupted else "finished", started)
        self.accelerator.end_training()
        changes: list[Change] = []
        if self.accelerator.is_main_process and self.eval_examples:
            save_history(run)
            before = first or evaluations.load(run.evaluation(0), self.eval_examples)
            if before is not None and last is not None:
                changes = evaluations.changes(before, last)
        return Result(run.path, changes, time.monotonic() - started, interrupted)

    # ---- small things

    def _make_scheduler(self) -> Any:
        from diffusers.optimization import get_scheduler

        training = self.config.training
        total = training.iterations * training.inner_epochs * training.updates_per_epoch
        return get_scheduler(
            training.lr_schedule, self.optimizer, num_warmup_steps=training.warmup_updates, num_training_steps=total
        )

    def _gather(self, values: Tensor) -> Tensor:
        """Concatenate over processes along the first axis, on CPU."""
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()

    def _stage(self, name: str) -> None:
        if self.accelerator.is_main_process:
            self.observer.on_stage(name)

    def _should_stop(self) -> bool:
        """Whether any process was told to stop, agreed by all."""
        if self.accelerator.num_processes == 1:
            return self.stop_requested
        self.stop_requested = any(gather_object([self.stop_requested]))
        return self.stop_requested

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM finish the iteration, save and stop. A second SIGINT stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self.stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_requested = True

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Clock:
    """Seconds by stage within an iteration. `other` is what no stage claimed."""

    STAGES = ("rollout", "decode", "rewards", "update", "evaluation")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started, self.seconds = time.perf_counter(), dict.fromkeys(self.STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if stage in self.seconds:
                self.seconds[stage] += time.perf_counter() - begin

    def record(self) -> dict[str, float]:
        total = time.perf_counter() - self.started
        claimed = {f"seconds/{stage}": seconds for stage, seconds in self.seconds.items()}
        return claimed | {"seconds/other": max(0.0, total - sum(self.seconds.values()))}


class Meter:
    """Weighted means and maxima of one update."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.maxima: dict[str, float] = {}

    def mean(self, name: str, value: float, weight: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value * weight
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def maximum(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, -math.inf), value)

    def record(self) -> dict[str, float]:
        return {name: self.sums[name] / self.weights[name] for name in self.sums} | self.maxima
