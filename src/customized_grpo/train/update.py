"""The update: rollouts to optimizer steps on any objective, with the guards against training nothing."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from customized_grpo.distributed import any_process, average, combine, fail_together, gather
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.policies.contract import move_towards, weights_replaced
from customized_grpo.randomness import generator
from customized_grpo.settings import Spec
from customized_grpo.settings.build import construct
from customized_grpo.structures import Rollout
from customized_grpo.train.checkpoint import TrainingState
from customized_grpo.train.memory import explain_full_device
from customized_grpo.train.meters import Meter
from customized_grpo.train.objectives import MicroBatch, Objective
from customized_grpo.train.settings import TrainingSettings
from customized_grpo.train.sharding import full, in_step, is_sharded, own, sharded_like


def micro_batches(
    rollouts: Sequence[Rollout], advantage: Tensor, columns: list[int], size: int | None, first: bool
) -> Iterator[MicroBatch]:
    """All rows at the given columns, `size` rows at a time; None takes whole rollouts."""
    start = 0
    for rollout in rollouts:
        count = len(rollout)
        for low in range(0, count, size or count):
            some = slice(low, min(low + (size or count), count))
            share = (some.stop - some.start) / (len(advantage) * len(columns))
            for column in columns:
                own = advantage[start + some.start : start + some.stop, column]
                yield MicroBatch(rollout, some, column, own, share, first)
        start += count


def try_optimizer(spec: Spec, weight: Tensor) -> set[str]:
    """Step on two weights like this one from 0, with opposite gradients, and see that they part.

    Returns:
        The names of what the optimizer keeps for a weight.

    Raises:
        UserError: if it cannot step on dense gradients without a closure, or the gradient moves nothing.
    """
    copies = [torch.nn.Parameter(torch.zeros_like(weight)) for _ in range(2)]
    trial = construct(spec, "optimizer", params=copies)
    if not isinstance(trial, torch.optim.Optimizer):
        raise UserError(f"optimizer: {spec.use} gives a {type(trial).__name__}, which is no torch.optim.Optimizer.")
    for copy, sign in zip(copies, (1.0, -1.0), strict=True):
        copy.grad = torch.full_like(copy, sign)
    try:
        trial.step()
    except Exception as error:  # anybody's optimizer
        raise UserError(
            f"optimizer: {spec.use} cannot take a step with dense gradients and without a closure "
            f"({type(error).__name__}: {' '.join(str(error).split())[:150]}); use another, such as AdamW."
        ) from error
    finite = all(bool(copy.isfinite().all()) for copy in copies)
    if not finite or torch.equal(*copies):
        raise UserError(
            f"optimizer: a step of {spec.use} with lr={trial.param_groups[0].get('lr')} "
            f"{'does not follow the gradient' if finite else 'is not finite'}, so nothing would train; set a learning "
            f"rate above 0, such as 1e-4."
        )
    return {str(name) for name in trial.state[copies[0]]}


class Updater:
    """Owns the optimizer, its schedule and the weight average; turns rollouts and advantages into optimizer steps.

    Args:
        objective: which gives the loss of a micro-batch, and has the policy.
        settings: of the update.
        accelerator: of the run.
        seed: of the order of the steps.
        total: optimizer steps of the whole run, for schedules that end with it; None is the most there can be.

    Raises:
        UserError: if the optimizer cannot train: it needs a closure or sparse gradients, or its step moves nothing.
        TrainingError: if nothing is trainable.
    """

    def __init__(
        self,
        objective: Objective,
        settings: TrainingSettings,
        accelerator: Accelerator,
        seed: int,
        total: int | None = None,
    ) -> None:
        self.objective, self.policy, self.settings = objective, objective.policy, settings
        self.accelerator, self.seed, self.iteration = accelerator, seed, 0
        self.parameters = self.policy.trainable_parameters()
        if not self.parameters:
            raise TrainingError("The policy has no trainable parameter: the adapter is bound to nothing.")
        self.optimizer: torch.optim.Optimizer = construct(settings.optimizer, "optimizer", params=self.parameters)
        self.state_names = try_optimizer(settings.optimizer, own(self._smallest[1]))
        self.scheduler = self._make_scheduler(total)
        self.ema = {n: t.clone() for n, t in self.policy.trainable_state().items()} if settings.ema_decay else None
        self.updates, self.skipped, self.moved = 0, 0, False
        self.first_norm: float | None = None
        """|v| of the first iteration, where there is no base policy to compare with."""
        self.whole = True
        """Whether the weights are those after a finished iteration."""

    @property
    def _smallest(self) -> tuple[int, Tensor]:
        return min(enumerate(self.parameters), key=lambda pair: pair[1].numel())

    def _make_scheduler(self, total: int | None, done: int = 0) -> Any:
        """The schedule at the optimizer step `done` of `total`."""
        from diffusers.optimization import get_scheduler

        training = self.settings
        if total is None:
            total = training.iterations * training.inner_epochs * training.updates_per_epoch
        name = "constant_with_warmup" if training.lr_schedule == "constant" else training.lr_schedule
        return get_scheduler(
            name, self.optimizer, num_warmup_steps=training.warmup_updates, num_training_steps=total,
            last_epoch=done - 1,
        )  # fmt: skip

    def __call__(self, iteration: int, rollouts: Sequence[Rollout], advantage: Tensor) -> dict[str, float]:
        """inner_epochs x updates_per_epoch optimizer steps.

        Args:
            iteration: for the order of the steps, and for messages.
            rollouts: the chunks of this process.
            advantage: (rows of all chunks, S).

        Returns:
            What metrics.jsonl says under update/.

        Raises:
            TrainingError: from a guard.
        """
        self.iteration = self.objective.iteration = iteration
        meter, num_steps = Meter(), advantage.shape[1]
        parts = min(self.settings.updates_per_epoch, num_steps)
        orders = [
            torch.randperm(num_steps, generator=generator("update", self.seed, iteration, epoch)).tolist()
            for epoch in range(self.settings.inner_epochs)
        ]
        with self._memory():
            rollouts = self.objective.prepare(rollouts, orders[0][::parts])
        for epoch, order in enumerate(orders):
            for part in range(parts):
                columns, size = order[part::parts], self.settings.micro_batch
                with self._memory():
                    for batch in micro_batches(rollouts, advantage, columns, size, first=epoch == part == 0):
                        self._backward(batch, meter)
                if epoch == part == 0:
                    with fail_together(self.accelerator):
                        self.objective.check_first(meter)
                self._step(meter, teaches=bool(advantage[:, columns].any()))
        self.objective.after_iteration(self.updates)
        self.whole = True
        record = combine(self.accelerator, mean=meter.means(), maximum=meter.maxima())
        if "update/velocity_norm" in record and not self.objective.config.method.needs_base:
            self.first_norm = self.first_norm or record["update/velocity_norm"]
            record["update/velocity_norm"] /= self.first_norm
        return record | {
            "update/learning_rate": self.optimizer.param_groups[0]["lr"],
            "update/skipped": self.skipped,
        }

    def _backward(self, batch: MicroBatch, meter: Meter) -> None:
        """Accumulate the gradient of one micro-batch."""
        loss = self.objective.loss(batch, meter)
        meter.mean("update/loss", loss, batch.share)
        (loss * batch.share).backward()

    def _step(self, meter: Meter, teaches: bool) -> None:
        """Average gradients over processes, check, clip, step. `teaches`: whether any advantage is not 0."""
        self.whole = False
        missing = [p for p in self.parameters if p.grad is None]
        for p in missing:
            p.grad = torch.zeros_like(p)
        if self.accelerator.num_processes > 1 and not is_sharded(self.policy):
            reduced = average(self.accelerator, [cast(Tensor, p.grad) for p in self.parameters])
            for p, gradient in zip(self.parameters, reduced, strict=True):
                p.grad = gradient
        norm = full(torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm))
        with fail_together(self.accelerator):
            self._guard_synchronised(norm)
        meter.mean("update/grad_norm", norm, 1.0)
        if bool(norm.isfinite()):
            with self._guard_moved(norm, teaches), self._memory():
                self.optimizer.step()
            self.scheduler.step()
            self.updates += 1
            if self.ema is not None:
                decay = min(self.settings.ema_decay, (1 + self.updates) / (10 + self.updates))
                move_towards(self.ema, self.policy.trainable_state(), 1 - decay)
        else:
            with fail_together(self.accelerator):
                self._skip(norm)
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Memory that runs out on one process ends the update on all of them."""
        together = in_step(self.policy)
        with fail_together(self.accelerator), together, explain_full_device(self.policy.device, "update"):
            yield

    # ---- guards

    @contextmanager
    def _guard_moved(self, norm: Tensor, teaches: bool) -> Iterator[None]:
        """The first optimizer step that has something to learn, and a learning rate, must change a weight."""
        if self.moved or not teaches or not any(float(group["lr"]) for group in self.optimizer.param_groups):
            yield
            return
        if not norm > 0:
            raise TrainingError(
                f"The gradient of iteration {self.iteration} is exactly 0 although advantages are not: the trainable "
                f"weights do not reach the velocity; check the policy (check_policy does) and its adapter."
            )
        pairs = [(own(p.detach()).flatten(), own(p.grad).abs()) for p in self.parameters if p.grad is not None]
        places = [(weight, int(gradient.argmax())) for weight, gradient in pairs if weight.numel()]
        before = [weight[place].clone() for weight, place in places]
        yield
        moved = any(bool(old != weight[place]) for old, (weight, place) in zip(before, places, strict=True))
        self.moved = any_process(self.accelerator, moved)
        if not self.moved:
            raise TrainingError(
                f"The first optimizer step (iteration {self.iteration}) changed no weight: the gradient has norm "
                f"{float(norm):.1e} and the learning rate is {float(self.optimizer.param_groups[0]['lr']):.1e}; raise "
                f"the learning rate."
            )

    def _guard_synchronised(self, norm: Tensor) -> None:
        if self.accelerator.num_processes > 1:
            norms = gather(self.accelerator, norm.detach().reshape(1))
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

    # ---- the average

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside it the policy has the averaged weights, where there is an average."""
        return weights_replaced(self.policy, self.ema)

    # ---- what a checkpoint holds

    def state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "objective": self.objective.state(),
        }

    def restore(self, state: TrainingState, changed: Collection[str] = (), total: int | None = None) -> None:
        """Inverse of `state`, with the trained weights and their average.

        Args:
            state: from a checkpoint.
            changed: arguments of the optimizer that the settings give another value than the checkpoint was trained
                with. The optimizer takes the new value; other hyperparameters may have moved and are restored.
            total: optimizer steps of the whole run, done and to come. The learning rate goes on where the schedule of
                the settings, at this length, is after the steps done.

        Raises:
            UserError: if the checkpoint is of another model, or the optimizer cannot take a new value.
        """
        fresh = [dict(group) for group in self.optimizer.param_groups]
        self._check_changed(state, changed)
        mine = self.policy.trainable_state()
        trainable, ema, objective = (
            {name: sharded_like(tensor, mine.get(name)) for name, tensor in weights.items()}
            for weights in (state.trainable, state.ema or state.trainable, state.objective)
        )
        kept = {
            index: {name: sharded_like(tensor, self.parameters[index]) for name, tensor in kept.items()}
            for index, kept in state.optimizer["state"].items()
        }
        self.policy.load_trainable_state(trainable)
        try:
            self.optimizer.load_state_dict({**state.optimizer, "state": kept})
        except ValueError as error:
            raise UserError(f"The optimizer state of the checkpoint is of another model: {error}") from error
        for group, new in zip(self.optimizer.param_groups, fresh, strict=True):
            group |= {name: new[name] for name in changed} | {"initial_lr": new["initial_lr"], "lr": new["initial_lr"]}
        self.scheduler = self._make_scheduler(total, done=state.scheduler["last_epoch"])
        if self.ema is not None:
            self.ema = {n: t.to(self.ema[n]) for n, t in ema.items()}
        self.objective.restore(objective)

    def _check_changed(self, state: TrainingState, changed: Collection[str]) -> None:
        index, _ = self._smallest
        kept = state.optimizer["state"].get(index, {})
        lacking = sorted(self.state_names - set(kept)) if kept else []
        odd = sorted(set(changed) - set(self.optimizer.param_groups[0]))
        if changed and (lacking or odd):
            why = f"the checkpoint has no '{lacking[0]}'" if lacking else f"{self.settings.optimizer.use} reads it once"
            raise UserError(
                f"training.optimizer.{odd[0] if odd else sorted(changed)[0]} cannot change in a resumed run, because "
                f"{why}; set it to its old value, or start a new run in another output."
            )
