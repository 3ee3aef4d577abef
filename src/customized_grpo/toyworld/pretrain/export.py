"""Saving components so that any recent diffusers and transformers loads them: float16, portable class names."""

import copy
import json
from pathlib import Path
from typing import Any

from customized_grpo.toyworld.pretrain import generator, tokenizers
from customized_grpo.toyworld.pretrain.clip import MEAN, STD
from customized_grpo.toyworld.pretrain.models import Autoencoder, Clip, ClipText, Dino

SIDE = 64


def save_clip(clip: Clip, folder: Path) -> None:
    """Model, tokenizer and image processor: `CLIPModel` and `CLIPProcessor` load them."""
    save_half(clip, folder)
    tokenizers.build(begin=True).save_pretrained(folder)
    _save_image_processor(folder, "CLIPImageProcessor")
    _make_portable(folder)


def save_dino(dino: Dino, folder: Path) -> None:
    """Model and image processor: `Dinov2Model` and `AutoImageProcessor` load them."""
    save_half(dino, folder)
    _save_image_processor(folder, "BitImageProcessor")


def save_pipeline(folder: Path, model: generator.Generator, autoencoder: Autoencoder, text_encoder: ClipText) -> None:
    """A plain diffusers folder: `FluxKontextPipeline.from_pretrained(folder)`."""
    from diffusers import FluxKontextPipeline

    pipeline: Any = FluxKontextPipeline(
        scheduler=generator.build_scheduler(),
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizers.build(begin=True),
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizers.build(begin=False),
        transformer=model.transformer,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        save_half(getattr(pipeline, name), folder / name)
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        getattr(pipeline, name).save_pretrained(folder / name)
    pipeline.save_config(folder)
    _make_portable(folder)


def save_half(module: Any, folder: Path) -> None:
    """Save float16 weights, to be loaded as float32, and leave the module as it was."""
    half = copy.deepcopy(module).half()
    half.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8").replace('"float16"', '"float32"'))
    config.pop("_name_or_path", None)  # where this machine had it
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save_image_processor(folder: Path, kind: str) -> None:
    config = {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIDE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _make_portable(folder: Path) -> None:
    """Name the tokenizer class as every release of transformers knows it."""
    for path in (*folder.rglob("tokenizer_config.json"), *folder.glob("model_index.json")):
        text = path.read_text(encoding="utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
        path.write_text(text, encoding="utf-8")
