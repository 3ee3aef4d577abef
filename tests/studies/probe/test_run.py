"""A probe in its folder: what it leaves, that a kill costs one step, and that steps of two probes never mix."""

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from customized_grpo.assemble import PolicySource
from customized_grpo.cli import main as cli
from customized_grpo.cli.probe import build_probe, new_probe, resume_probe
from customized_grpo.config import Config, load_config, open_config
from customized_grpo.errors import UserError
from customized_grpo.functional.time_weights import tabulated
from customized_grpo.settings import Spec
from customized_grpo.settings.build import bind
from customized_grpo.settings.parse import parse_config
from customized_grpo.studies.probe import ProbeFolder, run_probe, write_report
from customized_grpo.studies.probe.measure import ProbeSettings
from studies.probe import linear

CONFIG = """
policy: {use: "studies.probe.linear:DiagonalPolicy"}
rewards: {prompt: "studies.probe.linear:early", identity: "studies.probe.linear:late"}
data: {train: {use: "studies.probe.linear:Data", count: 6}}
rollout: {num_inference_steps: 5, dynamics: {use: dance_sde, noise_level: 0.5}}
"""
SMALL = {"examples": 4, "branches": 4}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    open_config(path, trust_code=True)
    return path


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than measuring these."""
    monkeypatch.setattr("customized_grpo.studies.probe.run.show", lambda folder, found, console: None)


def quiet() -> Console:
    return Console(quiet=True)


def linear_policy(policy: linear.DiagonalPolicy, init=linear.DiagonalPolicy.__init__) -> None:
    init(policy)


def numbers(folder: Path) -> dict[str, dict]:
    """All files of numbers, without what is a time."""
    files = [folder / "findings.json", *sorted((folder / "steps").iterdir())]
    read = {path.name: json.loads(path.read_text()) for path in files}
    return {name: {k: v for k, v in content.items() if k != "seconds"} for name, content in read.items()}


@pytest.mark.usefixtures("plotted")
def test_a_probe_leaves_everything_behind(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "probe"
    found = new_probe(quiet(), config, ["seed=3"], SMALL, output=folder)
    assert {path.name for path in folder.iterdir()} - {".lock"} == {  # which older filelock removes
        "probe.json", "config.yaml", "steps", "findings.json", "time_weights.json", "probe.html", "probe.md", "plots",
    }  # fmt: skip
    info = json.loads((folder / "probe.json").read_text())
    assert (info["status"], info["model"], info["settings"]["seed"]) == ("finished", "DiagonalPolicy", 3)
    assert [example["subject"] for example in info["examples"]] == sorted({e["subject"] for e in info["examples"]})
    assert len(list((folder / "steps").iterdir())) == 5
    assert {path.suffix for path in (folder / "plots").iterdir()} == {".svg", ".png"}
    saved = json.loads((folder / "findings.json").read_text())
    assert saved["answer"] == found.verdict.answer
    assert saved["shares"]["estimate"] == found.shares.estimate.tolist()


def test_the_page_says_the_verdict_and_needs_no_network(config: Path, tmp_path: Path) -> None:
    found = new_probe(quiet(), config, [], SMALL, output=tmp_path / "probe")
    html = (tmp_path / "probe" / "probe.html").read_text()
    assert found.verdict.answer == "supports"
    assert "<h1>The probe supports “prompt is decided early, identity late”.</h1>" in html
    assert "Only 4 subjects" in html
    assert html.count("<figure>") == 6
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html


def test_the_terminal_shows_the_table_and_the_verdict(config: Path, tmp_path: Path, capsys) -> None:
    found = new_probe(Console(width=200), config, [], SMALL, output=tmp_path / "probe")
    shown = capsys.readouterr().out
    assert "steps: 5 of 5" in shown
    assert f"The probe {found.verdict.answer} “prompt is decided early, identity late”." in shown
    assert "What each step decides" in shown
    assert "time_weights.json" in shown


@pytest.mark.usefixtures("no_page")
def test_equal_seeds_give_equal_numbers_and_other_seeds_do_not(config: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        new_probe(quiet(), config, [f"seed={seed}"], SMALL, output=tmp_path / name)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert numbers(tmp_path / "a") != numbers(tmp_path / "c")


@pytest.mark.usefixtures("no_page")
def test_a_killed_probe_goes_on_and_ends_the_same(config: Path, tmp_path: Path, monkeypatch) -> None:
    new_probe(quiet(), config, [], SMALL, output=tmp_path / "straight")
    measure, measured = linear.Probe.measure, []

    def killed_in_the_third(self, steps):
        measured.append(steps)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(self, steps)

    monkeypatch.setattr(linear.Probe, "measure", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        new_probe(quiet(), config, [], SMALL, output=tmp_path / "halves")
    with pytest.raises(UserError, match=r"not finished, 3 of 5 measurements are missing.*--resume"):
        write_report(tmp_path / "halves")
    resume_probe(quiet(), tmp_path / "halves")
    assert measured == [(0,), (1,), (2,), (2,), (3,), (0, 1, 2, 3)]
    assert numbers(tmp_path / "halves") == numbers(tmp_path / "straight")


@pytest.mark.usefixtures("no_page")
def test_steps_of_another_policy_or_setting_are_not_mixed_in(tmp_path: Path) -> None:
    folder = ProbeFolder.create(tmp_path / "probe")
    run_probe(linear.probe((-2.0, 2.0)), folder)
    for other, what in (
        (linear.probe((-1.0, 2.0)), "weights"),
        (linear.probe((-2.0, 2.0), branches=5), "settings.branches"),
        (linear.probe((-2.0, 2.0), subjects=3), "examples"),
        (linear.probe((-2.0, 2.0), rewards={"a": linear.early, "b": linear.late}), "rewards"),
    ):
        with pytest.raises(UserError, match=f"holds a probe with other {what} than this one"):
            run_probe(other, folder)
    run_probe(linear.probe((-2.0, 2.0), batch=3), folder)


@pytest.mark.usefixtures("no_page")
def test_a_probe_that_ran_out_of_memory_goes_on_with_less(config: Path, tmp_path: Path, monkeypatch) -> None:
    folder, measure, batches = tmp_path / "probe", linear.Probe.measure, []

    def too_large(self, steps):
        batches.append(self.settings.batch)
        if self.settings.batch > 8:
            raise torch.OutOfMemoryError("the memory of a test")
        return measure(self, steps)

    monkeypatch.setattr(linear.Probe, "measure", too_large)
    monkeypatch.setattr(linear.DiagonalPolicy, "RUNTIME", ("offload",), raising=False)
    monkeypatch.setattr(linear.DiagonalPolicy, "__init__", lambda self, offload="": linear_policy(self))
    with pytest.raises(torch.OutOfMemoryError):
        new_probe(quiet(), config, [], {**SMALL, "batch": 16}, output=folder)
    with pytest.raises(torch.OutOfMemoryError):
        resume_probe(quiet(), folder)
    assert batches == [16, 16]
    for override in ("rollout.num_inference_steps=6", "rewards.prompt.use=studies.probe.linear:late"):
        with pytest.raises(UserError, match=f"has another {override.split('=')[0]}, which changes the result"):
            resume_probe(quiet(), folder, [override], 8)
    resume_probe(quiet(), folder, ["policy.offload=cpu"], 8, trust_code=True)
    assert load_config(folder / "config.yaml").policy.arguments == {"offload": "cpu"}
    assert json.loads((folder / "probe.json").read_text())["batch"] == 8
    new_probe(quiet(), config, [], {**SMALL, "batch": 8}, output=tmp_path / "straight")
    assert numbers(folder) == numbers(tmp_path / "straight")


@pytest.mark.usefixtures("no_page")
def test_probing_changes_no_weight(tmp_path: Path) -> None:
    probe = linear.probe((-2.0, 2.0))
    before = {name: tensor.clone() for name, tensor in probe.policy.trainable_state().items()}
    run_probe(probe, ProbeFolder.create(tmp_path / "probe"))
    assert all(torch.equal(before[name], tensor) for name, tensor in probe.policy.trainable_state().items())


def test_without_gradients_there_is_no_cosine(tmp_path: Path) -> None:
    found = run_probe(linear.probe((-2.0, 2.0), gradients=False), ProbeFolder.create(tmp_path / "probe"))
    assert found.cosine is None
    assert (tmp_path / "probe" / "probe.html").read_text().count("<figure>") == 5


def test_three_rewards_are_probed_too(tmp_path: Path) -> None:
    rewards = {"a": linear.early, "b": linear.late, "c": lambda images, examples: images[:, 2].mean((1, 2))}
    found = run_probe(linear.probe((-2.0, 2.0), rewards=rewards), ProbeFolder.create(tmp_path / "probe"))
    assert found.weights.estimate.shape == (4, 3)


# ---- the fitted weights


@pytest.mark.usefixtures("no_page")
def test_training_takes_the_fitted_weights(config: Path, tmp_path: Path) -> None:
    found = new_probe(quiet(), config, [], SMALL, output=tmp_path / "probe")
    path = tmp_path / "probe" / "time_weights.json"
    progress = torch.tensor([0.0, 0.3, 0.6, 0.9], dtype=torch.float64)
    trained = parse_config({"method": {"time_weights": {"use": "from_file", "path": str(path)}}}, Config)
    weights = bind(trained.method.time_weights, "time_weights")(progress)
    rows = found.weights.estimate.tolist()
    torch.testing.assert_close(weights, tabulated(progress, grid=found.progress, weights=rows))
    content = json.loads(path.read_text())
    assert content["rewards"] == ["prompt", "identity"]
    assert content["provenance"]["examples"] == 4


def test_an_unknown_time_weight_is_named_with_its_nearest() -> None:
    with pytest.raises(UserError, match=r"there is no 'form_file'.*Did you mean 'from_file'"):
        bind(Spec(use="form_file"), "time_weights")
    with pytest.raises(UserError, match="takes no setting 'pfad'"):
        bind(Spec(use="from_file", pfad="x"), "time_weights")


# ---- bad input


def test_a_folder_in_use_is_left_alone(config: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something already; name another output"):
        new_probe(quiet(), config, [], SMALL, output=tmp_path / "full")
    with pytest.raises(UserError, match="is a file"):
        new_probe(quiet(), config, [], SMALL, output=config)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(
    ("settings", "overrides", "match"),
    [
        ({"branches": 1}, [], "'branches' is 1: expected 2 or more"),
        ({"examples": 1}, [], "'examples' is 1: expected 2 or more"),
        ({}, ["rewards={prompt: {use: 'studies.probe.linear:early'}}"], "compares rewards, but there is only 'prompt'"),
        ({}, ["data.train.count=1"], "two examples or more, but the training data has 1"),
        ({}, ["rollout.dynamics.noise_level=0"], "has no noise"),
        ({}, ["rewards.identity.use=fakes:constant"], "The reward 'identity' is the same on all branches"),
    ],
)
def test_bad_input_is_one_sentence(config: Path, tmp_path: Path, settings: dict, overrides: list, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        new_probe(quiet(), config, overrides, {**SMALL, **settings}, output=tmp_path / "probe")
    assert "\n" not in str(error.value)


def test_a_configuration_without_dynamics_is_probed_with_those_of_grpo(config: Path) -> None:
    nft = load_config(config, ["objective=nft", "rollout.dynamics=null"])
    probe = build_probe(PolicySource(nft), parse_config(SMALL, ProbeSettings))
    assert probe.dynamics.keywords == {"noise_level": 0.7}


def test_what_is_no_probe_is_named(config: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'nowhere' is not a probe folder: it does not exist"):
        resume_probe(quiet(), Path("nowhere"))
    with pytest.raises(UserError, match=r"it has no probe\.json"):
        resume_probe(quiet(), tmp_path)
    with pytest.raises(UserError, match="There is no configuration file"):
        new_probe(quiet(), tmp_path / "none.yaml", [], SMALL)
    with pytest.raises(UserError, match="Got both --run and a configuration file"):
        new_probe(quiet(), config, [], SMALL, run=tmp_path)
    with pytest.raises(UserError, match="--checkpoint names a checkpoint of a run"):
        new_probe(quiet(), config, [], SMALL, iteration=3)


@pytest.mark.usefixtures("no_page")
def test_a_damaged_step_is_measured_again(config: Path, tmp_path: Path) -> None:
    new_probe(quiet(), config, [], SMALL, output=tmp_path / "probe")
    whole = numbers(tmp_path / "probe")
    for damage in ('{"steps": [2], "rew', '{"steps": [2]}', "[]", ""):
        (tmp_path / "probe" / "steps" / "step-002.json").write_text(damage)
        with pytest.raises(UserError, match="not finished, 1 of 5 measurements are missing"):
            write_report(tmp_path / "probe")
        resume_probe(quiet(), tmp_path / "probe")
        assert numbers(tmp_path / "probe") == whole


# ---- the command line


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["cgrpo", *map(str, words)])
    monkeypatch.setattr(cli, "quiet_libraries", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_the_command_probes_reports_and_refuses(config: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "probe"
    words = ("--examples", 3, "--branches", 3, "--no-gradients", "--output", folder)
    assert command(monkeypatch, "probe", config, "seed=2", *words) == 0
    (folder / "probe.html").unlink()
    assert command(monkeypatch, "report", folder) == 0
    assert (folder / "probe.html").is_file()
    assert load_config(folder / "config.yaml").seed == 2
    assert command(monkeypatch, "probe", "--resume", folder) == 0
    capsys.readouterr()
    for refused, why in (
        (("probe", "--resume", folder, "--branches", 3), "reads everything but --batch and overrides from the folder"),
        (("probe", config, "--output", folder), "holds something already"),
        (("probe", config, "--branches", 1, "--output", tmp_path / "new"), "'branches' is 1"),
    ):
        assert command(monkeypatch, *refused) == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
