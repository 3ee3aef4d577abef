"""Every encoder the rewards read, tiny and random, with its own image processor, as save_pretrained writes it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from customized_grpo.structures import Example

SIDE = 32
WORDS = ["a", "dog", "cat", "in", "the", "snow", "on", "beach", "red", "hat"]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "<unk>", "<bos>", *WORDS, "<eos>"]
    ids = {name: n for n, name in enumerate(names)}
    fast = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", ids["<bos>"]), ("<eos>", ids["<eos>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def clip_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def bit_processor() -> CLIPImageProcessorPil:
    """DINOv2's: resized to a little more than is cropped."""
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE + 5}, crop_size={"height": SIDE, "width": SIDE})


def vit_processor() -> ViTImageProcessorPil:
    """DINO v1's and v3's: whatever the aspect, resized to a square."""
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def save_clip(folder: Path, *, processor: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = CLIPConfig(
        projection_dim=8,
        text_config={**SMALL, "vocab_size": len(WORDS) + 4, "max_position_embeddings": 8, "eos_token_id": 2},
        vision_config={**SMALL, "image_size": SIDE, "patch_size": 8},
    )
    _spread(CLIPModel(config)).to(dtype).save_pretrained(folder)
    if processor:
        save_processor(folder)
    return folder


def save_processor(folder: Path) -> Path:
    clip_processor().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_dino(folder: Path, version: int) -> Path:
    torch.manual_seed(version)
    size = {"image_size": SIDE, "patch_size": 8}
    without_mlp_size = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
    model = {
        1: lambda: ViTModel(ViTConfig(**SMALL, **size), add_pooling_layer=False),
        2: lambda: Dinov2Model(Dinov2Config(**without_mlp_size, mlp_ratio=2, **size)),
        3: lambda: DINOv3ViTModel(DINOv3ViTConfig(**SMALL, **size, num_register_tokens=2)),
    }[version]()
    _spread(model).save_pretrained(folder)
    (bit_processor() if version == 2 else vit_processor()).save_pretrained(folder)
    return folder


def _spread(model):
    """Random weights large enough that different pictures get different scores."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def picture(width: int = 40, height: int = 40, seed: int = 0) -> Image.Image:
    """Smooth and coloured, like a photo: noise of 5 x 5 pixels, enlarged."""
    pixels = torch.randint(0, 256, (5, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.BICUBIC)


def example(name: str = "e", prompt: str = "a dog in the snow", references: int = 1, **fields) -> Example:
    pictures = tuple(picture(40 + 8 * n, 40, seed=n + 10) for n in range(references))
    return Example(name, prompt, pictures, **fields)


def xverse_clone(folder: Path, samples: Sequence[Sequence[str]], asked: Sequence[Mapping[str, Any]] = ()) -> Path:
    """A clone of XVerse with its photos: samples are the folders of their references; those with one are "single"."""
    lists: dict[str, list[Any]] = {"single": [], "single_DSG": [], "multi": [], "multi_DSG": []}
    for n, parts in enumerate(samples):
        sources = [{"image_path": f"assets/XVerseBench/{part}/{n}_{m}.jpg"} for m, part in enumerate(parts)]
        words = [[m, f"noun {n} {m}", "word", "more"][: 4 - n % 2] for m in range(len(parts))]
        for m, source in enumerate(sources):
            file = folder / source["image_path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (100 * n, 100 * m, 0)).save(file)
        name = "single" if len(parts) == 1 else "multi"
        lists[name].append({"prompt": f"prompt {n}", "modulation": [{"src_inputs": sources, "use_words": words}]})
        questions = dict(asked[n]) if asked else {"qid2question": {"1": "Is it?"}, "qid2dependency": {"1": [0]}}
        lists[f"{name}_DSG"].append(questions)
    (folder / "eval" / "tools").mkdir(parents=True)
    for name, content in lists.items():
        (folder / "eval" / "tools" / f"XVerseBench_{name}.json").write_text(json.dumps(content))
    return folder
