"""What stops a run before anything is loaded. `tests/tools/test_bad_input.py` asks both commands that use it."""

import json
import sys
from pathlib import Path

import pytest

from customized_grpo.assemble import build_trainer
from customized_grpo.check import check_config
from customized_grpo.config import Config, load_config
from customized_grpo.errors import UserError
from customized_grpo.toyworld.dataset import ToyWorld


def config(*overrides: str) -> Config:
    return load_config(None, overrides)


def test_the_defaults_pass_and_their_data_is_read() -> None:
    checked = check_config(config(), foreign=False)
    assert isinstance(checked.train, ToyWorld)
    assert isinstance(checked.held_out, ToyWorld)
    assert checked.unchecked == []


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.optimizer.lr=abc", r"'training.optimizer.lr' is \"abc\": expected a number\.$"),
        ("training.optimizer.lr=0", r"a step of AdamW with lr=0 does not follow the gradient"),
        ("training.optimizer=LBFGS", r"LBFGS cannot take a step"),
        ("training.optimizer.betas=[1]", r"'training.optimizer.betas' is \[1\]: expected more values"),
        ("policy.dtype=float99", r"policy.dtype is 'float99'; it must be float32, bfloat16 or auto"),
        ("policy.trainable=half", r"'policy.trainable' is \"half\": expected 'lora' or 'full'"),
        ("policy.path=./nowhere", r"policy.path: './nowhere' is neither an existing folder nor a hub id"),
        ("policy.path='toyworld:clip'", r"policy.path: 'toyworld:clip' holds no model_index.json"),
        ("policy.revision=main", r"policy.path: revision is 'main', but .* is a local folder"),
        ("policy.width=64", r"policy.width is 64, height None and resolution None; give width and height"),
        ("policy.shift=-1", r"policy.shift is -1; it must be more than 0"),
        ("policy.device=nowhere", r"policy.device is 'nowhere'; expected a device such as cpu, cuda"),
        ("policy.lora={rnak: 4}", r"no setting 'policy.lora.rnak'\. Did you mean 'rank'\?"),
        ("policy.quantize=int8", r"policy.quantize is int8, but with trainable: full no weight is frozen"),
        ("rewards.prompt.path=./nowhere", r"rewards.prompt.path: './nowhere' is neither"),
        ("rewards.prompt.processor=./nowhere", r"rewards.prompt.processor: './nowhere' is neither"),
        ("rewards.prompt.batch_size=0", r"'rewards.prompt.batch_size' is 0: expected 1 or more"),
        ("rewards.identity.reduce=median", r"'rewards.identity.reduce' is \"median\": expected 'mean' or 'max'"),
        ("rewards={}", r"No reward is given; name at least one"),
        ("rewards.oracle_prompt=ClipReward", r"'oracle_prompt' is a reward and a metric"),
        ("rewards.prompt={use: VlmJudge}", r"The setting 'rewards.prompt.model' is missing; VlmJudge needs it"),
        ("rewards.prompt={use: VlmJudge, model: m, rubric: beauty}", r"rewards.prompt: There is no rubric 'beauty'"),
        ("rewards.prompt={use: RemoteReward}", r"rewards.prompt: RemoteReward takes either a reward to start, or the"),
        ("rewards.prompt={use: RemoteReward, reward: 'a:b', python: ./no}", r"there is no Python at '.*/no'"),
        ("metrics.oracle_prompt={use: DinoReward, path: ./nowhere}", r"metrics.oracle_prompt.path: './nowhere' is"),
        ("method.advantage.gamma=abc", r"'method.advantage.gamma' is \"abc\": expected a number"),
        ("method.advantage.z=1", r"method.advantage: sars takes no setting 'z'"),
        (
            "method.time_weights={use: constant, weights: [1]}",
            r"gives weights of shape .5, 1. for 5 steps and 2 rewards",
        ),
        ("method.time_weights={use: from_file, path: ./no}", r"method.time_weights 'from_file': There is no file"),
        ("rollout.dynamics.noise_level=0", r"rollout.dynamics 'flow_sde' has no noise"),
        ("rollout.steps.fraction=2", r"cannot be computed with these settings: expected 0 < fraction <= 1, got 2"),
        ("tracking.log_with=wandbb", r"tracking.log_with names 'wandbb'; .* Did you mean 'wandb'\?"),
        ("training.micro_batch=7", r"training.micro_batch is 7, which does not divide the 64 rows"),
        ("data.train=./nowhere.jsonl", r"There is no data file './nowhere.jsonl'"),
        ("data.train={use: ToyWorld, split: test}", r"'data.train.split' is \"test\": expected 'train' or 'eval'"),
        ("data.train={use: ToyWorld, count: 0}", r"The training data is empty"),
        ("evaluation.base=./nowhere.json", r"evaluation.base: 'nowhere.json' is missing or damaged"),
    ],
)
def test_what_train_refuses_later_is_refused_at_once(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_config(config(override), foreign=False)


def test_more_processes_than_prompts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(UserError, match="prompts_per_iteration is 8, which 16 processes do not divide"):
        check_config(config("training.prompts_per_iteration=8"), foreign=False)


def test_a_new_run_needs_a_free_folder_and_a_resumed_one_does_not(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    for output, sentence in (("used", "holds something already"), ("used/notes.txt/run", "cannot be made, because")):
        given = config(f"output={tmp_path / output}")
        with pytest.raises(UserError, match=sentence):
            check_config(given)
        check_config(given, new=False)


def test_the_evaluation_of_a_base_policy_is_compared_before_the_run(tmp_path: Path) -> None:
    scores = {"iteration": 0, "metrics": ["prompt"], "tasks": [{"id": "a"}], "values": [[[0.5]]]}
    (tmp_path / "base.json").write_text(json.dumps(scores))
    given = config(f"evaluation.base={tmp_path / 'base.json'}")
    with pytest.raises(UserError, match="has other tasks, metrics or replicates than this run"):
        check_config(given)
    check_config(given, new=False)


def test_code_of_others_is_run_only_if_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unseen.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    given = config("rewards.sharp={use: 'unseen:sharp'}", "data.train={use: 'unseen:Data'}", "metrics={}",
                   "method.time_weights={use: constant, weights: [1, 1, 1]}")  # fmt: skip
    checked = check_config(given, foreign=False)
    assert checked.unchecked == ["rewards.sharp.use = unseen:sharp", "data.train.use = unseen:Data"]
    assert checked.train is None
    with pytest.raises(UserError, match=r"rewards.sharp: importing 'unseen' for 'unseen:sharp' failed"):
        check_config(given)
    assert "unseen" not in sys.modules


@pytest.mark.parametrize(
    "slot", ["method.advantage", "method.credit", "rollout.steps", "rollout.dynamics", "training.optimizer"]
)
def test_a_function_of_others_is_not_computed_unless_that_is_asked_for(slot: str, tmp_path, monkeypatch) -> None:
    (tmp_path / "unseen_too.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    given = config(f"{slot}={{use: 'unseen_too:thing'}}")
    assert check_config(given, foreign=False).unchecked == [f"{slot}.use = unseen_too:thing"]
    with pytest.raises(UserError, match=f"{slot}: importing 'unseen_too'"):
        check_config(given)


def test_what_credits_no_step_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"method.credit cannot be computed with these settings: TypeError"):
        check_config(config("method.credit={use: 'json:loads'}"))


def test_a_data_set_that_would_be_downloaded_is_not() -> None:
    given = config("data.train={use: HubDataset, path: owner/name}", "metrics={}")
    assert check_config(given, foreign=False).unchecked == ["data.train.path"]


@pytest.mark.parametrize(
    ("use", "sentence"),
    [
        ("no_such_package.module:name", r"rewards.prompt: cannot import 'no_such_package.module'"),
        ("os:nothing", r"rewards.prompt: there is no 'nothing' in os"),
        ("a:b:c", r"rewards.prompt: 'a:b:c' is no name; expected package.module:name\.$"),
        ("use:ClipReward", r"'use:ClipReward' is no name; .*; a space is missing after the colon, write 'use: ClipR"),
        (
            "Reward",
            r"rewards.prompt: there is no 'Reward' in customized_grpo.rewards or .* Did you mean '\w+Reward'\?",
        ),
    ],
)
@pytest.mark.parametrize("foreign", [True, False])
def test_a_name_that_leads_nowhere_is_refused_without_running_code(use: str, sentence: str, foreign: bool) -> None:
    with pytest.raises(UserError, match=sentence):
        check_config(config(f"rewards.prompt.use='{use}'"), foreign=foreign)


def test_a_trainer_is_not_made_from_a_wrong_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*given: object) -> None:
        raise AssertionError("a reward was loaded")

    monkeypatch.setattr("customized_grpo.assemble.build_rewards", load)
    with pytest.raises(UserError, match=r"policy.dtype is 'float99'"):
        build_trainer(config("policy.dtype=float99"))


def test_guidance_that_the_objective_cannot_train_with_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=r"policy.true_cfg_scale is 3, but the objective nft trains without"):
        check_config(load_config(None, ["objective=nft", "policy.true_cfg_scale=3"]))
