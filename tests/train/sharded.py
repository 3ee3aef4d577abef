"""Runs of test_sharding.py: `train_all` by one process, `main` by two and by three that share the model out."""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import invariants
import torch
from accelerate.state import AcceleratorState
from torch import distributed

import fakes
from customized_grpo import policies
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.settings.parse import parse_config
from customized_grpo.store.run import RunFolder
from customized_grpo.structures import Example
from customized_grpo.train import checkpoint
from customized_grpo.train.settings import TrainerConfig
from customized_grpo.train.sharding import own, whole
from customized_grpo.train.trainer import Trainer
from policies import tiny

SHAPES = [(16, 16), (16, 16), (16, 16), (32, 12)]
"""Of references: the second of two processes has two chunks, the first has one."""
EXAMPLES = [tiny.example(name, f"a {name}", (size,)) for name, size in zip("abcd", SHAPES, strict=True)]
REWARDS = {"prompt": fakes.red, "identity": fakes.dark}
KONTEXT, FULL = ("FluxKontextPolicy", tiny.kontext_pipeline), {"trainable": "full"}
CASES: dict[str, tuple[tuple[str, Any], dict[str, Any], dict[str, Any]]] = {
    "full": (KONTEXT, FULL, {
        "training": {"micro_batch": 4, "old_log_probs": "recompute"},
        "evaluation": {"examples": 3, "replicates": 1, "batch": 2},
    }),
    "nft": (KONTEXT, {**FULL, "gradient_checkpointing": True}, {
        "objective": {"use": "nft", "levels": 2}, "method": {"beta": 0.1},
        "training": {"sharding": "fsdp2_offload", "prompts_per_iteration": 6},
        "evaluation": {"examples": 1, "replicates": 1},
    }),
    "awm": (KONTEXT, {"dtype": "bfloat16", "gradient_checkpointing": True}, {
        "objective": {"use": "awm", "levels": 2}, "method": {"beta": 0.1},
    }),
    "guided": (("Flux2KleinPolicy", tiny.klein_pipeline), {
        "max_text_tokens": tiny.MAX_TOKENS, "true_cfg_scale": 2.0,
    }, {}),
}  # fmt: skip
"""Policy, its settings, and those of the run."""


class Dataset(list[Example]):
    def __init__(self) -> None:
        super().__init__(EXAMPLES)


def make(name: str, output: Path, processes: int, iterations: int = 1) -> Trainer:
    (kind, pipeline), settings, config = CASES[name]
    training = {
        "iterations": iterations, "prompts_per_iteration": 4, "sharding": "fsdp2",
        "optimizer": {"use": "AdamW", "lr": 1e-4}, **config.get("training", {}),
    }  # fmt: skip
    config = {
        "output": str(output), "rollout": {"num_generations": 4, "num_inference_steps": 3},
        "evaluation": {"examples": 0}, "tracking": {"log_with": []}, "checkpoint": {"every": 1, "keep": 0}, **config,
        "training": training if processes > 1 else {**training, "sharding": "none"},
    }  # fmt: skip
    policy = getattr(policies, kind)(pipeline(), device="cpu", **settings)
    tiny.disturb(policy)
    trainer = Trainer(policy, REWARDS, EXAMPLES, EXAMPLES, parse_config(config, TrainerConfig))
    trainer.accelerator.end_training = lambda: None  # the processes stay together for another run
    return trainer


def train_all(folder: Path, processes: int, iterations: int = 1) -> dict[str, float]:
    """Train every case, that of nft for `iterations`. Returns this process's share of the trained weights of each."""
    shares = {}
    for name in CASES:
        trainer = make(name, folder / name, processes, iterations if name == "nft" else 1)
        shares[name] = share(trainer)
        trainer.train()
    return shares


def share(trainer: Trainer) -> float:
    parameters = trainer.policy.trainable_parameters()
    return sum(own(p).numel() for p in parameters) / sum(p.numel() for p in parameters)


def resume(run: RunFolder, processes: int, iterations: int) -> float:
    """Go on with a run of nft that another number of processes left. Returns this process's share of the weights."""
    trainer = make("nft", run.path, processes, iterations)
    trainer._restore(run)
    kept = {"trainable": trainer.policy.trainable_state(), "ema": trainer.update.ema, **trainer.update.state()}
    found, file = whole(kept, trainer.accelerator), checkpoint.load(checkpoint.checkpoints(run.checkpoints)[-1])
    if trainer.accelerator.is_main_process:
        parts = [(getattr(file, part), found[part]) for part in ("trainable", "ema", "objective")]
        for wanted, state in [
            *parts,
            *zip(file.optimizer["state"].values(), found["optimizer"]["state"].values(), strict=True),
        ]:
            assert wanted
            assert wanted.keys() == state.keys()
            assert all(torch.equal(tensor, state[name]) for name, tensor in wanted.items())
    make("nft", run.path, processes, iterations).train(resume=run)
    return share(trainer)


def fail(folder: Path, when: str, rank: int, processes: int) -> None:
    """Train until the last process fails in the second iteration. What each says goes to FOLDER/WHEN and its rank."""

    def is_due(failure: str) -> bool:
        return when == failure and rank == processes - 1 and trainer.iteration == 1

    class Policy(fakes.LinearPolicy):
        def encode(self, examples):
            if is_due("encoding"):
                raise UserError("The picture is gone; put it back.")
            return super().encode(examples)

        def velocity(self, latents, sigma, conditioning):
            if is_due("killed"):
                (folder / "when.txt").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().velocity(latents, sigma, conditioning)

    config = parse_config({
        "output": str(folder / when), "rollout": {"num_generations": 4, "num_inference_steps": 5},
        "training": {"iterations": 3, "prompts_per_iteration": 6, "updates_per_epoch": 1, "sharding": "fsdp2"},
        "tracking": {"log_with": []}, "checkpoint": {"every": 1},
    }, TrainerConfig)  # fmt: skip
    trainer = Trainer(Policy(), REWARDS, fakes.examples(), None, config)
    try:
        trainer.train()
    except (UserError, TrainingError) as error:
        took = time.time() - float((folder / "when.txt").read_text()) if when == "killed" else 0
        (folder / f"{when}{rank}.txt").write_text(f"{error}{' late' if took > 30 else ''}")


def work(folder: Path, rank: int, ports: list[int]) -> None:
    """What one of three processes does: the first two begin without the third."""
    for processes, port, failure in zip((2, 3), ports, ("encoding", "killed"), strict=True):
        if rank == processes:
            continue
        os.environ |= {**invariants.place(rank, processes), "MASTER_PORT": str(port)}
        AcceleratorState._reset_state(True)
        shares = train_all(folder / "two", processes) if processes == 2 else {}
        shares["chain"] = resume(RunFolder(folder / "chain" / "nft"), processes, iterations=processes)
        (folder / f"shares{rank}-of-{processes}.json").write_text(json.dumps(shares))
        fail(folder, failure, rank, processes)
        if failure == "encoding":
            distributed.barrier()
            distributed.destroy_process_group()


PR_SET_PDEATHSIG = 1


def main(folder: Path) -> None:
    """Work in three processes. They are copies of this one, so that one alone imports everything."""
    torch.set_num_threads(1)
    ports, running = invariants.free_ports(2), set()
    for rank in range(3):
        if child := os.fork():
            running.add(child)
            continue
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # none stays behind if the test gives up
        code = 1
        try:
            work(folder, rank, ports)
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)  # see customized_grpo.cli.terminal.leave_at_once
    while running:
        child, status = os.wait()
        running.remove(child)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):  # and not killed, as one of them is
            for other in running:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
