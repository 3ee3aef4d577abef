"""Seconds by stage, and averages over the micro-batches of an update."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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
    """Weighted means and maxima of one update. Tensors are read at its end: until then the host does not wait."""

    def __init__(self) -> None:
        self.weighted: dict[str, list[tuple[float | Tensor, float]]] = {}
        self.compared: dict[str, list[float | Tensor]] = {}

    def mean(self, name: str, value: float | Tensor, weight: float) -> None:
        self.weighted.setdefault(name, []).append((_detached(value), weight))

    def maximum(self, name: str, value: float | Tensor) -> None:
        self.compared.setdefault(name, []).append(_detached(value))

    def means(self) -> dict[str, float]:
        return {
            name: sum(float(value) * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
            for name, pairs in self.weighted.items()
        }

    def maxima(self) -> dict[str, float]:
        return {name: max((-math.inf, *map(float, values))) for name, values in self.compared.items()}


def _detached(value: float | Tensor) -> float | Tensor:
    return value.detach() if isinstance(value, Tensor) else value
