import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import fakes
from customized_grpo.assemble import build_rewards
from customized_grpo.randomness import generator, normal, seed_global
from customized_grpo.settings import Spec
from customized_grpo.settings.parse import parse_config
from customized_grpo.store.run import RunFolder
from customized_grpo.structures import Example
from customized_grpo.train.settings import TrainerConfig
from customized_grpo.train.trainer import Trainer


def test_a_draw_depends_on_its_key_alone() -> None:
    first = normal((3, 2), [("a", 1), ("a", 2)])
    torch.randn(5)
    again = normal((3, 2), [("a", 2), ("a", 1)]).flip(0)
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])


def test_numbers_and_words_are_different_keys() -> None:
    assert generator(1).initial_seed() != generator("1").initial_seed()


def test_noise_is_standard_normal() -> None:
    noise = normal((200,), [(i,) for i in range(200)])
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02


def test_seeds_are_the_same_on_every_machine() -> None:
    assert generator("initial", 0, 1, 2).initial_seed() == 1228814356355128988


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


def test_the_global_generators_are_seeded_by_a_key() -> None:
    seed_global("a", 1)
    first = draws()
    seed_global("a", 2)
    second = draws()
    seed_global("a", 1)
    assert draws() == first
    assert all(one != other for one, other in zip(first, second, strict=True))


class Moody:
    """A reward and a metric that draw from all three global generators: a part of its own, and a part in each call."""

    def __init__(self, mood: float = 0.1) -> None:
        self.offset, self.mood = sum(draws()), mood

    def __call__(self, images: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        noise = torch.rand(len(images)) + torch.tensor(np.random.rand(len(images))) + random.random()  # noqa: NPY002
        return images[:, 0].mean((1, 2)) + self.mood * (self.offset + noise.float())


def train(folder: Path, mood: float = 0.1, iterations: int = 4, resume: bool = False):
    """Metrics without times, evaluations and weights of a small run that starts from any state of the generators."""
    torch.seed(), np.random.seed(), random.seed()  # noqa: NPY002
    settings = {
        "output": str(folder), "tracking": {"log_with": []}, "checkpoint": {"every": 1},
        "rollout": {"num_generations": 4, "num_inference_steps": 5},
        "training": {"iterations": iterations, "prompts_per_iteration": 2},
        "evaluation": {"examples": 3, "replicates": 1, "every": 2, "batch": 2},
    }  # fmt: skip
    spec = Spec(use="test_randomness:Moody", mood=mood)
    rewards, policy = build_rewards({"prompt": spec, "identity": Spec(use="fakes:dark")}), fakes.LinearPolicy()
    made = Trainer(policy, rewards, fakes.examples(), fakes.examples(3), parse_config(settings, TrainerConfig))
    run = RunFolder(made.train(resume=RunFolder(folder) if resume else None).run)
    lines = [{k: v for k, v in r.items() if not k.startswith(("seconds/", "memory/"))} for r in run.records()]
    return lines, [path.read_text() for path in sorted(run.evaluations.iterdir())], policy.trainable_state()


def test_a_plug_in_that_draws_from_the_global_generators_gives_the_same_run_again(tmp_path: Path) -> None:
    lines, evaluations, weights = train(tmp_path / "one")
    assert len({line["reward/prompt/mean"] for line in lines}) == len(lines)
    train(tmp_path / "two", iterations=2)
    for again in (train(tmp_path / "three"), train(tmp_path / "two", resume=True)):
        assert again[:2] == (lines, evaluations)
        assert all(torch.equal(again[2][name], weights[name]) for name in weights)


def test_no_draw_of_ours_comes_from_the_global_generators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, _, weights = train(tmp_path / "drawn", mood=0.0)
    monkeypatch.setattr(Moody, "__call__", lambda self, images, examples: images[:, 0].mean((1, 2)))
    silent, _, same = train(tmp_path / "silent", mood=0.0)
    assert silent == lines
    assert all(torch.equal(same[name], weights[name]) for name in weights)
