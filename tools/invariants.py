"""How much does a training step depend on how it is computed? `python tools/invariants.py` prints the table.

Each case trains the embedded model from the command line and is compared with the plain run of the same seed: the norm
of the difference of the trained weights, relative to the norm of what training changed.
"""

import argparse
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

Words = list[str]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A way to compute the same run."""

    name: str
    processes: int = 1
    settings: tuple[str, ...] = ()
    resumed_on: int = 0
    """Processes that go on with the second half; 0 does it in one go."""


CASES = (
    Case("the same again"),
    Case("resumed", resumed_on=1),
    Case("chunks of 1 prompt", settings=("rollout.chunk_prompts=1",)),
    Case("micro-batches of 4 rows", settings=("training.micro_batch=4", "training.old_log_probs=recompute")),
    Case("2 processes", 2),
    Case("3 processes", 3),
    Case("1 process, resumed on 2", resumed_on=2),
    Case("2 processes, resumed on 3", 2, resumed_on=3),
)


def run_together(processes: int, commands: Sequence[Words], folder: Path) -> None:
    """Run command lines of cgrpo one after the other, in a group of processes that starts once."""
    listed = folder / f"commands-{processes}.json"
    listed.write_text(json.dumps(list(zip(free_ports(len(commands)), commands, strict=True))))
    group = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", str(listed)],
            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **(place(rank, processes) if processes > 1 else {})},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    with ThreadPoolExecutor(processes) as readers:
        said = [readers.submit(lambda process=process: process.communicate()[0]) for process in group]
        while any(process.poll() is None for process in group):
            if any(process.returncode for process in group):  # the others would wait for it
                for process in group:
                    process.kill()
            time.sleep(0.1)
    if any(process.returncode for process in group):
        codes = [process.returncode for process in group]
        raise RuntimeError("\n".join([f"exit codes {codes}", *(one.result() for one in said)]))


def place(rank: int, processes: int) -> dict[str, str]:
    """What a launcher tells a process of a group, but the port."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in told.items()}}


def free_ports(count: int) -> list[int]:
    """One for each command, because a command ends its group of processes and the next one makes its own."""
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def work(listed: Path) -> None:
    """What a process of the group does."""
    from customized_grpo.cli.main import main as cgrpo

    for port, words in json.loads(listed.read_text()):
        os.environ["MASTER_PORT"], sys.argv = str(port), ["cgrpo", *words]
        try:
            cgrpo()
        except SystemExit as end:
            if end.code:
                raise
        AcceleratorState._reset_state(True)


def train_all(cases: Sequence[Case], base: Words, iterations: int, folder: Path) -> None:
    """Train every case into `folder/NAME`. Groups start in order of size, so a run is resumed on no fewer processes."""
    fresh: dict[int, list[Words]] = {}
    resumed: dict[int, list[Words]] = {}
    for case in cases:
        length = iterations // 2 if case.resumed_on else iterations
        words = ["train", *base, *case.settings, f"training.iterations={length}", f"output={case.name}"]
        fresh.setdefault(case.processes, []).append(words)
        if case.resumed_on:
            words = ["train", "--resume", case.name, f"training.iterations={iterations}"]
            resumed.setdefault(case.resumed_on, []).append(words)
    for processes in sorted({*fresh, *resumed}):
        run_together(processes, fresh.get(processes, []) + resumed.get(processes, []), folder)


def weights(run: Path, iteration: int) -> State:
    return load_file(run / "checkpoints" / f"iteration-{iteration:06d}" / "trainable.safetensors")


def difference(run: State, plain: State, start: State) -> float:
    """|run - plain| / |plain - start|: of the step that training made, over all trained weights together."""
    apart = torch.cat([(run[name] - plain[name]).flatten().double() for name in plain])
    step = torch.cat([(plain[name] - start[name]).flatten().double() for name in plain])
    return float(apart.norm() / step.norm())


BASE = [
    "training.prompts_per_iteration=6", "rollout.num_generations=2", "rollout.num_inference_steps=3",
    "training.ema_decay=0", "evaluation.examples=0", "tracking.log_with=[]", "checkpoint.every=1", "checkpoint.keep=0",
]  # fmt: skip
OPTIMIZERS = {
    "AdamW": "training.optimizer={use: AdamW, lr: 1.5e-4, betas: [0.9, 0.99], weight_decay: 0.0}",
    "SGD": "training.optimizer={use: SGD, lr: 1.0}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/invariants"), help="it must not exist yet")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker)
        return
    from customized_grpo.assemble import build_policy
    from customized_grpo.config import load_config

    start, folder, marks = build_policy(load_config()).trainable_state(), given.folder.absolute(), (1, given.iterations)
    groups = list(itertools.product(OPTIMIZERS, ("float32", "bfloat16"), range(given.seeds)))
    everything = [
        replace(case, name=f"{optimizer}-{dtype}-{seed}/{case.name}",
                settings=(*case.settings, OPTIMIZERS[optimizer], f"policy.dtype={dtype}", f"seed={seed}"))
        for optimizer, dtype, seed in groups for case in (Case("plain"), *CASES)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    train_all(everything, BASE, given.iterations, folder)
    print(f"{'':30}" + "".join(f"after {mark:<5}" for mark in marks) + f"largest of {given.seeds} seeds")
    for (optimizer, dtype), seeds in itertools.groupby(groups, lambda group: group[:2]):
        print(f"{optimizer}, {dtype}")
        runs = [folder / f"{optimizer}-{dtype}-{seed}" for _, _, seed in seeds]
        for case in CASES:
            found = [[difference(weights(run / case.name, mark), weights(run / "plain", mark), start) for run in runs]
                     for mark in marks]  # fmt: skip
            print(f"  {case.name:28}" + "".join(f"{max(values):<11.1e}" for values in found))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
