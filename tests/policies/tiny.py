"""Small pipelines with random weights, built from the real classes' own configurations. Seeds are explicit."""

import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from customized_grpo import policies
from customized_grpo.structures import Example

TEXT = 16
"""Width of every text encoder."""
MAX_TOKENS = 24


def tokenizer(max_tokens: int = MAX_TOKENS, *, begin: bool = False) -> Any:
    """One token per letter; <eos> has the largest id, where CLIP pools."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: n for n, word in enumerate(["<pad>", "<unk>", "<bos>", *string.ascii_lowercase, "<eos>"])}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    template = "<bos> $A <eos>" if begin else "$A <eos>"
    special = [(word, ids[word]) for word in ("<bos>", "<eos>")]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=max_tokens, **names)


def flux_parts(seed: int = 0, *, guidance: bool = True, transformer: nn.Module | None = None) -> dict[str, Any]:
    """Components of a FLUX.1 pipeline. The VAE halves twice less than the real one: a token is 4 x 4 pixels."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    size = len(tokenizer())
    clip = CLIPTextConfig(
        vocab_size=size, hidden_size=TEXT, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS, bos_token_id=2, eos_token_id=size - 1, pad_token_id=0, projection_dim=16,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=size, d_model=TEXT, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
        eos_token_id=size - 1, pad_token_id=0,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=16, scaling_factor=0.4,
        shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip
    if transformer is None:
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=TEXT, pooled_projection_dim=TEXT, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        loud(transformer)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=8, max_shift=1.3),
        "vae": vae,
        "text_encoder": CLIPTextModel(clip),
        "tokenizer": tokenizer(begin=True),
        "text_encoder_2": T5EncoderModel(t5),
        "tokenizer_2": tokenizer(),
        "transformer": transformer,
    }


def loud(transformer: nn.Module) -> None:
    """Larger weights, so that a mistake anywhere inside shows in the picture."""
    for parameter in transformer.parameters():
        parameter.data *= 1.7


def kontext_pipeline(seed: int = 0) -> Any:
    from diffusers import FluxKontextPipeline

    return quiet(FluxKontextPipeline(**flux_parts(seed)))


def flux_pipeline(seed: int = 0) -> Any:
    from diffusers import FluxPipeline

    return quiet(FluxPipeline(**flux_parts(seed)))


def uno_adapter(rank: int = 3, seed: int = 5) -> dict[str, torch.Tensor]:
    """An adapter in UNO's naming for the transformer of `flux_parts`."""
    draw = torch.Generator().manual_seed(seed)
    layers = {"double_blocks.0.processor.qkv_lora1": (32, 96), "double_blocks.0.processor.proj_lora1": (32, 32)}
    layers |= {name.replace("lora1", "lora2"): shape for name, shape in layers.items()}
    for n in range(2):
        layers[f"single_blocks.{n}.processor.qkv_lora"] = (32, 96)
        layers[f"single_blocks.{n}.processor.proj_lora"] = (160, 32)
    state: dict[str, torch.Tensor] = {}
    for name, (width, height) in layers.items():
        state[f"{name}.down.weight"] = torch.randn(rank, width, generator=draw) / width**0.5
        state[f"{name}.up.weight"] = torch.randn(height, rank, generator=draw)
    return state


def flux2_parts(seed: int = 0, **transformer: Any) -> dict[str, Any]:
    """What the pipelines of FLUX.2 share; the arguments are of the transformer."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    torch.manual_seed(seed)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=16, mid_block_add_attention=False,
    )  # fmt: skip
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.1, 1)
    small = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), **transformer,
    )  # fmt: skip
    loud(small)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return {"scheduler": scheduler, "vae": vae, "transformer": small}


def klein_pipeline(seed: int = 0, *, kind: str = "Flux2KleinPipeline", is_distilled: bool = False) -> Any:
    """28 layers of text encoder, because the pipeline reads the states after layers 9, 18 and 27."""
    import diffusers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    parts, letters = flux2_parts(seed, guidance_embeds=False), tokenizer()
    letters.chat_template = "{% for message in messages %}<bos>{{ message['content'] }}{% endfor %}"
    text = Qwen3Config(
        vocab_size=len(letters), hidden_size=8, intermediate_size=8, num_hidden_layers=28, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=len(letters) - 1,
    )  # fmt: skip
    encoder = Qwen3ForCausalLM(text)
    made = getattr(diffusers, kind)(**parts, text_encoder=encoder, tokenizer=letters, is_distilled=is_distilled)
    return quiet(made)


def kv_pipeline(seed: int = 0) -> Any:
    return klein_pipeline(seed, kind="Flux2KleinKVPipeline", is_distilled=True)


def dev_pipeline(seed: int = 0) -> Any:
    """The states are read after layers 10, 20 and 30. A tokenizer takes the place of PixtralProcessor, which asks it
    for the same and requires torchvision. Its template keeps five letters of the system message."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    parts, letters = flux2_parts(seed), tokenizer()
    letters.chat_template = (
        "{% for message in messages %}<bos>{{ message['content'][0]['text'][: 5 if loop.first else None] }}{% endfor %}"
    )
    config = Mistral3Config(
        text_config={
            "model_type": "mistral", "vocab_size": len(letters), "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 30, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8,
            "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": len(letters) - 1,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "image_size": 28, "patch_size": 14,
        },
    )  # fmt: skip
    encoder = Mistral3ForConditionalGeneration(config)
    return quiet(Flux2Pipeline(**parts, text_encoder=encoder, tokenizer=letters))


class PictureProcessor:
    """transformers' Qwen2VLProcessor without its video half, which cannot be imported without torchvision."""

    def __init__(self, letters: Any) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = letters
        self.pictures = Qwen2VLImageProcessorPil(patch_size=28, merge_size=2, min_pixels=56**2, max_pixels=56 * 112)

    def __call__(self, text: list[str], images: list[Image.Image], **kwargs: Any) -> Any:
        from transformers import BatchFeature

        seen = self.pictures(images, return_tensors="pt")
        counts = (seen["image_grid_thw"].prod(1) // 4).tolist()
        mark = "<|image_pad|>"
        filled = []
        for each in text:
            head, *tails = each.split(mark)
            filled.append(head + "".join(mark * n + tail for n, tail in zip(counts, tails, strict=True)))
        return BatchFeature({**self.tokenizer(filled, **kwargs), **seen})


def qwen_pipeline(seed: int = 0, *, zero_cond_t: bool = False) -> Any:
    """Qwen-Image-Edit-2509; with `zero_cond_t`, 2511, which sees references at noise level 0."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageEditPlusPipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    letters = tokenizer(2048)
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]
    letters.add_special_tokens({"additional_special_tokens": marks})
    image, video, start, end = letters.convert_tokens_to_ids(marks[:4])
    encoder = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(letters), "hidden_size": TEXT, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 2048, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
            "bos_token_id": 2, "eos_token_id": 0,
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT,
            "patch_size": 28, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [0],
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.8, 1.2, 1.0],
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, axes_dims_rope=(4, 6, 6), zero_cond_t=zero_cond_t,
    )  # fmt: skip
    loud(transformer)
    return quiet(
        QwenImageEditPlusPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_image_seq_len=8, max_image_seq_len=128, max_shift=0.9,
                shift_terminal=0.02,
            ),
            vae=vae, text_encoder=Qwen2_5_VLForConditionalGeneration(encoder), tokenizer=letters,
            processor=PictureProcessor(letters),
            transformer=transformer,
        )
    )  # fmt: skip


def quiet(pipeline: Any) -> Any:
    """Without progress bars, and without dropout, as from_pretrained gives it."""
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline


def picture(size: tuple[int, int] = (16, 16), seed: int = 0) -> Image.Image:
    noise = torch.randint(0, 256, (4, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy(), "RGB").resize(size, Image.Resampling.BICUBIC)


def example(name: str = "a", prompt: str = "a red hat", sizes: tuple[tuple[int, int], ...] = ((16, 16),)) -> Example:
    references = tuple(picture(size, seed=ord(name[0]) + n) for n, size in enumerate(sizes))
    return Example(id=name, prompt=prompt, references=references)


def disturb(policy: Any, seed: int = 1, scale: float = 0.3) -> None:
    """Give the trained weights values, as training would: an untrained adapter does nothing."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable_parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=draw) / parameter.shape[-1] ** 0.5


def noise(policy: Any, conditioning: Any, seed: int = 3) -> torch.Tensor:
    """Initial noise (B, N, C) for the examples of a conditioning."""
    shape = (len(conditioning["size"]), *policy.latent_shape(conditioning))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Family:
    """A policy class by name, how to build its pipeline, and settings and examples that suit the pipeline."""

    policy: str
    pipeline: Callable[[], Any]
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ((16, 16),)
    files: Callable[[Path], dict[str, str]] = lambda folder: {}
    """Writes what a configuration must name besides the pipeline, and gives those settings."""
    on_disk: bool = True
    """Whether the pipeline can be saved and loaded here."""

    @contextmanager
    def loadable(self) -> Iterator[None]:
        """Inside it the policy loads this pipeline also where it cannot be saved."""
        with pytest.MonkeyPatch.context() as patch:
            if not self.on_disk:
                patch.setattr(getattr(policies, self.policy), "load_pipeline", lambda *_, **__: self.pipeline())
            yield

    def examples(self) -> list[Example]:
        return [example("a", "a red hat", self.sizes), example("b", "on a beach", self.sizes)]


def write_uno_adapter(folder: Path) -> dict[str, str]:
    save_file(uno_adapter(), folder / "dit_lora.safetensors")
    return {"adapter": str(folder / "dit_lora.safetensors")}


FAMILIES = [
    Family("FluxKontextPolicy", kontext_pipeline),
    Family("UnoPolicy", flux_pipeline, {"reference_resolution": 16}, ((16, 16), (12, 8)), write_uno_adapter),
    Family("Flux2KleinPolicy", klein_pipeline, {"max_text_tokens": MAX_TOKENS}, ((16, 16), (12, 8))),
    Family(
        "QwenImageEditPolicy",
        qwen_pipeline,
        {"resolution": 16, "reference_resolution": 32},
        ((16, 16), (12, 24)),
        on_disk=False,
    ),
    Family("Flux2KleinKVPolicy", kv_pipeline, {"max_text_tokens": MAX_TOKENS}, ((16, 16), (12, 8))),
    Family("Flux2DevPolicy", dev_pipeline, {"max_text_tokens": MAX_TOKENS}, ((16, 16), (12, 8))),
]
