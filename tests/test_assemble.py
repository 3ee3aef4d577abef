import shutil
from pathlib import Path

import pytest
import torch

from customized_grpo.assemble import build_rewards, finished_iterations, open_run, resume_run
from customized_grpo.config import load_config
from customized_grpo.errors import UserError
from customized_grpo.settings import Spec
from customized_grpo.settings.parse import to_yaml
from customized_grpo.train.trackers import RunFolder

CLIP, DINO = "{use: ClipReward, path: 'toyworld:clip'}", "{use: DinoReward, path: 'toyworld:dino'}"


def run(tmp_path: Path, *, checkpoints: int = 1) -> RunFolder:
    folder = RunFolder.create(tmp_path / "run")
    folder.config.write_text(to_yaml(load_config(overrides=["training.iterations=4"])))
    for index in range(checkpoints):
        checkpoint = folder.checkpoints / f"iteration-{4 * (index + 1):06d}"
        checkpoint.mkdir(parents=True)
        shutil.copy(folder.config, checkpoint)
    return folder


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "policy.trainable=lora",
            r'was trained with policy.trainable = "full", and a resumed run cannot change it to "lora"; set',
        ),
        (
            "rewards.identity.use=ClipReward",
            r'rewards.identity.use = "DinoReward", and a resumed run cannot change it to "ClipReward"',
        ),
        ("rewards.third.use=ClipReward", r'rewards.third.use = null, and .* cannot change it to "ClipReward"'),
        (f"rewards={{identity: {DINO}, prompt: {CLIP}}}", r"order prompt, identity, not identity, prompt"),
    ],
)
def test_a_resumed_run_keeps_its_model_and_its_rewards(tmp_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        resume_run(run(tmp_path).path, [override])


def test_the_rest_may_change_and_everything_before_the_first_checkpoint(tmp_path: Path) -> None:
    folder = run(tmp_path)
    assert resume_run(folder.path, ["training.iterations=9"])[1].training.iterations == 9
    assert resume_run(folder.path, ["policy.gradient_checkpointing=true", "rewards.prompt.device=cpu"])
    assert resume_run(run(tmp_path / "new", checkpoints=0).path, ["policy.trainable=lora"])


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import sys; sys.exit(0)", r"reward: harmful_\d:Mine called sys.exit\(0\)"),
        ("import torch; torch.set_grad_enabled(False)", r"reward: harmful_\d:Mine changed whether gradients"),
        ("class Mine:\n    def __init__(self):\n        exit()", r"reward: harmful_\d:Mine called sys.exit\(None\)"),
    ],
)
def test_making_a_reward_is_contained_as_well(tmp_path, monkeypatch, code, sentence) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"harmful_{len(code) % 10}"
    (tmp_path / f"{name}.py").write_text(f"{code}\n" if "Mine" in code else f"{code}\nclass Mine: ...\n")
    with pytest.raises(UserError, match=sentence):
        build_rewards({"mine": Spec(use=f"{name}:Mine")})
    assert torch.is_grad_enabled()


def test_a_finished_run_has_nothing_left_to_do_unless_more_is_asked_for(tmp_path: Path) -> None:
    folder = run(tmp_path)
    assert finished_iterations(*resume_run(folder.path)) is None, "killed before its report"
    folder.describe(status="finished")
    assert finished_iterations(*resume_run(folder.path)) == 4
    assert finished_iterations(*resume_run(folder.path, ["training.iterations=5"])) is None


def test_trained_weights_are_not_put_into_another_family(tmp_path: Path) -> None:
    folder = run(tmp_path).path
    assert open_run(folder, ["policy.resolution=128"])
    with pytest.raises(UserError, match=r"trained a FluxKontextPolicy, and its weights are not for a UnoPolicy"):
        open_run(folder, ["policy={use: UnoPolicy, path: flux, adapter: uno}"])


@pytest.mark.parametrize("words", ["objective=nft", "objective={use: awm, levels: 2}", "objective.use=nft"])
def test_a_checkpoint_is_not_for_another_objective(tmp_path: Path, words: str) -> None:
    folder = run(tmp_path).path
    assert open_run(folder, ["objective={use: grpo}"])
    with pytest.raises(UserError, match=r"trained with the objective grpo, and its checkpoints are not for (nft|awm)"):
        resume_run(folder, [words])


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_an_empty_configuration_is_not_taken_for_the_defaults(tmp_path: Path, text: str) -> None:
    folder = run(tmp_path)
    folder.config.write_text(text)
    for opened in (open_run, resume_run):
        with pytest.raises(UserError, match=r"run/config.yaml' is empty; .* restore the file, or name another folder"):
            opened(folder.path)
    folder = run(tmp_path / "other")
    (folder.checkpoints / "iteration-000004" / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"iteration-000004/config.yaml' is empty"):
        resume_run(folder.path)
