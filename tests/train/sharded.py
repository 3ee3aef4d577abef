"""Runs of test_sharding.py, by one process or by two that share the model out: `main(FOLDER)`."""

import json
import os
from pathlib import Path
from typing import Any

import torch

import fakes
from customized_grpo import policies
from customized_grpo.settings.parse import parse_config
from customized_grpo.store.run import RunFolder
from customized_grpo.train import checkpoint
from customized_grpo.train.settings import TrainerConfig
from customized_grpo.train.sharding import own, whole
from customized_grpo.train.trainer import Trainer
from policies import tiny

SHAPES = [(16, 16), (16, 16), (16, 16), (32, 12)]
"""Of references: the second of two processes has two chunks, the first has one."""
KONTEXT, FULL = ("FluxKontextPolicy", tiny.kontext_pipeline), {"trainable": "full"}
CASES: dict[str, tuple[tuple[str, Any], dict[str, Any], dict[str, Any]]] = {
    "full": (KONTEXT, FULL, {
        "training": {"micro_batch": 4, "old_log_probs": "recompute"},
        "evaluation": {"examples": 3, "replicates": 1, "batch": 2},
    }),
    "nft": (KONTEXT, {**FULL, "gradient_checkpointing": True}, {
        "objective": {"use": "nft", "levels": 2}, "method": {"beta": 0.1},
        "training": {"sharding": "fsdp2_offload"}, "evaluation": {"examples": 1, "replicates": 1},
    }),
    "awm": (KONTEXT, {"dtype": "bfloat16", "gradient_checkpointing": True}, {
        "objective": {"use": "awm", "levels": 2}, "method": {"beta": 0.1},
    }),
    "guided": (("Flux2KleinPolicy", tiny.klein_pipeline), {
        "max_text_tokens": tiny.MAX_TOKENS, "true_cfg_scale": 2.0,
    }, {}),
}  # fmt: skip
"""Policy, its settings, and those of the run."""


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
    examples = [tiny.example(name, f"a {name}", (size,)) for name, size in zip("abcd", SHAPES, strict=True)]
    rewards = {"prompt": fakes.red, "identity": fakes.dark}
    return Trainer(policy, rewards, examples, examples, parse_config(config, TrainerConfig))


def resume(run: RunFolder, processes: int) -> None:
    """Go on with the run of nft that another number of processes began."""
    trainer = make("nft", run.path, processes, iterations=2)
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
    make("nft", run.path, processes, iterations=2).train(resume=run)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, processes, shares = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1")), {}
    for name in CASES:
        trainer = make(name, folder / name, processes)
        trainer.accelerator.end_training = lambda: None  # the processes stay together for another run
        parameters = trainer.policy.trainable_parameters()
        shares[name] = sum(own(p).numel() for p in parameters) / sum(p.numel() for p in parameters)
        trainer.train()
    (folder / f"shares{rank}.json").write_text(json.dumps(shares))
    if processes > 1:
        resume(RunFolder(folder.parent / "one" / "nft"), processes)
    os._exit(0)  # see customized_grpo.cli.terminal.leave_at_once
