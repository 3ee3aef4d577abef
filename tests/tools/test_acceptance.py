import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from customized_grpo.assemble import build_trainer
from customized_grpo.config import load_config
from customized_grpo.store.yaml_text import parse_yaml
from customized_grpo.toyworld import WEIGHTS_VARIABLE, weights_path
from store.tables import by_kind, ones
from tools.pretrain import acceptance
from tools.pretrain.acceptance import FILE, Line, accept, of_base, of_training

METRICS = ("prompt", "identity", "oracle_prompt", "oracle_right")


@pytest.fixture
def wanted() -> acceptance.Wanted:
    found = parse_yaml(FILE.read_text(encoding="utf-8"), str(FILE))
    found["tasks"]["per_kind"] = 1
    return found


def verdicts(lines) -> dict[str, str]:
    return {line.name: line.verdict for line in lines}


def test_a_line_passes_between_its_bounds() -> None:
    assert [Line("a", x, 0.3, 0.6).verdict for x in (0.29, 0.3, 0.6, 0.61)] == ["FAIL", "pass", "pass", "FAIL"]
    assert Line("a", math.nan, low=1).verdict == "unknown"
    assert Line("a", 5).verdict == "printed"
    assert str(Line("a", 5.0, low=1)).split() == ["pass", "a", "5.000", ">=", "1"]


def test_what_the_base_shows_is_counted_by_kind(wanted) -> None:
    right = ones(4, 10)
    scores = by_kind(0, METRICS, recontext=(0.5, 0.5, right, right), property=(0.5, 0.5, 0.9, 0))
    alike = replace(scores, values=np.concatenate([scores.values] * 2))
    found = verdicts(of_base(alike, wanted["base"]))
    assert found["base, all shown, recontext"] == "pass"
    assert found["base, all shown, property"] == "FAIL"
    assert found["base, conflict share"] == "unknown"  # no group has any spread
    lines = {line.name: line.found for line in of_base(alike, wanted["base"])}
    assert lines["base, fully right"] == pytest.approx(0.4 / 11 * 10)
    assert lines["base, groups of 2 with one fully right"] == pytest.approx(0.4 / 11 * 10)


def test_every_seed_has_to_gain_and_no_kind_to_lose(wanted) -> None:
    def scores(prompt: float, recontext: int, companion: int):
        columns = {"recontext": recontext, "companion": companion}
        return by_kind(
            0, METRICS, **{k: (np.full(20, prompt), 0.5 + prompt, 1, ones(n, 20)) for k, n in columns.items()}
        )

    base = scores(0.0, 4, 8)
    tuned = {"one": scores(0.1, 12, 9), "two": scores(0.05, 12, 5)}
    found = verdicts(of_training(base, tuned, wanted["training"]))
    assert found == {
        "gain in prompt, one": "pass",
        "gain in identity, one": "pass",
        "gain in prompt, two": "FAIL",
        "gain in identity, two": "pass",
        "gain in fully right, points": "pass",
        "recontext, upper bound of the change, points": "pass",
        "recontext, lowest of any run, points": "pass",
        "companion, upper bound of the change, points": "pass",
        "companion, lowest of any run, points": "FAIL",
    }
    worse = verdicts(of_training(base, {"one": scores(0.1, 12, 0)}, wanted["training"]))
    assert worse["companion, upper bound of the change, points"] == "FAIL"


def test_the_embedded_model_and_a_run_of_it_are_measured(tmp_path: Path, wanted, monkeypatch) -> None:
    monkeypatch.setattr(acceptance, "GROUP", 2)
    monkeypatch.setenv(WEIGHTS_VARIABLE, "")  # is set by the program
    weights = tmp_path / "weights"
    shutil.copytree(weights_path("oracle").parent, weights)
    (weights / "figures.json").write_text('{"autoencoder": {"PSNR mean, dB": 33.9}, "clip": {"swap noun": 0.8}}')
    short = ["training.iterations=1", "training.prompts_per_iteration=2"]
    small = [*short, "rollout.num_generations=2", "evaluation.examples=0"]
    build_trainer(load_config(None, [f"output={tmp_path / 'run'}", *small])).train()
    lines = list(accept(weights, [tmp_path / "run"], wanted, pictures=4))
    found = verdicts(lines)
    assert (found["autoencoder, dB"], found["clip, swap noun"], found["clip, swap companion"]) == (
        "pass",
        "FAIL",
        "unknown",
    )
    assert (found["second encoders"], found["weights, MB"], found["minutes, run"]) == ("pass", "pass", "pass")
    assert {f"oracle, precision of {name}" for name in ("ears", "companion_colour")} < found.keys()
    assert "gain in prompt, run" in found
    assert all(line.verdict == "unknown" or math.isfinite(line.found) for line in lines)
