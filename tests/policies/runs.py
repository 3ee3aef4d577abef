"""A run from a configuration on disk, as a user has it."""

import json
from pathlib import Path

import yaml

from customized_grpo.assemble import build_policy, build_rewards
from customized_grpo.config import load_config
from customized_grpo.data import load_datasets
from customized_grpo.policies import PipelinePolicy
from customized_grpo.tracking import RunFolder
from customized_grpo.trainer import Trainer

from . import tiny


def write_run(family: tiny.Family, folder: Path, **policy) -> Path:
    """Pipeline, pictures, manifest and configuration on disk, as a user has them."""
    if family.on_disk:
        family.pipeline().save_pretrained(folder / "pipeline")
    lines = []
    for example in family.examples():
        names = [f"{example.id}-{n}.png" for n in range(len(example.references))]
        for name, image in zip(names, example.references, strict=True):
            image.save(folder / name)
        lines.append(json.dumps({"id": example.id, "prompt": example.prompt, "references": names, "split": "train"}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    settings = {"use": family.policy, "path": str(folder / "pipeline"), "lora": {"rank": 2}, "device": "cpu"}
    tree = {
        "output": str(folder / "run"),
        "policy": {**settings, **family.settings, **family.files(folder), **policy},
        "rewards": {"prompt": {"use": "fakes:red"}, "identity": {"use": "fakes:dark"}},
        "metrics": {},
        "data": {"train": str(folder / "train.jsonl")},
        "rollout": {"num_generations": 2, "num_inference_steps": 3},
        "training": {"iterations": 2, "prompts_per_iteration": 2, "optimizer": {"use": "AdamW", "lr": 0.01}},
        "evaluation": {"examples": 0},
        "tracking": {"log_with": []},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def train(file: Path, *overrides: str, policy: PipelinePolicy | None = None) -> RunFolder:
    """Train as configured; `policy` instead of the configured one where that cannot be loaded from disk."""
    config = load_config(file, overrides)
    trainer = Trainer(
        policy or build_policy(config), build_rewards(config.rewards), load_datasets(config.data)[0], None, config
    )
    return RunFolder(trainer.train().run)


def train_from_the_command_line(file: Path) -> RunFolder:
    from typer.testing import CliRunner

    from customized_grpo.cli import app

    result = CliRunner().invoke(app, ["train", str(file)])
    assert result.exit_code == 0, (result.output, result.exception)
    return RunFolder(load_config(file).output)
