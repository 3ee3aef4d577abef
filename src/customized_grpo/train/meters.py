"""Seconds by stage, and averages over the micro-batches of an update."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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

    def means(self) -> dict[str, float]:
        return {name: self.sums[name] / self.weights[name] for name in self.sums}
