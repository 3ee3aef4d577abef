"""The documents are run: every Python block of extending.md, and the ten lines of the README."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import BaseModel

import fakes
from customized_grpo.config import Config
from customized_grpo.policies.lora import LoraSettings
from customized_grpo.settings import Settings, Spec
from customized_grpo.settings.parse import describe_settings, parse_config
from customized_grpo.store.run import RunFolder
from customized_grpo.studies.bench.plan import BenchSettings
from customized_grpo.studies.compare.grid import Grid
from customized_grpo.studies.probe.measure import ProbeSettings
from customized_grpo.train.settings import OBJECTIVES, EvaluationSettings, RolloutSettings, TrainerConfig
from customized_grpo.train.trainer import Trainer
from tools.pretrain import PretrainSettings

ROOT = Path(__file__).parents[1]


def blocks(document: str, language: str = "python") -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("code", blocks("docs/extending.md"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_the_examples_of_extending_run(code: str) -> None:
    exec(compile(code, "docs/extending.md", "exec"), {"__name__": "example"})


def test_the_objective_of_extending_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in blocks("docs/extending.md") if "(Forward)" in block)
    assert len(code.splitlines()) <= 60
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (given,) = (block for block in blocks("docs/extending.md", "yaml") if "objective:" in block)
    tree = {"training": {"iterations": 2, "prompts_per_iteration": 2}, "tracking": {"log_with": []}}
    tree |= {"output": str(tmp_path / "run"), "evaluation": {"examples": 0}, **yaml.safe_load(given)}
    policy, rewards = fakes.LinearPolicy(), {"prompt": fakes.red, "identity": fakes.dark}
    config = parse_config({**tree, "rollout": {"num_inference_steps": 4}}, TrainerConfig)
    run = Trainer(policy, rewards, fakes.examples(), None, config).train().run
    assert all(0.5 < record["match/weight"] < 20 for record in RunFolder(run).records())
    assert not torch.equal(policy.trainable_state()["weight"], policy.before["weight"])


def test_the_lines_of_the_readme_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in blocks("README.md") if "Trainer(" in block)
    assert len(code.strip().splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    small = code.replace("iterations=40", "iterations=1, prompts_per_iteration=2")
    small = small.replace("config=config", "config=config.model_copy(update=SMALL)")
    assert small.count("SMALL") == small.count("iterations=1,") == 1

    quick = {
        "rollout": RolloutSettings(num_generations=2, num_inference_steps=3),
        "evaluation": EvaluationSettings(examples=2, replicates=1),
    }
    exec(compile(small, "README.md", "exec"), {"SMALL": quick})
    assert list((tmp_path / "runs").glob("*/checkpoints/iteration-000001/adapter/**/*.safetensors"))
    assert list((tmp_path / "runs").glob("*/report.html"))


def test_every_link_between_documents_leads_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_configuration_page_is_what_the_code_says() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert describe_settings(Config) in page, "run: python -m tests.test_docs"


def test_the_page_of_objectives_has_their_arguments() -> None:
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    for use, model in OBJECTIVES.items():
        for paragraph in describe_settings(model, "objective.").split("\n\n"):
            assert paragraph in page, use


def unexplained(model: type[BaseModel]) -> list[str]:
    """Settings with a name and a default alone, and sections with a name alone."""
    paragraphs = describe_settings(model).split("\n\n")
    return [text for text in paragraphs if not re.fullmatch(r"[\w.]+( = .*\n {4}|: )\S.*", text)]


EXPLAINED = [Config, BenchSettings, ProbeSettings, Grid, LoraSettings, PretrainSettings, *OBJECTIVES.values()]


@pytest.mark.parametrize("model", EXPLAINED)
def test_every_setting_is_explained(model: type[BaseModel]) -> None:
    assert unexplained(model) == []


def test_a_setting_without_an_explanation_is_found() -> None:
    class Inside(Settings):
        rate: float = 0.1
        """Of something."""

    class Model(Settings):
        """What it is: a model."""

        plain: int = 1
        colon: Spec = Spec(use="package.module:name")
        inside: Inside = Inside()
        explained: Spec = Spec(use="package.module:name")
        """What it does."""

    found = [text.split()[0] for text in unexplained(Model)]
    assert found == ["plain", "colon", "inside:"]


if __name__ == "__main__":
    page = ROOT / "docs" / "configuration.md"
    head = page.read_text(encoding="utf-8").split("```text")[0]
    page.write_text(f"{head}```text\n{describe_settings(Config)}\n```\n", encoding="utf-8")
