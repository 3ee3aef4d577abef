"""The loop that trains every component: one schedule, one checkpoint format, one progress report."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from customized_grpo.errors import TrainingError, UserError
from customized_grpo.mixed_precision import MixedPrecision
from customized_grpo.settings import Settings


class Budget(Settings):
    """When a component's training ends: whichever limit comes first."""

    minutes: float | None = None
    """Wall-clock minutes, summed over resumed runs."""
    steps: int | None = None
    """Optimizer steps."""
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    decay_from: float = 0.0
    """Share of the budget after which the learning rate falls along a cosine; before it is constant."""


@dataclass(frozen=True)
class Progress:
    """One line of a training log."""

    component: str
    step: int
    share: float
    """Of the budget that is used, in [0, 1]."""
    loss: float
    """Mean since the last report."""
    seconds: float
    """Spent so far, over all resumed runs."""
    eta_seconds: float


OnProgress = Callable[[Progress], None]


def fit(
    component: str,
    module: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    budget: Budget,
    checkpoint: Path,
    *,
    seed: int,
    ema: float = 0.0,
    on_progress: OnProgress | None = None,
    on_save: Callable[[], None] | None = None,
    report_every: float = 20.0,
    save_every: float = 120.0,
) -> None:
    """Train `module` in place until its budget is used; with `ema` > 0 it ends as the moving average of its weights.

    Args:
        loss: draws a batch with the generator it is given and returns the scalar to descend.
        checkpoint: a file to resume from and to save to, every `save_every` seconds and at the end.
        on_save: called after each save, with the averaged weights in place.

    Raises:
        UserError: if the budget has no limit.
        TrainingError: if the loss is not finite.
    """
    if budget.minutes is None and budget.steps is None:
        raise UserError(f"The budget of '{component}' has no limit; set minutes or steps.")
    state = _State(module, budget, seed, ema)
    if checkpoint.exists():
        state.load(checkpoint)
    started = time.monotonic() - state.seconds
    reported = saved = time.monotonic()
    losses: list[float] = []
    module.train()
    device_type = state.parameters[0].device.type
    while (share := state.share(budget)) < 1:
        state.set_learning_rate(budget, share)
        with MixedPrecision(device_type):
            value = loss(state.generator)
        value.backward()
        state.step()
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            raise TrainingError(f"The loss of '{component}' became {losses[-1]} at step {state.steps}; lower its rate.")
        now = time.monotonic()
        state.seconds = now - started
        if on_progress and now - reported > report_every:
            on_progress(state.progress(component, budget, losses))
            reported, losses = now, []
        if now - saved > save_every:
            state.save(checkpoint)
            if on_save:
                with state.averaged():
                    on_save()
            saved = time.monotonic()
    state.save(checkpoint)
    if on_progress and losses:
        on_progress(state.progress(component, budget, losses))
    state.swap()
    module.eval()


class _State:
    """All that a checkpoint holds: weights, their average, optimizers, generator, and what has been spent."""

    def __init__(self, module: nn.Module, budget: Budget, seed: int, ema: float) -> None:
        self.module, self.ema, self.steps, self.seconds = module, ema, 0, 0.0
        self.parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, budget.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.average = [p.detach().clone() for p in self.parameters] if ema else []
        self.generator = torch.Generator().manual_seed(seed)

    def share(self, budget: Budget) -> float:
        """Of the budget that is used."""
        by_time = self.seconds / (60 * budget.minutes) if budget.minutes else 0.0
        by_steps = self.steps / budget.steps if budget.steps else 0.0
        return max(by_time, by_steps)

    def progress(self, component: str, budget: Budget, losses: list[float]) -> Progress:
        share = min(1.0, self.share(budget))
        eta = self.seconds * (1 / share - 1)
        return Progress(component, self.steps, share, sum(losses) / len(losses), self.seconds, eta)

    def set_learning_rate(self, budget: Budget, share: float) -> None:
        """Warm up, stay, and fall along a cosine to one per cent."""
        warmup = min(1.0, (self.steps + 1) / budget.warmup_steps)
        fallen = min(1.0, max(0.0, (share - budget.decay_from) / (1 - budget.decay_from)))
        rate = budget.learning_rate * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fallen)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.ema:
            decay = min(self.ema, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights with their average, if one is kept."""
        if self.ema:
            kept = [p.clone() for p in self.parameters]
            torch._foreach_copy_(self.parameters, self.average)
            torch._foreach_copy_(self.average, kept)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The module with its averaged weights, in evaluation mode."""
        self.swap()
        self.module.eval()
        yield
        self.swap()
        self.module.train()

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "module": self.module.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "seconds": self.seconds,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.module.load_state_dict(state["module"])
        for kept, average in zip(self.average, state["average"], strict=True):
            kept.copy_(average)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.steps, self.seconds = state["steps"], state["seconds"]
