"""Memory and operations of a full-size model, extrapolated from models with two and three blocks of each kind."""

import gc
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from customized_grpo.policies.contract import Policy
from customized_grpo.structures import Example
from customized_grpo.train.memory import Passes

K = TypeVar("K")
Operations = dict[torch.dtype, float]
"""Floating-point operations of matrix products, convolutions and attention, by the dtype of their results."""


aten = torch.ops.aten
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
"""PyTorch's own formulas. It has none for its attention on CPUs, which takes those of the same attention on GPUs."""


class CountOperations(TorchDispatchMode):
    """Counts floating-point operations inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Operations = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            dtype = next(leaf.dtype for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
            self.counts[dtype] = self.counts.get(dtype, 0) + formula(*args, **(kwargs or {}), out_val=out)
        return out


class Trace(NamedTuple):
    """One pass: the bytes after each operation, and the operations."""

    bytes: Sequence[int]
    operations: Sequence[object]


def extended(small: Trace, larger: Mapping[str, Trace], missing: Mapping[str, int]) -> list[int]:
    """The bytes of a pass of a model that has `missing` more blocks of each kind than the small one.

    Blocks of a kind are equal, so each operation of the small model is found again in one with a block more: counted
    from the beginning, in one of the first blocks, and counted from the end, in one of the last. What it holds grows by
    the same for every further block. Of the two growths the larger one is the higher moment. A block of which only a
    part is found is left out: it may be of another kind, and the small model has two of each.

    Args:
        small: the trace of the small model.
        larger: by kind, the trace of the model with one more block of this kind.
        missing: by kind, how many blocks the small model lacks.
    """
    totals = list(small.bytes)
    for kind, more in larger.items():
        beyond = abs(len(more.bytes) - len(small.bytes)) // 4  # blocks of two kinds may begin or end alike
        start = _equal(small.operations, more.operations) - beyond
        end = _equal(small.operations[::-1], more.operations[::-1]) - beyond
        for n, held in enumerate(small.bytes):
            growths = [more.bytes[n] - held] if n < start else []
            back = n - len(small.bytes)
            growths += [more.bytes[back] - held] if -back <= end else []
            totals[n] += missing[kind] * max(growths, default=0)
    return totals


def _equal(one: Sequence[object], other: Sequence[object]) -> int:
    """How many operations, with the shapes of their results, are equal from the beginning."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class WholeModel(Passes):
    """Passes of a model of full size.

    Args:
        policy, example, base: see `Passes`. The policy has few blocks.
        larger: by kind of block, the passes of a policy with one more block.
        missing: by kind, how many blocks the policy lacks.
    """

    def __init__(
        self, policy: Policy, example: Example, larger: Mapping[str, Passes], missing: Mapping[str, int],
        base: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(policy, example, base)
        self.larger, self.missing = larger, missing
        self._trace, self._bytes, self._decoded = cache(self._measure), cache(self._extend), cache(super().decode)

    def decode(self, count: int) -> list[int]:
        return self._decoded(count)

    def forward(self, count: int) -> list[int]:
        return self._bytes("forward", count)

    def learn(self, count: int) -> list[int]:
        return self._bytes("learn", count)

    def operations(self, name: str) -> Operations:
        """Operations of a pass per row."""
        counts = [self._trace(passes, name, 2)[1] for passes in (self, *self.larger.values())]
        return combined((1 / 2, self.extrapolated(counts)))

    def extrapolated(self, counts: Sequence[Mapping[K, float]]) -> dict[K, float]:
        """Extrapolate what is linear in the number of blocks: `counts` of the small model, then of each larger one."""
        small, *larger = counts
        growths = list(zip(self.missing.values(), larger, strict=True))
        return {key: held + sum(n * (more[key] - held) for n, more in growths) for key, held in small.items()}

    def _extend(self, name: str, count: int) -> list[int]:
        if count == 1:  # on the line through two and three, which saves counting it
            two, three = self._bytes(name, 2), self._bytes(name, 3)
            return [2 * a - b for a, b in zip(two, three, strict=True)]
        traces = [self._trace(passes, name, count)[0] for passes in (self, *self.larger.values())]
        phases = zip(*traces, strict=True)
        return [
            held
            for small, *larger in phases
            for held in extended(small, dict(zip(self.larger, larger, strict=True)), self.missing)
        ]

    def _measure(self, passes: Passes, name: str, count: int) -> tuple[list[Trace], Operations]:
        """The traces of the forward and of the backward pass, and the operations of both."""
        gc.collect()
        gc.disable()  # what it frees, it frees at another operation each time
        try:
            with CountOperations() as counted:
                held = getattr(Passes, name)(passes, count)
        finally:
            gc.enable()
        end = passes.backward if name == "learn" else len(held)
        done = passes.seen.operations
        traces = [Trace(held[part], done[part]) for part in (slice(0, end), slice(end, None))]
        return traces, counted.counts


def combined(*parts: tuple[float, Operations]) -> Operations:
    """The sum of operations, each times a factor."""
    dtypes = {dtype for _, counts in parts for dtype in counts}
    return {dtype: sum(factor * counts.get(dtype, 0) for factor, counts in parts) for dtype in dtypes}
