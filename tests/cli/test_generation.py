import warnings
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

import fakes
from customized_grpo.cli import generation
from customized_grpo.cli.generation import warn_of_toy_model
from customized_grpo.cli.main import evaluate
from customized_grpo.errors import UserError
from customized_grpo.settings import Spec
from customized_grpo.settings.parse import parse_config
from customized_grpo.structures import Example
from customized_grpo.toyworld.dataset import toy_reference
from customized_grpo.train.settings import TrainerConfig

TOY = Spec(use="FluxKontextPolicy", path="toyworld:pipeline")
PHOTO = Example("1", "A dog wearing a red hat", (Image.new("RGB", (8, 8)),))


def told(policy: Spec, example: Example) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_toy_model(policy, example)
    return [str(warning.message) for warning in caught]


def test_the_toy_model_is_asked_only_for_what_it_knows() -> None:
    words, photo = told(TOY, PHOTO)
    assert words.startswith("The embedded toy model does not know 'dog' and")
    assert "its words are a, at, ball," in words
    assert "turns a photo into blobs" in photo
    assert told(TOY, toy_reference(0)) == []
    assert told(Spec(use="FluxKontextPolicy", path="models/kontext"), PHOTO) == []


def test_an_evaluation_of_no_examples_is_refused() -> None:
    with pytest.raises(UserError, match=r"nothing to evaluate: evaluation.examples is 0"):
        evaluate(["evaluation.examples=0"])


def test_several_processes_do_not_do_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"`cgrpo eval` works in one process, but WORLD_SIZE is 2; run it without a"):
        evaluate()


def test_images_are_generated_as_they_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[object] = []

    class Guided(fakes.LinearPolicy):
        @contextmanager
        def sampled_with(self, **settings):
            used.append(settings)
            yield

    def sample(policy, conditioning, noise, *how):
        used.append(how)
        return torch.zeros(1, 3, 4, 4)

    monkeypatch.setattr(generation, "sample_ode", sample)
    tree = {"evaluation": {"num_inference_steps": 7, "solver": "heun", "true_cfg_scale": 4.0}}
    generation.generate(Guided(), PHOTO, lambda: 1, 1, 0, parse_config(tree, TrainerConfig))
    assert used == [{"guidance_scale": None, "true_cfg_scale": 4, "resolution": None}, (7, "heun"), (7, "heun")]
