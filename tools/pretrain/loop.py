"""The training loop of all components."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from customized_grpo.errors import TrainingError, UserError
from customized_grpo.policies.mixed_precision import MixedPrecision
from customized_grpo.settings import Settings


class Budget(Settings):
    """Training budget and optimizer of one component. Training ends at the first limit reached."""

    minutes: float | None = None
    """Limit in minutes of wall-clock time, summed over resumed runs; None for no limit."""
    steps: int | None = None
    """Limit in optimizer steps; None for no limit."""
    batch_size: int = 64
    """Samples per optimizer step: images, or pairs of images for DINO and the generator."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW after the warm-up."""
    warmup_steps: int = 50
    """Optimizer steps in which the learning rate rises linearly."""
    decay_from: float = 0.0
    """Share of the budget after which the learning rate decays along a cosine to 1 %."""


@dataclass(frozen=True)
class Progress:
    """State of a training, as reported to `on_progress`."""

    component: str
    step: int
    share: float
    """Used share of the budget, in [0, 1]."""
    loss: float
    """Mean since the previous report."""
    seconds: float
    """Training time, summed over resumed runs."""
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
    report_every: float = 20.0,
    save_every: float = 120.0,
) -> None:
    """Train `module` in place until its budget is used. With `ema` > 0 it ends with the moving average of its weights.

    Args:
        loss: samples a batch with the given generator and returns a scalar loss.
        checkpoint: file to resume from, and to save to every `save_every` seconds and at the end.

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
            raise TrainingError(
                f"The loss of '{component}' became {losses[-1]} at step {state.steps}; lower {component}.learning_rate."
            )
        now = time.monotonic()
        state.seconds = now - started
        if on_progress and now - reported > report_every:
            on_progress(state.progress(component, budget, losses))
            reported, losses = now, []
        if now - saved > save_every:
            state.save(checkpoint)
            saved = time.monotonic()
    state.save(checkpoint)
    if on_progress and losses:
        on_progress(state.progress(component, budget, losses))
    state.swap()
    module.eval()


class _State:
    """Everything in a checkpoint: weights, their average, optimizer, generator, steps and seconds."""

    def __init__(self, module: nn.Module, budget: Budget, seed: int, ema: float) -> None:
        self.module, self.ema, self.steps, self.seconds = module, ema, 0, 0.0
        self.parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, budget.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.average = [p.detach().clone() for p in self.parameters] if ema else []
        self.generator = torch.Generator().manual_seed(seed)

    def share(self, budget: Budget) -> float:
        """Used share of the budget; may exceed 1."""
        by_time = self.seconds / (60 * budget.minutes) if budget.minutes else 0.0
        by_steps = self.steps / budget.steps if budget.steps else 0.0
        return max(by_time, by_steps)

    def progress(self, component: str, budget: Budget, losses: list[float]) -> Progress:
        share = min(1.0, self.share(budget))
        eta = self.seconds * (1 / share - 1)
        return Progress(component, self.steps, share, sum(losses) / len(losses), self.seconds, eta)

    def set_learning_rate(self, budget: Budget, share: float) -> None:
        """Linear warm-up, constant, then cosine decay to 1 %."""
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
        """Exchange the weights and their average, if there is one."""
        if self.ema:
            kept = [p.clone() for p in self.parameters]
            torch._foreach_copy_(self.parameters, self.average)
            torch._foreach_copy_(self.average, kept)

    def save(self, path: Path) -> None:
        """Save atomically."""
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
