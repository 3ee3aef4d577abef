"""Every recipe is valid as it is, and runs from the command line with nothing but paths, sizes and counts replaced."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from customized_grpo import assemble, policies
from customized_grpo.cli.bench import read_settings
from customized_grpo.config import load_config
from customized_grpo.policies.lora import LoraSettings
from customized_grpo.policies.uno import add_uno
from customized_grpo.settings import Spec
from customized_grpo.settings.build import bind, check_spec
from customized_grpo.settings.parse import to_yaml
from customized_grpo.settings.recipes import RECIPES, recipe_names
from customized_grpo.studies.bench import make_plan, read_bench
from customized_grpo.studies.compare import cells
from customized_grpo.studies.compare.grid import load_grid
from customized_grpo.train.method import Method
from customized_grpo.train.preflight import check_sizes
from customized_grpo.train.rollout import sample_ode
from customized_grpo.train.trackers import RunFolder
from studies.bench.tiny import COLOURS, OmniContext, dreambench, dreambench_plus

from . import tiny
from .runs import from_the_command_line, write_files

ROOT = Path(__file__).parents[2]
FAR = ROOT / "tests" / "rewards" / "far"


def recipes(key: str = "training") -> list[Any]:
    """The recipes of a kind: of those with `protocol` or `methods`, variants of other recipes, or else of training."""

    def kind(file: Path) -> str:
        tree = yaml.safe_load(file.read_text())
        variant = "variants" if isinstance(tree.get("extends"), list) else "training"
        return next((key for key in ("protocol", "methods") if key in tree), variant)

    files = [RECIPES / f"{name}.yaml" for name in recipe_names()]
    return [pytest.param(file, id=str(file.relative_to(RECIPES))) for file in files if kind(file) == key]


FAMILIES = ("flux2-klein", "kontext", "qwen-image-edit", "uno-syncd", "flux2-dev")

# ---- as they are


@pytest.mark.parametrize("file", [*recipes(), *recipes("variants")])
def test_a_recipe_names_only_settings_that_exist(file):
    config = load_config(file)
    check_spec(config.policy, "policy")
    LoraSettings(**config.policy.arguments.get("lora", {}))
    for spec in config.rewards.values():
        check_spec(spec, "reward")
    check_spec(config.objective, "objective")
    if config.rollout.steps is not None:
        draw = torch.Generator().manual_seed(0)
        assert len(bind(config.rollout.steps, "steps")(0, config.rollout.num_inference_steps, generator=draw).trained)
    rows = config.training.prompts_per_iteration * config.rollout.num_generations
    assert rows % (config.training.micro_batch or 1) == 0
    rounded = config.policy.arguments["dtype"] == "bfloat16" and config.objective.use == "grpo"
    assert not rounded or config.training.old_log_probs == "recompute"


REAL = [
    *(pytest.param(RECIPES / f"{name}.yaml", id=name) for name in FAMILIES),
    *recipes("variants"),
]


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_every_family_has_recipes_for_three_machines_and_two_objectives(family):
    for memory, processes in {"-24gb": 1, "": 1, "-8x80gb": 8}.items():
        for objective in ("", "-nft"):
            config = load_config(f"{family}{objective}{memory}")
            check_sizes(config, 100, processes)
            assert config.objective.use == (objective.removeprefix("-") or "grpo")
            assert (config.policy.arguments["lora"]["rank"] == 16) == (memory == "-24gb")
            assert config.verified == "tiny"


@pytest.mark.parametrize("file", REAL)
def test_a_recipe_for_a_real_model_measures_what_it_does_not_train_on(file):
    """Where reward hacking shows."""
    config = load_config(file)
    trained = [spec.model_dump() for spec in config.rewards.values()]
    for spec in config.metrics.values():
        check_spec(spec, "metric")
    assert {"clip_t", "clip_i", "dino"} <= config.metrics.keys()
    assert all(spec.model_dump() not in trained for spec in config.metrics.values())
    assert config.metrics["dino"].arguments["path"] == "facebook/dino-vits16"


def test_what_the_shared_part_offers_against_refusing_is_valid():
    head = (RECIPES / "parts" / "real.yaml").read_text()
    offered = [shlex.split(line) for line in re.findall(r"^#   (\w+\.\S.*)$", head, re.MULTILINE)]
    assert len(offered) == 3
    for changes in offered:
        config = load_config("kontext", changes)
        check_spec(config.rewards["identity"], "reward")
        method = Method(config.method, list(config.rewards))
        images = 20 + torch.arange(8.0).reshape(1, 4, 2)
        weights = method.weights(torch.tensor([0.5]), 20, torch.Generator())
        advantages = method.advantages(images, weights, copies=images[:, :1])
        assert advantages.abs().sum() > 0


def test_the_papers_recipe():
    config = load_config(RECIPES / "uno-syncd.yaml")
    policy, rollout = config.policy.arguments, config.rollout
    assert (policy["lora"]["rank"], policy["shift"], policy["guidance_scale"]) == (512, 3.0, 4.0)
    assert (rollout.num_generations, rollout.num_inference_steps) == (12, 25)
    assert rollout.dynamics.arguments["noise_level"] == 0.4
    assert config.method.advantage.arguments["gamma"] == 0.4
    assert config.method.clip_range == 1e-4
    assert config.training.optimizer.arguments["lr"] == 2e-5
    assert list(config.rewards) == ["prompt", "identity"]
    plan = bind(rollout.steps, "steps")(0, 25, generator=torch.Generator().manual_seed(0))
    assert (len(plan.trained), len(plan.stochastic)) == (14, 24)


# ---- what stands in for models and services


@contextmanager
def judge() -> Iterator[str]:
    """The address of an endpoint that grades pictures by their colour."""
    with subprocess.Popen([sys.executable, str(FAR / "judge.py")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        process.kill()


CLIP, DINO = {"path": "toyworld:clip", "processor": "toyworld:clip"}, {"path": "toyworld:dino"}
REWARDS: dict[str, dict[str, Any]] = {
    "PickScoreReward": CLIP, "ClipReward": CLIP, "ClipImageReward": CLIP, "DinoReward": DINO,
    "RemoteReward": {"python": sys.executable, "environment": {"PYTHONPATH": str(FAR)}},
    "VlmJudge": {"model": "good"},
}  # fmt: skip
"""What is replaced in a reward. Its folder holds a stand-in of the hpsv3 package."""


def words(changes: Mapping[str, Any]) -> list[str]:
    return [f"{setting}={json.dumps(value)}" for setting, value in changes.items()]


def stand_ins(specs: Mapping[str, Spec], slot: str) -> dict[str, Any]:
    """Changes of rewards or metrics whose weights are not in this package."""
    changes: dict[str, Any] = {}
    for name, spec in specs.items():
        packaged = ":" in spec.use or str(spec.arguments.get("path", "")).startswith("toyworld:")
        if not packaged and spec.use not in REWARDS:
            pytest.fail(f"{slot}.{name} is a {spec.use}; say in REWARDS what stands in for it.")
        changes |= {f"{slot}.{name}.{key}": value for key, value in REWARDS.get(spec.use, {}).items() if not packaged}
    return changes


# ---- training


Trained = tuple[tiny.Family, RunFolder]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Trained]:
    """Trains as a recipe says, once. Without quantization: its libraries, and a GPU for nf4, are not here."""

    @cache
    def files(policy: str) -> tuple[tiny.Family, Path, dict[str, str]]:
        found, folder = [each for each in tiny.FAMILIES if each.policy == policy], tmp_path_factory.mktemp("family")
        if not found:
            pytest.fail(f"There is no tiny {policy}; add one to tiny.FAMILIES.")
        return found[0], folder, write_files(found[0], folder)

    @cache
    def run(file: Path, changed: tuple[str, ...] = ()) -> Trained:
        folder, config = tmp_path_factory.mktemp("recipe"), load_config(file)
        micro_batch = config.training.micro_batch or 1
        changes: dict[str, Any] = {
            "output": str(folder / "run"), "policy.device": "cpu", "policy.quantize": "none",
            "training.iterations": 2, "training.prompts_per_iteration": 2,
            "rollout.num_generations": 2 * micro_batch, "rollout.num_inference_steps": 5,
            "evaluation.examples": 2, "evaluation.replicates": 1, "evaluation.grid_rows": 1,
            **stand_ins(config.rewards, "rewards"), **stand_ins(config.metrics, "metrics"),
        }  # fmt: skip
        family = TOY
        if config.policy.arguments["path"] != "toyworld:pipeline":
            family, data, paths = files(config.policy.use)
            made = {"resolution": 16, "reference_resolution": 16, **family.settings, **paths}
            changes |= {f"policy.{name}": value for name, value in made.items()}
            changes["data.train"] = str(data / "train.jsonl")
        with family.loadable(), pytest.MonkeyPatch.context() as patch:
            if family is not TOY:  # one report is enough, and each takes a second
                patch.setattr("customized_grpo.studies.report.write_report", lambda run, status: None)
            said = from_the_command_line("train", file, *words(changes), *changed)
            assert config.verified in said if config.verified else "verified" not in said
        return family, RunFolder(folder / "run")

    return run


def toy_pipeline() -> Any:
    return policies.FluxKontextPolicy.load_pipeline("toyworld:pipeline")


TOY = tiny.Family("FluxKontextPolicy", toy_pipeline)


@pytest.mark.parametrize("file", recipes())
def test_it_trains_saves_and_loads_in_the_stock_pipeline(file, trained):
    family, run = trained(file)
    config, records = load_config(run.config, ["policy.dtype=float32"]), run.records()
    assert [record["iteration"] for record in records] == [1, 2]
    assert all(np.isfinite(record["update/loss"]) and record["update/grad_norm"] > 0 for record in records)
    assert [record["update/skipped"] for record in records] == [0, 0]
    if config.method.clip_range is not None:
        assert all(record["update/first_ratio_error"] < 0.1 * config.method.clip_range for record in records)
    with family.loadable():
        policy = assemble.build_policy(config)
    conditioning = policy.encode(family.examples())
    noise = tiny.noise(policy, conditioning)
    before = sample_ode(policy, conditioning, noise, 2)
    assemble.load_trained(policy, run)
    wanted = sample_ode(policy, conditioning, noise, 2)
    policy.module = policy.transformer = stock_transformer(family, run, config.policy)
    again = sample_ode(policy, conditioning, noise, 2)
    assert float((wanted - before).abs().max()) > 20 * float((again - wanted).abs().max())
    torch.testing.assert_close(again, wanted, atol=1e-5, rtol=0)


SMALL = ("training.iterations=1", "rollout.num_generations=2")
ONCE = (*SMALL, "evaluation.examples=0", "metrics={}", "tracking.log_with=[]")


@pytest.mark.parametrize("file", recipes("variants"))
def test_a_variant_trains(file, trained):
    """Once."""
    _, run = trained(file, ONCE)
    (record,) = run.records()
    assert np.isfinite(record["update/loss"])
    assert record["update/grad_norm"] > 0


def stock_transformer(family: tiny.Family, run: RunFolder, spec: Spec) -> torch.nn.Module:
    """Of the family's own pipeline with what the run saved, read as diffusers reads it."""
    fresh, adapter = family.pipeline(), run.checkpoints / "iteration-000002" / "adapter"
    if "adapter" in spec.arguments:
        add_uno(fresh.transformer, spec.arguments["adapter"])
    if (adapter / "transformer").is_dir():
        return type(fresh.transformer).from_pretrained(adapter / "transformer")
    fresh.load_lora_weights(adapter)
    return fresh.transformer


# ---- benches


@pytest.mark.parametrize("file", recipes("protocol"))
def test_it_benches_a_run(file, trained, tmp_path, monkeypatch):
    _, run = trained(RECIPES / "uno-syncd.yaml")
    plan = make_plan(read_settings([str(file)]), load_config())
    specs = {name: metric.spec for name, metric in plan.metrics.items()}
    changes = {
        "data": str(dreambench(tmp_path / "data")), "policy.resolution": 16, "images": 1, "num_inference_steps": 2,
        **stand_ins(specs, "metrics"),
    }  # fmt: skip
    if plan.protocol.suite == "file":
        prompts = [{"prompt": f"a {name} in the snow", "image_paths": [f"x/{name}/00.png"]} for name in COLOURS]
        (tmp_path / "prompts.json").write_text(json.dumps(prompts))
        changes["prompts"] = str(tmp_path / "prompts.json")
    elif plan.protocol.suite == "dreambench++":
        changes["data"] = str(dreambench_plus(tmp_path / "plus"))
    elif plan.protocol.suite == "omnicontext":
        monkeypatch.setattr("customized_grpo.studies.bench.suites.open_dataset", lambda path: OmniContext())
    with judge() as url:
        judged = [name for name, spec in specs.items() if spec.use == "VlmJudge"]
        changes |= {f"metrics.{name}.url": url for name in judged}
        changes |= {f"metrics.{name}.cache": str(tmp_path / "judge.jsonl") for name in judged}
        from_the_command_line("bench", file, *words(changes), "--run", run.path, "--output", tmp_path / "out")
    measured = read_bench(tmp_path / "out")
    assert set(measured.metrics) == set(specs)
    held = [metric.role != "copy" for metric in plan.metrics.values()]  # a copied background needs a mask to be known
    assert np.isfinite(measured.scores.values[:, :, held]).all()
    assert (tmp_path / "out" / "report.html").is_file()


# ---- comparisons


@pytest.mark.parametrize("file", recipes("methods"))
def test_its_methods_train_and_are_compared(file, tmp_path, monkeypatch):
    """Each on the smallest policy, in this process, which has the encoders already, and without a report of its own."""
    build, encoders = assemble.build_rewards, {}

    def build_once(specs: dict[str, Spec], slot: str = "reward") -> dict[str, Any]:
        for spec in specs.values():
            if (key := spec.model_dump_json()) not in encoders:
                encoders[key] = build({"only": spec}, slot)["only"]
        return {name: encoders[spec.model_dump_json()] for name, spec in specs.items()}

    def run_cells(todo: list[cells.Cell], **options: Any) -> dict[str, cells.State]:
        for cell in todo:
            from_the_command_line(*cells.command(cell, cells.state(cell))[3:])
            cell.run.config.write_text(to_yaml(cell.config))
        return {cell.name: cells.state(cell) for cell in todo}

    monkeypatch.chdir(tmp_path)  # files beside a recipe are found from anywhere
    monkeypatch.setattr(assemble, "build_rewards", build_once)
    monkeypatch.setattr("customized_grpo.studies.report.write_report", lambda run, status: None)
    monkeypatch.setattr(cells, "run_cells", run_cells)
    changes = {
        "policy": {"use": "fakes:LinearPolicy"},
        "training.iterations": 1, "training.prompts_per_iteration": 2,
        "rollout.num_generations": 2, "rollout.num_inference_steps": 5,
        "evaluation.examples": 2, "evaluation.replicates": 1, "evaluation.grid_rows": 1,
    }  # fmt: skip
    shrunk = words({f"config.{setting}": value for setting, value in changes.items()})
    said = from_the_command_line("compare", file, "seeds=[0]", *shrunk, "--output", tmp_path / "out")
    grid = load_grid(tmp_path / "out" / "compare.yaml")
    assert f"{len(grid.methods)} runs of {len(grid.methods)} methods" in said
    assert all(cells.state(cell).status == "finished" for cell in cells.cells(grid, tmp_path / "out"))
    assert (tmp_path / "out" / "report.html").is_file()
