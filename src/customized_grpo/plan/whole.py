"""What the passes of a model of full size take, from passes of models with two and three blocks of each kind."""

import gc
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from customized_grpo.train.memory import Passes

K = TypeVar("K")
Operations = dict[torch.dtype, float]
"""Floating-point operations of matrix products, convolutions and attention, by the dtype of what they give."""


def _attention(query: Any, key: Any, value: Any, *args: Any, out_val: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any, **more: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


FORMULAS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""PyTorch's own, and for its attention on CPUs those of the same attention on GPUs."""


class CountOperations(TorchDispatchMode):
    """Inside it floating-point operations are counted."""

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
    """One pass: bytes after each operation, and which operation it was."""

    bytes: Sequence[int]
    operations: Sequence[object]


def extended(small: Trace, larger: Mapping[str, Trace], missing: Mapping[str, int]) -> list[int]:
    """The bytes of a pass of a model that has `missing` more blocks of each kind than the small one.

    Blocks of a kind are equal, so each operation of the small model is found again in one with a block more: counted
    from the beginning, in one of the first blocks, and counted from the end, in one of the last. What it holds grows by
    the same for every further block. Of the two growths the larger one is the higher moment. A block of which only a
    part is found is left out: it may be of another kind, and the small model has two of each.

    Args:
        small: of the small model.
        larger: by kind, of the model with one more block of it.
        missing: by kind.
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
    """How many operations, with the shapes of what they gave, are equal from the beginning."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class WholeModel:
    """`Passes` of a model of full size.

    Args:
        small: of a model with few blocks.
        larger: by kind of block, of one with a block more.
        missing: by kind, how many blocks the small model lacks.
    """

    def __init__(self, small: Passes, larger: Mapping[str, Passes], missing: Mapping[str, int]) -> None:
        self.small, self.larger, self.missing = small, larger, missing
        self.encoding, self.decode_batch, self.decode = small.encoding, small.decode_batch, cache(small.decode)
        self.conditioning_bytes, self.latent_bytes = small.conditioning_bytes, small.latent_bytes
        self._measured, self._bytes = cache(self._measure), cache(self._extend)

    @property
    def picture_bytes(self) -> int:
        return self.small.picture_bytes

    def forward(self, count: int) -> list[int]:
        return self._bytes("forward", count)

    def learn(self, count: int) -> list[int]:
        return self._bytes("learn", count)

    def operations(self, name: str) -> Operations:
        """Of a pass, for each row."""
        counts = [self._measured(passes, name, 2)[1] for passes in (self.small, *self.larger.values())]
        return combined((1 / 2, self.extrapolated(counts)))

    def extrapolated(self, counts: Sequence[Mapping[K, float]]) -> dict[K, float]:
        """What is linear in the number of blocks: the small model's, then one for each of the larger models."""
        small, *larger = counts
        growths = list(zip(self.missing.values(), larger, strict=True))
        return {key: held + sum(n * (more[key] - held) for n, more in growths) for key, held in small.items()}

    def _extend(self, name: str, count: int) -> list[int]:
        if count == 1:  # on the line through two and three, which saves counting it
            two, three = self._bytes(name, 2), self._bytes(name, 3)
            return [2 * a - b for a, b in zip(two, three, strict=True)]
        traces = [self._measured(passes, name, count)[0] for passes in (self.small, *self.larger.values())]
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
                held = getattr(passes, name)(count)
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
