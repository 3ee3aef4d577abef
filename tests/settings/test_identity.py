"""Every setting has a role, and the role is what happens when a run is resumed with another value."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import yaml

import fakes
from customized_grpo.assemble import resume_run
from customized_grpo.config import Config, load_config
from customized_grpo.errors import UserError
from customized_grpo.rewards import DinoReward, RemoteReward, VlmJudge
from customized_grpo.settings import Role, Settings
from customized_grpo.settings.identity import declared_roles, differences, overrides, result_differences, role_of
from customized_grpo.settings.parse import parse_config, to_yaml
from customized_grpo.structures import Example
from customized_grpo.train.settings import TrainerConfig
from customized_grpo.train.trackers import RunFolder
from customized_grpo.train.trainer import Trainer

ADAMW = {"use": "AdamW", "lr": 1e-2, "betas": [0.9, 0.99], "weight_decay": 0.0}
BASE: dict[str, Any] = {
    "rollout": {"num_generations": 4, "num_inference_steps": 5},
    "training": {"iterations": 1, "prompts_per_iteration": 2, "optimizer": ADAMW},
    "evaluation": {"examples": 2, "replicates": 1, "every": 1},
    "tracking": {"log_with": []},
}
SLOWER = {"use": "AdamW", "lr": 1e-3, "betas": [0.5, 0.9], "weight_decay": 0.1}
ROLES = declared_roles(Config)


def of_config(name: str) -> Callable[[Trainer], Any]:
    def read(trainer: Trainer) -> Any:
        value: Any = trainer.config
        for part in name.split("."):
            value = getattr(value, part)
        return value

    return read


def of_optimizer(trainer: Trainer) -> Any:
    (group,) = trainer.update.optimizer.param_groups
    return {"use": "AdamW", "lr": group["lr"], "betas": list(group["betas"]), "weight_decay": group["weight_decay"]}


NEW: dict[str, tuple[Any, Callable[[Trainer], Any] | None]] = {
    "seed": (1, None),
    "objective": (
        {"use": "grpo", "divergence_threshold": 1e-3}, lambda t: {"use": "grpo", **t.objective.settings.model_dump()},
    ),
    "output": ("elsewhere", lambda t: str(t.config.output)),
    "verified": ("tiny", of_config("verified")),
    "method.advantage": ({"use": "minimum"}, lambda t: {"use": t.method.advantage.__name__}),
    "method.time_weights": (
        {"use": "constant", "weights": [0.5, 0.5]}, lambda t: {"use": "constant", **t.method.time_weights.keywords},
    ),
    "method.rewards": (["identity", "prompt"], lambda t: list(t.method.names)),
    "method.kind_weights": ({"property": {"identity": 0.5}}, lambda t: t.method.settings.kind_weights),
    "method.difficulty": (
        {"reward": "prompt", "power": 2.0, "low": 0.5, "high": 5.0},
        lambda t: t.method.settings.difficulty and t.method.settings.difficulty.model_dump(),
    ),
    "method.advantage_clamp": (2.0, lambda t: t.method.settings.advantage_clamp),
    "method.clip_range": (1e-2, lambda t: t.objective.config.method.clip_range),
    "method.ratio_norm": (False, lambda t: t.objective.keep_means),
    "method.credit": ({"use": "stepwise"}, lambda t: {"use": t.method.credit.__name__}),
    "method.beta": (0.1, lambda t: t.objective.config.method.beta),
    "method.norm_hinge": (0.1, lambda t: t.objective.config.method.norm_hinge),
    "rollout.num_generations": (2, lambda t: (t.samples - 8) // 2),
    "rollout.num_inference_steps": (6, None),
    "rollout.solver": ("heun", of_config("rollout.solver")),
    "rollout.dynamics": (
        {"use": "dance_sde", "noise_level": 0.3},
        lambda t: {"use": t.objective.dynamics.func.__name__, **t.objective.dynamics.keywords},
    ),
    "rollout.steps": ({"use": "all_steps"}, lambda t: {"use": t.objective.steps.__name__}),
    "rollout.share_initial_noise": (False, of_config("rollout.share_initial_noise")),
    "rollout.chunk_prompts": (1, of_config("rollout.chunk_prompts")),
    "training.iterations": (3, lambda t: t.iteration),
    "training.prompts_per_iteration": (4, None),
    "training.kinds": ({"kind 0": 1, "kind 1": 2}, None),
    "training.optimizer": (SLOWER, of_optimizer),
    "training.lr_schedule": ("linear", lambda t: "linear" if t.update.optimizer.param_groups[0]["lr"] == 0 else ""),
    "training.warmup_updates": (8, lambda t: round(8 * t.update.optimizer.param_groups[0]["lr"] / 1e-2) * 2),
    "training.max_grad_norm": (0.5, lambda t: t.update.settings.max_grad_norm),
    "training.inner_epochs": (2, lambda t: (t.update.updates - 2) // 2),
    "training.updates_per_epoch": (1, lambda t: t.update.updates - 2),
    "training.micro_batch": (2, lambda t: t.update.settings.micro_batch),
    "training.old_log_probs": ("recompute", lambda t: t.update.settings.old_log_probs),
    "training.sharding": ("fsdp2", of_config("training.sharding")),
    "training.preflight": (False, of_config("training.preflight")),
    "training.ema_decay": (0.0, lambda t: 0.9 if t.update.ema else 0.0),
    "evaluation.num_inference_steps": (6, None),
    "evaluation.solver": ("heun", None),
    "evaluation.guidance_scale": (2.0, None),
    "evaluation.true_cfg_scale": (2.0, None),
    "evaluation.resolution": (64, None),
    "evaluation.every": (5, of_config("evaluation.every")),
    "evaluation.examples": (1, None),
    "evaluation.replicates": (2, None),
    "evaluation.seed": (1, None),
    "evaluation.batch": (1, of_config("evaluation.batch")),
    "evaluation.grid_rows": (1, of_config("evaluation.grid_rows")),
    "evaluation.base": ("base.json", None),
    "tracking.log_with": (["tensorboard"], lambda t: [tracker.name for tracker in t.accelerator.trackers]),
    "tracking.project": ("mine", of_config("tracking.project")),
    "checkpoint.every": (5, of_config("checkpoint.every")),
    "checkpoint.keep": (1, lambda t: len(list((t.config.output / "checkpoints").iterdir()))),
    "training.early_stop": (3, of_config("training.early_stop")),
    "checkpoint.keep_best": (False, of_config("checkpoint.keep_best")),
}  # fmt: skip
"""Another value of every setting, and where a trainer has it when the run has gone on."""
WHOLE: dict[str, tuple[str, Any]] = {
    "policy": ("policy.lora={rank: 8}", None),
    "rewards": ("rewards.prompt.revision=abc", None),
    "metrics": ("metrics={sharp: {use: ClipReward}}", lambda c: list(c.metrics) == ["sharp"]),
    "data.train": ("data.train=more.jsonl", lambda c: c.data.train == "more.jsonl"),
    "data.eval": ("data.eval=held.jsonl", lambda c: c.data.eval == "held.jsonl"),
}
"""The same for what only the command line knows."""


def of_two_kinds() -> list[Example]:
    return [replace(example, kind=f"kind {n % 2}") for n, example in enumerate(fakes.examples())]


def make(output: Path, changes: dict[str, Any] | None = None) -> Trainer:
    tree = yaml.safe_load(yaml.safe_dump({**BASE, "output": str(output)}))
    for name, value in (changes or {}).items():
        *sections, last = name.split(".")
        below = tree
        for section in sections:
            below = below.setdefault(section, {})
        below[last] = value
    rewards = {"prompt": fakes.red, "identity": fakes.dark}
    config = parse_config(tree, TrainerConfig)
    policy = fakes.LinearPolicy()
    policy.sampled_with = lambda **settings: nullcontext()  # it takes them all
    return Trainer(policy, rewards, of_two_kinds(), fakes.examples(2), config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one iteration."""
    return make(tmp_path_factory.mktemp("trained") / "run").train().run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(trained, tmp_path / "run")))


def resume(run: RunFolder, **changes: Any) -> Trainer:
    changed = {"training.iterations": 2, **{name.replace("__", "."): value for name, value in changes.items()}}
    trainer = make(run.path, changed)
    trainer.train(resume=run)
    return trainer


# ---- the walk over all settings


def test_every_setting_of_a_run_is_tried_here() -> None:
    assert {**NEW, **WHOLE}.keys() == ROLES.keys()


@pytest.mark.parametrize("name", NEW)
def test_what_a_setting_declares_is_what_happens(run: RunFolder, name: str) -> None:
    value, live = NEW[name]
    before = run.config.read_bytes()
    if ROLES[name] is Role.KEPT:
        with pytest.raises(
            UserError, match=rf"The run was trained with {name} = .* set it to .* again, or start a new"
        ):
            resume(run, **{name: value})
        assert run.config.read_bytes() == before
        return
    assert live is not None, "a setting that may change needs a place where it shows"
    trainer = resume(run, **{name: value})
    assert live(trainer) == value
    written: Any = yaml.safe_load(run.config.read_text())
    for part in name.split("."):
        written = written[part]
    assert written == value


@pytest.mark.parametrize("name", WHOLE)
def test_what_a_setting_of_the_command_line_declares_is_what_happens(tmp_path: Path, name: str) -> None:
    run, (override, holds) = RunFolder.create(tmp_path / "run"), WHOLE[name]
    run.config.write_text(to_yaml(load_config()))
    checkpoint = run.checkpoints / "iteration-000001"
    checkpoint.mkdir(parents=True)
    shutil.copy(run.config, checkpoint)
    if ROLES[name] is Role.KEPT:
        with pytest.raises(UserError, match=rf"The run was trained with {name}.* set it to .* again"):
            resume_run(run.path, [override])
        assert run.config.read_text() == to_yaml(load_config())
    else:
        assert holds(resume_run(run.path, [override])[1])


def test_a_setting_without_a_role_is_an_error() -> None:
    class Part(Settings):
        new: int = 0

    class Whole(Settings):
        part: Part = Part()
        old: Annotated[int, Role.KEPT] = 0

    with pytest.raises(TypeError, match=r"part.new declares 0 roles"):
        declared_roles(Whole)


def test_the_arguments_that_do_not_change_the_result_are_named_by_the_class() -> None:
    config = load_config(None, ["rewards={identity: {use: DinoReward}, far: {use: RemoteReward, reward: Hpsv3Reward}}"])
    expected = {
        "policy.use": Role.KEPT, "policy.offload": Role.RUNTIME, "policy.trainable": Role.KEPT,
        "rewards.identity.device": Role.RUNTIME, "rewards.identity.path": Role.KEPT, "rewards.far.url": Role.RUNTIME,
        "metrics.oracle_prompt.use": Role.APPLIED, "training.optimizer.use": Role.KEPT,
        "training.optimizer.lr": Role.APPLIED, "rollout.steps.use": Role.APPLIED, "rewards.gone.use": Role.KEPT,
    }  # fmt: skip
    assert {name: role_of(name, config) for name in expected} == expected
    for kind in (DinoReward, RemoteReward, VlmJudge):
        assert set(kind.RUNTIME) <= set(kind.__init__.__annotations__)


def test_differences_are_by_argument() -> None:
    one, other = load_config(), load_config(None, ["policy.lora={rank: 4}", "training.optimizer.lr=1"])
    assert differences(one, other) == {"policy.lora.rank": (None, 4), "training.optimizer.lr": (1.5e-4, 1)}


@pytest.mark.parametrize("name", NEW)
def test_the_role_of_a_setting_says_whether_two_results_differ(name: str) -> None:
    config = load_config(None, ["seed=0"])
    value = {"evaluation.replicates": 3, "tracking.log_with": []}.get(name, NEW[name][0])
    other = load_config(None, [f"{name}={json.dumps(value)}"])
    assert differences(config, other)
    assert bool(result_differences(config, other)) == (ROLES[name] is not Role.RUNTIME)
    given = [f"{setting}={value}" for setting, value in overrides(config, other).items()]
    assert load_config(None, given) == other


def test_an_override_takes_back_an_argument_that_is_no_longer_set() -> None:
    one, other = load_config(None, ["policy.offload=cpu"]), load_config(None, ["training.micro_batch=2"])
    assert sorted(overrides(one, other)) == ["policy", "training.micro_batch"]
    assert "offload" not in overrides(one, other)["policy"]
    assert overrides(other, one)["training.micro_batch"] == "null"


# ---- the optimizer and its schedule


@pytest.mark.parametrize(
    ("optimizer", "sentence"),
    [
        (
            {"use": "SGD", "lr": 1e-2},
            r'trained with training.optimizer.use = "AdamW", and .* cannot change it to "SGD"',
        ),
        ({**ADAMW, "amsgrad": True}, r"training.optimizer.amsgrad cannot change .* checkpoint has no 'max_exp_avg_sq'"),
    ],
)
def test_an_optimizer_that_the_checkpoint_does_not_fit_is_refused(
    run: RunFolder, optimizer: dict, sentence: str
) -> None:
    before = run.config.read_bytes()
    with pytest.raises(UserError, match=sentence):
        resume(run, training__optimizer=optimizer)
    assert run.config.read_bytes() == before


def test_a_new_learning_rate_is_not_forgotten_when_the_run_dies_before_its_next_checkpoint(run: RunFolder) -> None:
    trainer = make(run.path, {"training.iterations": 2, "training.optimizer": SLOWER})
    trainer._restore(run)
    run.adopt(to_yaml(trainer.config), 1)  # and then it is killed
    assert of_optimizer(resume(run, training__optimizer=SLOWER)) == SLOWER


def rates(run: RunFolder) -> list[float]:
    """Of the next optimizer step after each iteration."""
    return [record["update/learning_rate"] for record in run.records()]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_a_longer_run_goes_on_with_the_schedule_of_its_new_length(tmp_path: Path, schedule: str) -> None:
    settings = {"training.lr_schedule": schedule, "training.warmup_updates": 3}
    long = {**settings, "training.iterations": 4}
    straight = make(tmp_path / "straight", long)
    straight.train()
    make(tmp_path / "run", {**settings, "training.iterations": 2}).train()
    run = RunFolder(tmp_path / "run")
    make(run.path, long).train(resume=run)
    assert rates(run)[2:] == rates(RunFolder(tmp_path / "straight"))[2:]


def test_a_changed_number_of_updates_still_ends_the_schedule_with_the_run(run: RunFolder) -> None:
    changed = {"training.lr_schedule": "linear", "training.iterations": 3, "training.updates_per_epoch": 1}
    make(run.path, changed).train(resume=run)
    assert rates(run)[1:] == pytest.approx([1e-2 / 4, 0])  # two updates were done, two are left of four


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_ends_with_the_run_though_fewer_steps_are_trained_than_updates_asked_for(
    tmp_path: Path, schedule: str
) -> None:
    settings = {
        "training.lr_schedule": schedule, "training.iterations": 2, "training.updates_per_epoch": 50,
        "rollout.steps": {"use": "sliding_window", "size": 2},
    }  # fmt: skip
    trainer = make(tmp_path / "run", settings)
    trainer.train()
    assert trainer.update.updates == 4
    halfway, end = rates(RunFolder(tmp_path / "run"))
    assert halfway == pytest.approx(1e-2 * (0.5 if schedule == "linear" else 0.5 * (1 + math.cos(math.pi / 2))))
    assert end == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_the_learning_rate_rises_over_the_warm_up_under_every_schedule(tmp_path: Path, schedule: str) -> None:
    make(tmp_path / "run", {"training.lr_schedule": schedule, "training.warmup_updates": 4}).train()
    assert rates(RunFolder(tmp_path / "run")) == pytest.approx([1e-2 / 2])


def test_an_average_that_is_switched_on_starts_from_the_trained_weights(tmp_path: Path) -> None:
    make(tmp_path / "run", {"training.ema_decay": 0.0}).train()
    run = RunFolder(tmp_path / "run")
    trainer = make(run.path, {"training.ema_decay": 0.5, "training.iterations": 2})
    trainer._restore(run)
    assert trainer.update.ema is not None
    for name, weight in trainer.policy.trainable_state().items():
        torch.testing.assert_close(trainer.update.ema[name], weight, rtol=0, atol=0)
