"""The loop that trains every component: one schedule, one checkpoint format, one progress report."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from customized_grpo.settings import Settings
from customized_grpo.toyworld.pretrain.attention import PlainAttention


class Budget(Settings):
    """When a component's training ends: whichever limit comes first."""

    minutes: float | None = None
    """Wall-clock minutes, summed over resumed runs."""
    steps: int | None = None
    """Optimizer steps."""
    batch_size: int = 64
    learning_rate: float = 1e-3
    muon: bool = False
    """Train the matrices of the hidden layers with Muon instead of AdamW."""
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
    report_every: float = 20.0,
    save_every: float = 120.0,
    on_save: Callable[[], None] | None = None,
) -> None:
    """Train `module` in place until its budget is used; with `ema` > 0 it ends as the moving average of its weights.

    Args:
        loss: draws a batch with the generator it is given and returns the scalar to descend.
        checkpoint: a file to resume from and to save to, every `save_every` seconds and at the end.
        on_save: called after each save, with the averaged weights in place.

    Raises:
        ValueError: if the budget has no limit.
    """
    if budget.minutes is None and budget.steps is None:
        raise ValueError(f"The budget of '{component}' has no limit; set minutes or steps.")
    state = _State(module, budget, seed, ema)
    if checkpoint.exists():
        state.load(checkpoint)
    started = time.monotonic() - state.seconds
    reported = saved = time.monotonic()
    total, count = 0.0, 0
    module.train()
    while (share := state.share(budget)) < 1:
        state.set_learning_rate(budget, share)
        with PlainAttention():
            value = loss(state.generator)
        value.backward()
        state.step(module)
        total, count = total + float(value.detach()), count + 1
        now = time.monotonic()
        state.seconds = now - started
        if on_progress and now - reported > report_every:
            share = max(state.share(budget), 1e-9)
            on_progress(
                Progress(component, state.steps, share, total / count, state.seconds, state.seconds * (1 / share - 1))
            )
            reported, total, count = now, 0.0, 0
        if now - saved > save_every:
            state.save(checkpoint)
            if on_save:
                with state.averaged(module):
                    on_save()
            saved = time.monotonic()
    state.save(checkpoint)
    if on_progress and count:
        on_progress(Progress(component, state.steps, 1.0, total / count, state.seconds, 0.0))
    state.swap(module)
    module.eval()


class _State:
    """All that a checkpoint holds: weights, their average, optimizers, generator, and what has been spent."""

    def __init__(self, module: nn.Module, budget: Budget, seed: int, ema: float) -> None:
        self.module, self.ema, self.steps, self.seconds = module, ema, 0, 0.0
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizers = _optimizers(module, budget)
        self.average = [p.detach().clone() for p in self.parameters] if ema else []
        self.generator = torch.Generator().manual_seed(seed)

    def share(self, budget: Budget) -> float:
        by_time = self.seconds / (60 * budget.minutes) if budget.minutes else 0.0
        by_steps = self.steps / budget.steps if budget.steps else 0.0
        return max(by_time, by_steps)

    def set_learning_rate(self, budget: Budget, share: float) -> None:
        warmup = min(1.0, (self.steps + 1) / budget.warmup_steps)
        decayed = max(0.0, (share - budget.decay_from) / (1 - budget.decay_from))
        rate = budget.learning_rate * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, decayed))))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("rate_scale", 1.0)

    def step(self, module: nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.ema:
            decay = min(self.ema, (1 + self.steps) / (10 + self.steps))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    def swap(self, module: nn.Module) -> None:
        """Exchange the weights with their average."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=bool(self.ema)):
                kept = parameter.clone()
                parameter.copy_(average)
                average.copy_(kept)

    def averaged(self, module: nn.Module) -> "_Averaged":
        return _Averaged(self, module)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "module": self.module.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "seconds": self.seconds,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.module.load_state_dict(state["module"])
        for kept, average in zip(self.average, state["average"], strict=True):
            kept.copy_(average)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.steps, self.seconds = state["steps"], state["seconds"]


class _Averaged:
    """Context in which the module has its averaged weights and is in evaluation mode."""

    def __init__(self, state: _State, module: nn.Module) -> None:
        self.state, self.module = state, module

    def __enter__(self) -> None:
        self.state.swap(self.module)
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.state.swap(self.module)
        self.module.train()


def _optimizers(module: nn.Module, budget: Budget) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for embeddings, ends, gains and biases."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    hidden = [
        p
        for n, p in named
        if budget.muon and p.ndim == 2 and not any(k in n for k in ("embed", "shared", "proj_out", "head", "position"))
    ]
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, budget.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    ]
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden, budget.learning_rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers
