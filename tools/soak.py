"""Train for thousands of the smallest iterations and see whether memory stays flat: `make soak`.

Writes resident memory after every iteration to OUTPUT.csv, and fails if the mean of the last quarter exceeds that of
the second by more than 1 %. The first quarter is left out: the encodings of all 256 examples are cached in it.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from customized_grpo.assemble import build_trainer
from customized_grpo.cli.terminal import quiet_libraries
from customized_grpo.config import load_config
from customized_grpo.settings.parse import to_yaml
from customized_grpo.train.trainer import Observer

SMALLEST = (
    "data.train={use: 'customized_grpo.toyworld.dataset:ToyWorld', count: 256}", "data.eval=toyworld",
    "training.prompts_per_iteration=1", "rollout.num_generations=2", "rollout.num_inference_steps=2",
    "rollout.steps={use: all_steps}", "training.updates_per_epoch=1",
    "evaluation.examples=2", "evaluation.replicates=1", "evaluation.every=50", "checkpoint.every=50",
)  # fmt: skip


class Memory(Observer):
    """Resident memory of this process after every iteration, in MiB."""

    def __init__(self, path: Path) -> None:
        self.process, self.path, self.resident = psutil.Process(), path, list[float]()

    def on_iteration(self, record: Mapping[str, float]) -> None:
        self.resident.append(self.process.memory_info().rss / 2**20)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{record['iteration']},{self.resident[-1]:.2f}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--output", default="runs/soak", help="a folder that does not exist yet")
    parser.add_argument("overrides", nargs="*", help="settings, such as tracking.log_with=[]")
    given = parser.parse_args()
    quiet_libraries()
    counts = [f"training.iterations={given.iterations}", f"output={given.output}"]
    config = load_config(None, [*SMALLEST, *counts, *given.overrides])
    trainer = build_trainer(config)
    memory = Memory(Path(f"{given.output}.csv"))
    trainer.train(memory, config_yaml=to_yaml(config))
    quarter = given.iterations // 4
    means = [statistics.mean(memory.resident[quarter * k : quarter * (k + 1)]) for k in range(4)]
    growth = means[3] / means[1] - 1
    print("mean resident MiB by quarter:", "  ".join(f"{mean:.1f}" for mean in means))
    print(f"last against second quarter: {growth:+.2%} (allowed 1 %)")
    sys.exit(growth > 0.01)


if __name__ == "__main__":
    main()
