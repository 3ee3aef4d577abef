"""A plan against a run, and what it advises."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from customized_grpo import policies
from customized_grpo.cli.main import app
from customized_grpo.config import Config, load_config
from customized_grpo.errors import UserError
from customized_grpo.plan.estimate import Choice, Planner
from customized_grpo.plan.fakes import PACKAGED, FakeFamily, fake_model, fake_reward, without_contents
from customized_grpo.plan.hardware import Gpu, find_gpu
from customized_grpo.policies.quantization import LIBRARIES
from customized_grpo.settings import Spec
from customized_grpo.store import read_json
from plan.test_whole import deep_kontext
from policies import tiny
from train.test_memory import make, measure

ROLLOUT = {"num_generations": 4, "num_inference_steps": 3, "steps": "all_steps"}
TRAINING = {"iterations": 2, "prompts_per_iteration": 2, "updates_per_epoch": 1}


def configured(folder: Path, *overrides: str) -> Config:
    given = [f"rollout.{name}={value}" for name, value in ROLLOUT.items()]
    given += [f"training.{name}={value}" for name, value in TRAINING.items()]
    policy = ["policy.use=FluxKontextPolicy", f"policy.path={folder}", "policy.dtype=float32", "evaluation.examples=0"]
    return load_config(None, [*given, *policy, *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep_kontext(tmp_path_factory.mktemp("kontext"))


@pytest.fixture(scope="module")
def planner(folder: Path) -> Planner:
    planner = Planner(configured(folder, "policy.trainable=lora", "training.micro_batch=4"))
    planner.rewards.clear()  # they would take more than this small transformer
    return planner


def gpu_of(usable: int) -> Gpu:
    return Gpu((usable / 2**30 + 1) / 0.95, 1.0, 1.0)


@pytest.mark.filterwarnings("ignore:There are modules in")
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_memory_is_what_a_run_takes(trainable: str, folder: Path, tmp_path: Path) -> None:
    config = configured(folder, f"policy.trainable={trainable}")
    planned = Planner(config)
    policy = policies.FluxKontextPolicy.from_pretrained(folder, trainable=trainable, device="cpu")  # pyright: ignore
    trainer = make(policy, tiny.FAMILIES[0].examples(), tmp_path)
    measured = measure(policy, trainer.train)
    memory = planned.memory(planned.given)  # with the rewards of the toy world, where the run has functions
    peak = max(memory.of(stage) for stage in memory.stages if stage != "rewards")
    assert peak - memory.resident["rewards"] == pytest.approx(measured, rel=0.15)


def test_parts_and_stages(planner: Planner) -> None:
    given = planner.given
    memory = planner.memory(given)
    assert set(memory.stages) == {"encode", "rollout", "decode", "update", "optimizer", "rewards"}
    assert memory.resident["optimizer"] == pytest.approx(2 * memory.resident["adapter"], rel=0.01)
    asleep = planner.memory(Choice(given.micro_batch, given.checkpointing, "cpu", given.quantize))
    assert sum(memory.resident.values()) - sum(asleep.resident.values()) == planner.first.encoders + planner.first.vae
    assert planner.uncounted == [
        "oracle_prompt (PromptShown)", "oracle_subject (SubjectKept)", "oracle_right (FullyRight)"
    ]  # fmt: skip


def test_what_is_left_out_is_named(planner: Planner) -> None:
    named = {
        "far": {"use": "RemoteReward", "url": "http://host:1"},
        "hps": {"use": "RemoteReward", "reward": {"use": "Hpsv3Reward"}},
        "here": {"use": "RemoteReward", "reward": {"use": "DinoReward", "path": "toyworld:dino"}},
        "small": {"use": "DinoReward", "path": "toyworld:dino", "device": "cpu"},
    }
    other = planner.among(2)
    rewards = {name: Spec.model_validate(spec) for name, spec in named.items()}
    other.config = other.config.model_copy(update={"rewards": rewards, "metrics": {}})
    other.rewards, other.uncounted = {}, []
    with without_contents():
        other._count_rewards()
    assert [*other.rewards] == ["here"]
    assert other.left_out(replace(planner.given, quantize="nf4")) == [
        "far (RemoteReward)",
        "hps (RemoteReward of Hpsv3Reward: 17 GB for 8.3 billion weights in bfloat16, and activations)",
        "small (on the CPU)",
        "texts of rewards",
        "communication between GPUs",
        "that kernels of quantised layers are slower than bfloat16",
    ]


def test_more_gpus_take_a_part_of_the_prompts(planner: Planner) -> None:
    gpu, two = gpu_of(2**30), planner.among(2)
    one_stage, two_stage = (sum(p.seconds(p.given, gpu).values()) for p in (planner, two))
    assert two_stage == pytest.approx(one_stage / 2)
    assert two.memory(two.given).resident["rollouts"] * 2 == planner.memory(planner.given).resident["rollouts"]
    with pytest.raises(UserError, match="3 processes do not divide"):
        planner.among(3)


def test_shards_are_one_division(planner: Planner) -> None:
    whole = planner.resident(planner.given)
    planner.shards = 4
    part = planner.resident(planner.given)
    planner.shards = 1
    assert part["adapter"] == pytest.approx(whole["adapter"] / 4, abs=1)
    assert part["rollouts"] == whole["rollouts"]


def test_a_small_gpu_gets_a_setting_that_fits(planner: Planner) -> None:
    given, roomy = planner.given, gpu_of(2**33)
    assert planner.fastest(roomy) == Choice(8, False, "none", "none")
    tight = gpu_of(planner.memory(given).peak - 1)
    best = planner.fastest(tight)
    assert best is not None
    assert planner.memory(best).peak <= tight.usable
    assert best.settings(given)
    assert "micro_batch" in planner.advice(given, tight)
    assert planner.fastest(gpu_of(1000)) is None
    assert planner.advice(given, gpu_of(1000)).startswith("set ")


def test_quantised_weights_take_their_room(planner: Planner) -> None:
    sizes = {name: planner.resident(Choice(4, False, "none", name))["weights"] for name in ("none", *LIBRARIES)}
    assert sizes["nf4"] < sizes["int8"] < sizes["none"] / 3


def test_packaged_sizes_are_those_of_the_models() -> None:
    """Parameters as their makers publish them, in billions."""
    known = read_json(PACKAGED / "models.json")
    published = {
        "FluxPipeline": 11.90,
        "Flux2KleinPipeline": 3.88,
        "Flux2KleinPipeline 9B": 9.0,
        "Flux2Pipeline": 32.0,
        "QwenImageEditPlusPipeline": 20.43,
    }
    for name, billions in published.items():
        with without_contents():
            count = sum(p.numel() for p in fake_model(known[name]["transformer"]).parameters())
        assert count / 1e9 == pytest.approx(billions, rel=0.01), name


def test_unknown_names_are_said(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no GPU 'h100' in the table.*Did you mean 'h100-80'"):
        find_gpu("h100")
    for path in ("somebody/model", str(folder)):
        with pytest.raises(UserError, match="whose sizes are not known"):
            FakeFamily(Spec.model_validate({"use": "mine:Policy", "path": path}))
    with without_contents():
        assert fake_reward(Spec(use="RemoteReward")) is None


def test_the_command_prints_its_tables_and_the_verdict(folder: Path) -> None:
    words = ["plan", "policy.use=FluxKontextPolicy", f"policy.path={folder}", "policy.trainable=lora", "--gpu", "4090"]
    result = CliRunner().invoke(app, [*words, "--price", "2", "training.micro_batch=4"])
    assert result.exit_code == 0, result.output
    for said in ("Memory of one GPU, counted", "One iteration at 40% of the", "Fits: at most", "hours, "):
        assert said in result.output
