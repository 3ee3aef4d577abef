"""A run from a configuration on disk, as a user has it."""

import json
from pathlib import Path

import yaml

from customized_grpo.assemble import build_policy, build_rewards
from customized_grpo.config import load_config
from customized_grpo.data import load_datasets
from customized_grpo.policies import PipelinePolicy
from customized_grpo.train.trackers import RunFolder
from customized_grpo.train.trainer import Trainer

from . import tiny


def write_files(family: tiny.Family, folder: Path) -> dict[str, str]:
    """Pipeline, pictures and train.jsonl on disk. Returns the settings of the policy that name files."""
    if family.on_disk:
        family.pipeline().save_pretrained(folder / "pipeline")
    (folder / "pipeline").mkdir(exist_ok=True)
    lines = []
    for example in family.examples():
        names = [f"{example.id}-{n}.png" for n in range(len(example.references))]
        for name, image in zip(names, example.references, strict=True):
            image.save(folder / name)
        lines.append(json.dumps({"id": example.id, "prompt": example.prompt, "references": names, "split": "train"}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return {"path": str(folder / "pipeline") if family.on_disk else "owner/name", **family.files(folder)}


def write_run(family: tiny.Family, folder: Path, **policy) -> Path:
    """Pipeline, pictures, manifest and configuration on disk, as a user has them."""
    settings = {"use": family.policy, "lora": {"rank": 2}, "device": "cpu", **write_files(family, folder)}
    tree = {
        "output": str(folder / "run"),
        "policy": {**settings, **family.settings, **policy},
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
    from_the_command_line("train", file)
    return RunFolder(load_config(file).output)


def from_the_command_line(*words: object) -> str:
    """What `cgrpo` says, in this process; it must succeed."""
    from typer.testing import CliRunner

    from customized_grpo.cli.main import app

    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output
