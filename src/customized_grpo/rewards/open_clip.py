"""CLIP checkpoints in open_clip's layout, read as a transformers `CLIPModel`, and how open_clip cleans prompts."""

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ftfy
import torch
from torch import Tensor

from customized_grpo.errors import UserError

RENAMED = (
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
TRANSPOSED = ("visual.proj", "text_projection")


def is_checkpoint(path: str | Path) -> bool:
    """Whether the path is a file that `read_clip` reads."""
    return Path(path).is_file() and Path(path).suffix in (".pt", ".pth", ".bin", ".safetensors")


def clean_prompt(prompt: str) -> str:
    """A prompt as open_clip cleans it before it makes tokens: straight quotes, no ligatures, HTML entities resolved.

    Source: open_clip, tokenizer.py, `basic_clean`, `whitespace_clean`. The tokenizers of transformers leave this out.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


def read_clip(path: str | Path) -> Any:
    """The `CLIPModel` that an open_clip checkpoint holds (.safetensors, or .pt without code in it).

    Raises:
        UserError: if the file is of another layout.
    """
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    return clip_from_open_clip({name.removeprefix("module."): tensor.float() for name, tensor in state.items()})


def clip_from_open_clip(
    state: Mapping[str, Tensor],
    *,
    vision_head_width: int | None = None,
    text_head_width: int = 64,
    activation: str = "gelu",
) -> Any:
    """A `CLIPModel` with the weights of an open_clip ViT; its sizes are read off the tensors.

    Args:
        state: names of open_clip to tensors.
        vision_head_width: channels of an attention head; None is 80 for ViT-H, 104 for ViT-bigG, else 64.
        text_head_width: the same of the text tower.
        activation: "gelu", or "quick_gelu" for OpenAI's own weights.

    Raises:
        UserError: if a tensor is missing or left over.
    """
    from transformers import CLIPConfig, CLIPModel

    missing = [name for name in ("visual.conv1.weight", "visual.proj", "text_projection") if name not in state]
    if missing:
        raise UserError(f"The checkpoint has no '{missing[0]}', so it is not a CLIP ViT in open_clip's layout.")
    width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    words, text_width = state["token_embedding.weight"].shape
    config = CLIPConfig(
        projection_dim=state["text_projection"].shape[1],
        vision_config={
            **_tower(state, "visual.transformer.", width, vision_head_width or {1280: 80, 1664: 104}.get(width, 64)),
            "patch_size": patch, "image_size": grid * patch, "hidden_act": activation,
        },
        text_config={
            **_tower(state, "transformer.", text_width, text_head_width),
            "vocab_size": words, "max_position_embeddings": len(state["positional_embedding"]),
            "hidden_act": activation, "eos_token_id": 2,  # transformers' way to say: pool at the largest token id
        },
    )  # fmt: skip
    model = CLIPModel(config)
    missing, left_over = model.load_state_dict(_renamed(state), strict=False)
    missing = [name for name in missing if not name.endswith("position_ids")]
    if missing or left_over:
        what, name = ("lacks", missing[0]) if missing else ("has an unknown", left_over[0])
        raise UserError(f"The open_clip checkpoint {what} '{name}'; is it a CLIP ViT with its text tower?")
    return model


def _tower(state: Mapping[str, Tensor], prefix: str, width: int, head_width: int) -> dict[str, int]:
    fully_connected = [name for name in state if name.startswith(prefix) and name.endswith("mlp.c_fc.weight")]
    return {
        "hidden_size": width,
        "num_attention_heads": max(1, width // head_width),
        "num_hidden_layers": len(fully_connected),
        "intermediate_size": len(state[fully_connected[0]]) if fully_connected else 4 * width,
    }


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for old, tensor in state.items():
        if old == "attn_mask":  # a buffer of old versions
            continue
        name = old
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        if match := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name):
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{match[1]}.self_attn.{part}_proj.{match[2]}"] = piece
        else:
            renamed[name] = tensor.T.contiguous() if old in TRANSPOSED else tensor
    return renamed
