"""Save components as float16, with class names that all supported versions of diffusers and transformers load."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from customized_grpo.toyworld.oracle import WEIGHTS_FILE, Oracle
from tools.pretrain import generator, tokenizers
from tools.pretrain.clip import MEAN, STD
from tools.pretrain.models import Autoencoder, Clip, Dino


def save_clip(clip: Clip, folder: Path) -> None:
    """Save model, tokenizer and image processor for `CLIPModel` and `CLIPProcessor`."""
    size = clip.config.vision_config.image_size
    save_half(clip, folder)
    tokenizers.build(begin=True, size=size).save_pretrained(folder)
    _save_image_processor(folder, "CLIPImageProcessor", size)
    _make_portable(folder)


def save_dino(dino: Dino, folder: Path) -> None:
    """Save model and image processor for `Dinov2Model` and `AutoImageProcessor`."""
    save_half(dino, folder)
    _save_image_processor(folder, "BitImageProcessor", dino.config.image_size)


def save_oracle(oracle: Oracle, folder: Path) -> None:
    """Save the weights for `Oracle.load`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half() if value.is_floating_point() else value for name, value in oracle.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"size": str(oracle.size), "least": str(oracle.least)})


def save_pipeline(folder: Path, model: generator.Generator, autoencoder: Autoencoder) -> None:
    """Save a diffusers folder for `FluxKontextPipeline.from_pretrained`."""
    from diffusers import FluxKontextPipeline

    size = autoencoder.config.sample_size
    pipeline: Any = FluxKontextPipeline(
        scheduler=generator.build_scheduler(),
        vae=autoencoder,
        text_encoder=model.text_encoder,
        tokenizer=tokenizers.build(begin=True, size=size),
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizers.build(begin=False, size=size),
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
    """Save float16 weights that are loaded as float32. The module is not changed."""
    half = copy.deepcopy(module).half().to(memory_format=torch.contiguous_format)
    half.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8").replace('"float16"', '"float32"'))
    config.pop("_name_or_path", None)  # a local path
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save_image_processor(folder: Path, kind: str, side: int) -> None:
    config = {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _make_portable(folder: Path) -> None:
    """Replace the tokenizer class of transformers 5 by the one that version 4 has too."""
    for path in (*folder.rglob("tokenizer_config.json"), *folder.glob("model_index.json")):
        text = path.read_text(encoding="utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
        path.write_text(text, encoding="utf-8")
