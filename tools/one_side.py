"""One side of a comparison by `tools/speed.py`: train, one iteration for each line on the standard input.

Answers with the CPU seconds of each iteration. It trains with whichever version of the package is on PYTHONPATH, so it
uses only what all of them have.
"""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from customized_grpo import __file__ as package
from customized_grpo.assemble import build_trainer
from customized_grpo.config import load_config
from customized_grpo.train.trainer import Observer


def unobserved(iterations: int, folder: Path) -> list[str]:
    """Settings that train without evaluation, trackers and checkpoints."""
    return [
        f"training.iterations={iterations}", "evaluation.examples=0", "tracking.log_with=[]",
        f"checkpoint.every={iterations}", f"output={folder}",
    ]  # fmt: skip


class Paced(Observer):
    """Reports an iteration and waits for the next line. The first one comes on top: it warms up."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print
        self.begun = 0.0
        self.tell(package)

    def tell(self, answer: object) -> None:
        print(answer, file=self.answers, flush=True)

    def on_iteration(self, record: Mapping[str, float]) -> None:
        if self.begun:
            self.tell(time.process_time() - self.begun)
        if not sys.stdin.readline():
            raise SystemExit
        self.begun = time.process_time()


if __name__ == "__main__":
    observer, (folder, *settings) = Paced(), sys.argv[1:]
    build_trainer(load_config(None, [*unobserved(1_000_000, Path(folder)), *settings])).train(observer)
