"""FLUX in its original naming and in diffusers': one table for full weights, adapters and exports."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.policies.lora import read_safetensors

Table = Mapping[str, tuple[str, ...]]
"""Original linear layer to the diffusers layers that it holds, stacked along the output."""

_ATTENTION: Table = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
}
_FLUX1_DOUBLE: Table = {
    **_ATTENTION,
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_FLUX1_SINGLE: Table = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_FLUX2_DOUBLE: Table = {
    **_ATTENTION,
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
_FLUX2_SINGLE: Table = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}

FLUX1: Mapping[str, Table] = {"double_blocks": _FLUX1_DOUBLE, "single_blocks": _FLUX1_SINGLE}
FLUX2: Mapping[str, Table] = {"double_blocks": _FLUX2_DOUBLE, "single_blocks": _FLUX2_SINGLE}
BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
"""Original stack of blocks to diffusers'."""

_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_BLOCK = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.(.+)\.(weight|bias|scale)")


def convert_transformer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FLUX.1's transformer from the original naming to diffusers'.

    Raises:
        UserError: if a key is not FLUX.1's.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        names = _names(key)
        if not names:
            raise UserError(f"'{key}' is no tensor of FLUX.1 in its original naming; give the file of that model.")
        if key.startswith("final_layer.adaLN"):
            shift, scale = tensor.chunk(2)  # diffusers keeps them the other way round
            parts = [torch.cat([scale, shift])]
        elif len(names) == 1:
            parts = [tensor]
        else:
            width = len(state["img_in.weight"])
            rest = len(tensor) - 3 * width
            parts = list(tensor.split([width] * 3 + [rest] * (len(names) - 3)))
        converted |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
    return converted


def _names(key: str) -> list[str]:
    """diffusers' tensors that an original tensor holds; none if the key is unknown."""
    module, _, kind = key.rpartition(".")
    if module in _OUTSIDE:
        return [f"{_OUTSIDE[module]}.{kind}"]
    match = _BLOCK.fullmatch(key)
    if not match:
        return []
    stack, index, layer, kind = match.groups()
    if kind == "scale":
        return [f"{BLOCKS[stack]}.{index}.{_NORMS[layer]}.weight"] if layer in _NORMS else []
    return [f"{BLOCKS[stack]}.{index}.{name}.{kind}" for name in FLUX1[stack].get(layer, ())]


def load_transformer(file: str | Path, axes_dims_rope: tuple[int, ...] = (16, 56, 56)) -> Any:
    """A diffusers `FluxTransformer2DModel` from an original file such as flux1-dev.safetensors.

    Args:
        file: safetensors; a prefix "model.diffusion_model." is understood.
        axes_dims_rope: which the file does not hold; the default is every released model's.

    Raises:
        UserError: if the file is not FLUX.1, or tensors are missing.
    """
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    tensors, _ = read_safetensors(Path(file).expanduser())
    original = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in tensors.items()}
    state = convert_transformer(original)
    try:
        head = len(original["double_blocks.0.img_attn.norm.query_norm.scale"])
        config = {
            "in_channels": original["img_in.weight"].shape[1],
            "out_channels": len(original["final_layer.linear.weight"]),
            "num_layers": count_blocks(original, "double_blocks"),
            "num_single_layers": count_blocks(original, "single_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": len(original["img_in.weight"]) // head,
            "joint_attention_dim": original["txt_in.weight"].shape[1],
            "pooled_projection_dim": original["vector_in.in_layer.weight"].shape[1],
            "guidance_embeds": "guidance_in.in_layer.weight" in original,
            "axes_dims_rope": axes_dims_rope,
        }
    except KeyError as error:
        raise UserError(f"'{file}' lacks {error}, which every FLUX.1 has; give the file of the whole model.") from None
    with init_empty_weights():
        model = FluxTransformer2DModel(**config)
    missing = sorted(model.state_dict().keys() - state.keys())
    if missing:
        raise UserError(f"'{file}' lacks {len(missing)} tensors of FLUX.1, such as {missing[0]}; is it complete?")
    model.load_state_dict(state, assign=True)
    return model


def count_blocks(state: Mapping[str, Tensor], stack: str) -> int:
    """Blocks of a stack that keys like `{stack}.{i}. ...` name."""
    return 1 + max((int(key.split(".")[1]) for key in state if key.startswith(stack + ".")), default=-1)
