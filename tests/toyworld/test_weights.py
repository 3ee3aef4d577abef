from pathlib import Path

import numpy as np
import pytest
import torch

import customized_grpo.toyworld as toyworld
from customized_grpo.errors import UserError
from customized_grpo.toyworld import weights_path
from customized_grpo.toyworld.dataset import ToyWorld
from tools.pretrain import clip as clip_training
from tools.pretrain import corpus
from tools.pretrain import dino as dino_training
from tools.pretrain.report import generate

PACKAGED = Path(toyworld.__file__).parent / "weights"


def test_packaged_weights_stay_small() -> None:
    assert sum(f.stat().st_size for f in PACKAGED.rglob("*") if f.is_file()) <= 20_000_000


def test_unknown_component_and_missing_folder_are_explained(monkeypatch, tmp_path) -> None:
    with pytest.raises(UserError, match="'clpi'; expected one of pipeline, clip, dino, oracle"):
        weights_path("clpi")  # type: ignore[arg-type]
    monkeypatch.setenv(toyworld.WEIGHTS_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match="No toy-world weights"):
        weights_path("clip")
    (tmp_path / "clip").mkdir()
    assert weights_path("clip") == tmp_path / "clip"
    assert weights_path("clip_2") == PACKAGED / "clip_2"


def test_plain_pipeline_draws_at_its_own_size() -> None:
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(weights_path("pipeline"))
    images = generate(pipeline, ToyWorld("eval", 2)[:], steps=2)
    assert images.shape == (2, 3, 64, 64)
    assert 0 <= images.min() < images.max() <= 1
    tokens = pipeline.tokenizer(["A red STAR on the zeppelin"], padding="max_length", max_length=16)
    assert tokens.input_ids[0].count(pipeline.tokenizer.unk_token_id) == 1


@pytest.mark.parametrize("component", ["clip", "clip_2"])
def test_clip_and_its_processor_tell_a_changed_word(component) -> None:
    from transformers import CLIPModel, CLIPProcessor

    clip = CLIPModel.from_pretrained(weights_path(component)).eval()
    assert clip.dtype == torch.float32
    unseen = corpus.faithful(40, 4, seed=5, split="eval")
    assert min(v for k, v in clip_training.measure(clip, unseen).items() if k.startswith("swap")) > 0.9
    processor = CLIPProcessor.from_pretrained(weights_path(component))
    from PIL import Image

    picture = unseen.images[0, 1]
    batch = processor(text=["a star"], images=[Image.fromarray(picture.movedim(0, -1).numpy())], return_tensors="pt")
    assert np.allclose(batch.pixel_values[0], picture / 127.5 - 1, atol=1e-5)


@pytest.mark.parametrize("component", ["dino", "dino_2"])
def test_dino_finds_the_reference_of_an_unseen_subject(component) -> None:
    from transformers import AutoImageProcessor, Dinov2Model

    dino = Dinov2Model.from_pretrained(weights_path(component)).eval()
    assert AutoImageProcessor.from_pretrained(weights_path(component)).size["shortest_edge"] == 64
    measured = dino_training.measure(dino, corpus.faithful(100, 2, seed=5, split="eval"))
    assert measured["top-1 without recolouring"] > 0.85
