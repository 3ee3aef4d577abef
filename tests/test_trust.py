"""Somebody else's folder: what it names is neither imported nor started before this user trusts it."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import BaseModel

from customized_grpo import trust
from customized_grpo.assemble import open_run
from customized_grpo.cli import main as cli
from customized_grpo.config import Config, check_names, load_config, open_config
from customized_grpo.errors import UserError
from customized_grpo.settings import Spec, recipes
from customized_grpo.settings.build import HOMES, exported, resolve
from customized_grpo.settings.parse import parse_config
from customized_grpo.studies.compare import cells as command
from customized_grpo.studies.compare.cells import State
from customized_grpo.studies.compare.grid import open_grid
from studies.compare.fabricate import fabricate
from studies.compare.tiny import CONFIG

RECIPES = sorted(p for p in recipes.RECIPES.rglob("*.yaml") if "\nmethods:" not in p.read_text())
EVIL = """
from pathlib import Path
Path(__file__).with_name("MARK").write_text("imported")
def boom(*given, **settings):
    return given[0].mean((1, 2, 3))
"""
TOY = {"rewards": {"prompt": {"use": "ClipReward", "path": "toyworld:clip"}}, "metrics": {}}
HOSTILE = {**TOY, "policy": {"use": "evil:boom"}, "rollout": {"steps": {"use": "evil:boom"}}}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user who trusts nothing yet, in a folder with a module that leaves a mark when it is imported."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(sys, "path", [*sys.path, ""])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(EVIL)
    yield tmp_path
    sys.modules.pop("evil", None)


@pytest.fixture
def cgrpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    """The command line in this process: exit status, and what it said."""

    def run(*words: object) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["cgrpo", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code, said.out + said.err

    return run


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def needed(**rewards: Any) -> dict[str, str]:
    """What rewards need trust for, by setting."""
    found = trust.items(parse_config({"rewards": rewards}, Config).specs())
    return {item.where.removeprefix("rewards."): item.value for item in found if item.told}


# ---- every command


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--resume", "run"],
        ["generate", "--run", "run"],
        ["export", "--run", "run", "--output", "x.safetensors"],
        ["eval", "--run", "run"],
        ["eval", "run/config.yaml"],
        ["probe", "--run", "run"],
        ["probe", "run/config.yaml"],
        ["probe", "--resume", "run"],
        ["bench", "toyworld", "--run", "run"],
        ["bench", "toyworld", "--config", "run/config.yaml"],
        ["bench", "toyworld", "config=run/config.yaml"],
        ["bench", "bench.yaml"],
        ["rewards", "check", "run/config.yaml"],
        ["compare", "--resume", "grid"],
    ],
    ids=" ".join,
)
def test_no_command_runs_what_a_folder_names(
    home: Path, cgrpo: Callable[..., tuple[Any, str]], words: list[str]
) -> None:
    write(home / "run" / "config.yaml", HOSTILE)
    (home / "run" / "probe.json").write_text('{"settings": {}}')
    write(home / "grid" / "compare.yaml", {"config": HOSTILE, "methods": ["naive_1to1"], "seeds": [0]})
    write(home / "bench.yaml", {"policy": {"use": "evil:boom"}, "metrics": {"prompt": {"use": "evil:boom"}}})
    status, said = cgrpo(*words)
    assert status == 2
    assert said.count("error:") == len(said.strip().splitlines()) == 1, said
    assert f"evil:boom in {home / 'evil.py'}" in said
    assert "--trust-code" in said
    assert not (home / "MARK").exists()
    assert "evil" not in sys.modules
    assert not (home / "state").exists(), "nothing is trusted by being refused"


def test_reading_a_comparison_runs_nothing_of_it(home: Path, cgrpo: Callable[..., tuple[Any, str]]) -> None:
    fabricate(home / "out", {"naive_1to1": (0.1,) * 4}, seeds=[0])
    for name in ("compare.yaml", "base/config.yaml", "cells/naive_1to1/seed-0/config.yaml"):
        tree = yaml.safe_load((home / "out" / name).read_text())
        tree.get("config", tree)["rollout"]["steps"] = {"use": "evil:boom"}
        write(home / "out" / name, tree)
    status, said = cgrpo("compare", "--status", home / "out")
    assert (status, "1 finished" in said) == (0, True), said
    assert cgrpo("report", home / "out")[0] == 0
    assert not (home / "MARK").exists()
    assert "evil" not in sys.modules


def test_config_check_imports_nothing_but_checks_what_is_ours(
    home: Path, cgrpo: Callable[..., tuple[Any, str]]
) -> None:
    rewards = {**TOY["rewards"], "far": {"use": "RemoteReward", "reward": {"use": "evil:boom"}}}
    file = write(home / "c.yaml", {**HOSTILE, "rewards": rewards})
    status, said = cgrpo("config", "--check", file)
    assert status == 0
    assert "Not checked" in said
    for where in ("policy.use", "rollout.steps.use", "rewards.far.reward.use"):
        assert f"{where} = evil:boom" in said
    assert not (home / "MARK").exists()
    for override, sentence in {
        "rewards.prompt.pth=x": "takes no setting 'pth'",
        "rewards.far.reward={use: ClipReward, pth: x}": "takes no setting 'pth'",
        "training.optimizer={use: AdamW, lrr: 1}": "takes no setting 'lrr'",
        "training.optimizer=lr_scheduler": "there is no 'lr_scheduler'",
    }.items():
        status, said = cgrpo("config", "--check", file, override)
        assert (status, sentence in said) == (2, True), said


def test_trust_is_asked_for_once_and_again_when_something_changes(
    home: Path, cgrpo: Callable[..., tuple[Any, str]]
) -> None:
    tree = {**TOY, "rewards": {**TOY["rewards"], "mine": {"use": "evil:boom", "strength": 1}}}
    check = ["rewards", "check", write(home / "config.yaml", tree)]
    assert cgrpo(*check)[0] == 2
    assert cgrpo(*check, "--trust-code")[0] == 0
    assert (home / "MARK").exists()
    assert cgrpo(*check)[0] == 0
    file = home / "state" / "customized-grpo" / "trusted"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    tree["rewards"]["mine"]["strength"] = 2
    assert cgrpo("rewards", "check", write(home / "config.yaml", tree))[0] == 2, "another argument does other things"
    assert cgrpo(*check, "rewards.mine.strength=1")[0] == 2, "the file's code is not trusted, whatever is typed beside"


SETTINGS_ONLY = {
    "cli/main": "`train` is given a trusted file; `config` makes nothing",
    "config": "`open_config` itself",
    "assemble": "compared with what `open_config` gave",
    "cli/probe": "compared with what `open_config` gave",
    "studies/compare/cells": "compared with the grid",
    "cli/compare": "a grid that the user names",
    "studies/compare/grid": "`open_grid` itself",
}
"""The files that read settings without asking for trust, and why they may."""


def test_whoever_reads_a_folder_goes_through_the_one_door() -> None:
    root = Path(trust.__file__).parent
    found = {
        file.relative_to(root).with_suffix("").as_posix()
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("load_config", "load_grid")
    }
    assert found == SETTINGS_ONLY.keys()


# ---- this user's own


@pytest.fixture
def own(home: Path, cgrpo: Callable[..., tuple[Any, str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that this user trained, from a configuration full of foreign names."""
    monkeypatch.setattr("customized_grpo.studies.report.write_report", lambda run, status: None)  # slower than the rest
    tree = {**CONFIG, "training": {**CONFIG["training"], "iterations": 1}, "metrics": {"sharp": {"use": "evil:boom"}}}
    status, said = cgrpo("train", write(home / "mine.yaml", tree), f"output={home / 'own'}")
    assert status == 0, said
    line = next(line for line in said.splitlines() if line.startswith("trusted: "))
    assert f"metrics.sharp.use = 'evil:boom in {home / 'evil.py'}'" in line
    return home / "own"


def test_an_own_run_goes_on_without_a_word(
    own: Path, home: Path, cgrpo: Callable[..., tuple[Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("train", "--resume", own)
    assert cgrpo(*more, "training.iterations=2", "checkpoint.every=5")[0] == 0
    assert cgrpo("eval", "--run", own)[0] == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "another machine"))
    status, said = cgrpo(*more, "training.iterations=4")
    assert (status, "--trust-code" in said) == (2, True)
    assert cgrpo(*more, "training.iterations=4", "--trust-code")[0] == 0
    assert cgrpo(*more, "training.iterations=5")[0] == 0


def test_in_python_it_is_the_same(home: Path) -> None:
    folder = write(home / "run" / "config.yaml", HOSTILE).parent
    with pytest.raises(UserError, match=r"evil:boom in .*trust_code=True"):
        open_run(folder)
    assert open_run(folder, trust_code=True)
    assert open_run(folder)


def test_the_same_name_in_another_folder_is_another_module(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(home / "run" / "config.yaml", HOSTILE).parent
    assert open_run(folder, trust_code=True)
    elsewhere = home / "downloads"
    elsewhere.mkdir()
    (elsewhere / "evil.py").write_text(EVIL)
    monkeypatch.chdir(elsewhere)
    with pytest.raises(UserError, match=r"downloads/evil\.py"):
        open_run(folder)


def test_a_home_that_cannot_be_written_only_asks_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(home / "run" / "config.yaml", HOSTILE).parent
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "file"))
    assert open_run(folder, trust_code=True)
    with pytest.raises(UserError, match="--trust-code"):
        open_run(folder)


def test_an_own_grid_goes_on_without_a_word(
    home: Path, cgrpo: Callable[..., tuple[Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gains = {"naive_1to1": (0.0, 0.1, 0.0, 0.0), "customized": (0.1, 0.1, 0.1, 0.1)}
    fabricate(home / "out", gains, seeds=[0])
    monkeypatch.setattr(command, "run_cells", lambda made, **options: {cell.name: State("failed") for cell in made})
    go_on = ("compare", "--resume", home / "out")
    assert "--trust-code" in cgrpo(*go_on)[1], "somebody else's"
    assert cgrpo("compare", "--status", home / "out")[0] == 0, "nothing of it runs to see where it stands"
    file = write(home / "grid.yaml", {"config": CONFIG, "methods": list(gains), "seeds": [0]})
    said = cgrpo("compare", file, "--output", home / "out")[1]
    assert "trusted: " in said
    assert "policy.use = 'fakes:LinearPolicy in" in said
    said = cgrpo(*go_on)[1]
    assert "--trust-code" not in said
    assert "2 of 2 runs did not finish" in said
    assert "--trust-code" in command_of_a_cell(home / "out")


def command_of_a_cell(root: Path) -> list[str]:
    from customized_grpo.studies.compare.cells import cells
    from customized_grpo.studies.compare.cells import command as words

    return words(cells(open_grid(root), root)[1], State("stopped"))


def test_what_is_typed_is_trusted_and_the_rest_of_the_file_is_not(home: Path) -> None:
    file = write(home / "config.yaml", {**TOY, "policy": {"use": "evil:boom"}})
    assert open_config(file, ["policy={use: 'mine:Policy'}"]).policy.use == "mine:Policy"
    with pytest.raises(UserError, match="evil:boom"):
        open_config(file, ["seed=1"])
    lying = write(home / "lying.yaml", {"rewards": {"prompt": {"use": "ClipReward", "python": "there/python"}}})
    with pytest.raises(UserError, match=r"rewards\.prompt\.python"):
        open_config(lying, ["rewards.prompt.use=RemoteReward", "rewards.prompt.reward=ClipReward"])


# ---- what needs trust


def test_what_starts_tells_or_overwrites_needs_trust(home: Path) -> None:
    far = {"use": "RemoteReward"}
    judge = {"use": "VlmJudge", "model": "m"}
    assert needed(a={**far, "reward": "evil:boom"}).keys() == {"a.reward.use"}
    assert needed(a={**far, "reward": {**far, "reward": {"use": "evil:boom"}}}).keys() == {"a.reward.reward.use"}
    assert needed(a={**far, "reward": "import_module"}).keys() == {"a.reward.use"}
    assert needed(a={**far, "reward": "ClipReward", "python": "p"}).keys() == {"a.python"}
    assert needed(a={**far, "reward": "ClipReward", "environment": {"LD_PRELOAD": "x"}}).keys() == {"a.environment"}
    assert needed(a={**far, "reward": "ClipReward", "log": "~/.bashrc"}) == {"a.log": str(Path.home() / ".bashrc")}
    assert needed(a={**far, "url": "http://gpu-2:9000"}).keys() == {"a.url"}
    assert needed(a={**judge, "url": "https://evil.example/v1"}).keys() == {"a.url"}
    assert needed(a={**judge, "api_key_variable": "AWS_SECRET"}) == {"a.api_key_variable": "AWS_SECRET"}
    assert needed(a={**judge, "cache": "verdicts.jsonl"}).keys() == {"a.cache"}
    assert needed(a={"use": "Hpsv3Reward", "checkpoint": "x.pt", "config": "c"}).keys() == {"a.checkpoint", "a.config"}
    nested = {"use": "mine:Sum", "parts": [{"use": "evil:boom"}, {"deep": {"use": "subprocess:Popen"}}]}
    assert needed(a=nested).keys() == {"a.use", "a.parts.0.use", "a.parts.1.deep.use"}


def test_what_stays_here_needs_none() -> None:
    near = {"use": "RemoteReward", "reward": {"use": "ClipReward", "path": "toyworld:clip"}, "python": None}
    assert needed(a=near, b={"use": "VlmJudge", "model": "m"}) == {}
    assert needed(a={"use": "VlmJudge", "model": "m", "url": "http://localhost:8000/v1"}) == {}
    assert needed(a={"use": "customized_grpo.rewards.clip:ClipReward"}) == {}
    assert trust.items(load_config().specs()) == frozenset()


@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name != "bench"], ids=lambda p: p.stem)
def test_recipes_name_nothing_foreign_but_interpreters(path: Path) -> None:
    assert not [item for item in trust.items(load_config(path).specs()) if item.where.endswith(".use")]


def test_a_path_is_the_file_that_it_leads_to(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def python() -> str:
        return needed(a={"use": "RemoteReward", "reward": "ClipReward", "python": "bin/python"})["a.python"]

    relative = python()
    assert relative == str(home / "bin" / "python")
    (home / "bin").mkdir()
    (home / "bin" / "python").symlink_to("one")
    linked = python()
    (home / "bin" / "python").unlink()
    (home / "bin" / "python").symlink_to("two")
    assert len({relative, linked, python()}) == 3
    (home / "other").mkdir()
    monkeypatch.chdir(home / "other")
    assert python() == str(home / "other" / "bin" / "python")


# ---- names within the package


@pytest.mark.parametrize(
    ("slot", "use"),
    [
        ("policy", "customized_grpo.settings.build:import_module"),
        ("policy", "customized_grpo.policies:import_module"),
        ("policy", "customized_grpo.policies.export:export_adapter"),
        ("policy", "customized_grpo.policies:LoraSettings"),
        ("policy", "PipelinePolicy"),
        ("policy", "ClipReward"),
        ("reward", "RewardUnavailable"),
        ("reward", "Reward"),
        ("reward", "check_reward"),
        ("reward", "customized_grpo.rewards.remote:subprocess"),
        ("reward", "customized_grpo.rewards.clip.nothing:ClipReward"),
        ("reward", "customized_grpo.rewards_of_mine:ClipReward"),
        ("dataset", "load_datasets"),
        ("advantage", "standardize"),
        ("advantage", "inspect"),
        ("time_weights", "save_time_weights"),
        ("dynamics", "torch"),
        ("steps", "StepPlan"),
        ("optimizer", "lr_scheduler"),
        ("optimizer", "Optimizer"),
        ("optimizer", "swap_in_optimizer_params_and_state"),
        ("optimizer", "torch.optim.lr_scheduler:StepLR"),
        ("optimizer", "torch.optim.adam:torch"),
    ],
)
def test_only_what_a_home_exports_for_the_slot_is_fine(slot: str, use: str) -> None:
    assert exported(use, slot) is None
    if ":" not in use:
        with pytest.raises(UserError, match=f"there is no '{use}'"):
            resolve(use, slot)


def test_what_a_home_exports_is_fine_by_any_path() -> None:
    assert exported("torch.optim.adamw:AdamW", "optimizer") is torch.optim.AdamW
    assert exported("customized_grpo.toyworld.dataset:ToyWorld", "dataset") is not None
    for slot, names in {"advantage": ["sars", "raw_sum"], "time_weights": ["tabulated", "from_file"]}.items():
        assert all(exported(name, slot) for name in names)


HARMLESS = {
    *("path", "processor", "revision", "adapter", "adapter_revision", "transformer", "device", "dtype", "seed"),
    *(
        "batch_size",
        "segment",
        "segmenter",
        "detector",
        "reduce",
        "tolerance",
        "oracle",
        "images",
        "timeout",
        "start_timeout",
        "retries",
    ),
    *("backoff", "patience", "concurrency", "rubric", "model", "instructions", "longest_side", "prices"),
    *("aspect", "cache_mib", "fuse", "gradient_checkpointing", "guidance_scale", "true_cfg_scale", "height", "width"),
    *("lora", "max_text_tokens", "negative_prompt", "offload", "pipeline", "quantize", "reference_resolution"),
    *("resolution", "settings", "shift", "trainable", "count", "id", "kinds", "per_subject", "prompt", "references"),
    *("kind", "split", "subject", "subject_id", "max_tokens", "max_completion_tokens", "temperature", "extra_body"),
    *("attention", "compile"),
    *("grey", "target", "target_centre", "size", "passes", "graded", "whole_groups"),
}
"""Arguments that were looked at: weights and data are read without running code, the rest are numbers and words."""


@pytest.mark.parametrize("slot", ["reward", "policy", "dataset"])
def test_every_argument_of_what_is_ours_was_looked_at(slot: str) -> None:
    """A new argument fails here until it is in HARMLESS or guarded."""
    for home in HOMES[slot]:
        for name in import_module(home).__all__:
            if (found := exported(name, slot)) is not None:
                makers = [found, getattr(found, "from_pretrained", found)]
                known = {parameter for maker in makers for parameter in inspect.signature(maker).parameters}
                assert not known - HARMLESS - trust.GUARDED.keys() - {"reward"}, name


def test_every_name_in_a_configuration_is_walked() -> None:
    """A new setting that names code fails here until `specs` gives it."""

    def named(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            kinds = {field.annotation, *get_args(field.annotation)}
            if Spec in kinds:
                yield prefix + name
            for kind in kinds:
                if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not Spec:
                    yield from named(kind, f"{prefix}{name}.")

    far = {"train": {"use": "x:y"}, "eval": {"use": "x:y"}}
    config = parse_config({"data": far, "metrics": {"m": {"use": "x:y"}}}, Config)
    walked = [where for where, _, _ in config.specs()]
    for setting in named(Config):
        assert any(f"{where}.".startswith(f"{setting}.") for where in walked), setting


def test_a_grid_still_imports_what_it_is_about_to_run(home: Path) -> None:
    assert check_names(parse_config(CONFIG, Config)) == []
    with pytest.raises(UserError, match="there is no 'Boom' in evil"):
        check_names(parse_config({**TOY, "policy": "evil:Boom"}, Config))


def test_nothing_here_needs_torch() -> None:
    code = "import sys, customized_grpo.trust; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
