"""The documents are run: every Python block of extending.md, and the ten lines of the README."""

import re
from pathlib import Path

import numpy as np
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
from customized_grpo.store.scores import Scores, worst_gain
from customized_grpo.studies.bench.plan import BenchSettings
from customized_grpo.studies.compare import analysis
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


def rows_of(document: str, heading: str) -> list[list[str]]:
    """The cells of the first table below some text, without its head."""
    text = (ROOT / document).read_text(encoding="utf-8").split(heading)[1].replace("\N{MINUS SIGN}", "-")
    table = re.search(r"^\|.*?(?=^$)", text, re.M | re.S)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


def test_the_example_of_a_worst_reward_gain_is_computed() -> None:
    rows = rows_of("docs/metrics.md", "### Worst-reward gain, by example")
    before, after = (
        np.array([[float(cell.split("→")[n]) for cell in row[1:]] for row in rows])[None] for n in (0, 1)
    )  # fmt: skip
    names, blank = ("prompt", "identity"), ("",) * len(rows)
    base, tuned = (Scores(v, names, names, tuple(r[0] for r in rows), blank, blank, blank) for v in (before, after))
    deviations, changes = before[0].std(axis=0), (after - before)[0].mean(axis=0)
    gains = changes / deviations
    assert worst_gain(base, tuned) == pytest.approx(gains.min())
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-").replace("\n", " ")
    for told in (
        f"{changes[0]:+.2f} in prompt, {changes[1]:+.2f} in identity", f"{deviations[0]:.2f} in prompt",
        f"{deviations[1]:.3f} in identity", f"{gains[0]:+.2f}    and {gains[1]:+.2f}.",
        f"is the smaller one: {gains.min():.2f}.", f"The sum of the rewards rose by {changes.sum():.2f}",
    ):  # fmt: skip
        assert told in page


def test_the_example_of_a_comparison_is_computed() -> None:
    rows = rows_of("docs/compare.md", "**By example.**")
    told = torch.tensor([[float(cell) for cell in row[1:]] for row in rows])
    gains = told[:, None, :2]
    torch.testing.assert_close(analysis._worst(gains), told[:, 2])
    for point, beyond in zip(gains, told[:, 3], strict=True):
        found = analysis._across(torch.stack([*gains[:2], point, gains[0]]))
        torch.testing.assert_close(found, beyond, rtol=0, atol=5e-3)


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
