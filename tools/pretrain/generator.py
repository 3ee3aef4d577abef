"""The generator: a small FLUX Kontext, trained by flow matching on (reference, prompt, image)."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from customized_grpo.toyworld.draw import SIZE
from tools.pretrain import clip, tokenizers
from tools.pretrain.corpus import Corpus
from tools.pretrain.models import T5, Autoencoder, ClipText, Scheduler, Transformer

GRID = 8
"""Tokens along each side of an image: 16 latents, packed two by two."""
TOKENS = GRID * GRID
GUIDANCE = 3.5
TEXT_WIDTH = 96
APART = [9, 13, 41, 45]
"""Four tokens so far apart that the decoder does not mix them."""
CHANGED_WEIGHT = 6.0
"""How much more an error counts where the prompt asks for something small; on the subject a third of it."""


def build_transformer(pooled_width: int, latent_channels: int, size: int = SIZE) -> Transformer:
    """A transformer whose initial output is zero: modulations and output start at zero (adaLN-Zero of DiT)."""
    from diffusers import FluxTransformer2DModel

    from customized_grpo.toyworld.transformer import PictureTransformer

    transformer = (PictureTransformer if size > SIZE else FluxTransformer2DModel)(
        patch_size=1,
        in_channels=4 * latent_channels,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=pooled_width,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(
            ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear", "proj_out")
        ):
            if name.endswith(".proj_out"):
                continue  # the output of a single block, whose gate is zero
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def build_text_encoder_2(size: int) -> T5:
    from transformers import T5Config, T5EncoderModel

    tokenizer = tokenizers.build(begin=False, size=size)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=24,
        d_ff=192,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def build_text_encoder(size: int) -> ClipText:
    """The text tower of a CLIP, for its pooled output; untrained."""
    from transformers import CLIPTextModel

    return CLIPTextModel(clip.build(size).config.text_config)


def build_scheduler() -> Scheduler:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=TOKENS,
        max_image_seq_len=4 * TOKENS,
    )


def pack(latents: Tensor) -> Tensor:
    """(B, C, 16, 16) to tokens (B, 64, 4C)."""
    count, channels, height, width = latents.shape
    return (
        latents.view(count, channels, height // 2, 2, width // 2, 2)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(count, TOKENS, 4 * channels)
    )


def unpack(tokens: Tensor) -> Tensor:
    """The inverse of `pack`."""
    count, _, width = tokens.shape
    return (
        tokens.view(count, GRID, GRID, width // 4, 2, 2)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(count, width // 4, 2 * GRID, 2 * GRID)
    )


@torch.no_grad()
def encode(autoencoder: Autoencoder, images: Tensor, batch_size: int = 64) -> Tensor:
    """(N, 3, S, S) uint8 to standardized latent tokens (N, 64, 4C) float16."""
    shift, scale = autoencoder.config.shift_factor, autoencoder.config.scaling_factor
    chunks = []
    for chunk in images.split(batch_size):
        pixels = chunk.to(autoencoder.device).float() / 127.5 - 1
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.device.type != "cpu"):
            latents = autoencoder.encode(pixels).latent_dist.mode()
        chunks.append(pack((latents.float() - shift) * scale).half().cpu())
    return torch.cat(chunks)


@torch.no_grad()
def pixel_metric(autoencoder: Autoencoder, tokens: Tensor, step: float = 0.3) -> Tensor:
    """How much errors of a token show in the decoded pixels: (4C, 4C), of mean diagonal 1.

    A decoder turns some directions of its latents into colours and others into nothing that one sees. A tenth of the
    metric is the same for all directions, so that none is left to chance.

    Args:
        tokens: (N, 64, 4C) standardized latents, around which the decoder is linearized.
    """
    shift, scale = autoencoder.config.shift_factor, autoencoder.config.scaling_factor

    def decoded(latents: Tensor) -> Tensor:
        return autoencoder.decode(unpack(latents.to(autoencoder.device)) / scale + shift).sample.flatten()

    before, width = decoded(tokens), tokens.shape[-1]
    effects = []
    for direction in range(width):
        moved = tokens.clone()
        moved[:, APART, direction] += step
        effects.append((decoded(moved) - before).cpu())
    effect = torch.stack(effects)
    metric = effect @ effect.T
    return 0.9 * metric / metric.diagonal().mean() + 0.1 * torch.eye(width)


class Generator(nn.Module):
    """The three parts that are trained together: the transformer and its two text encoders."""

    def __init__(self, latent_channels: int, size: int) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(size)
        self.transformer = build_transformer(self.text_encoder.config.hidden_size, latent_channels, size)
        self.text_encoder_2 = build_text_encoder_2(size)
        grid = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).float()
        picture = torch.cat([torch.zeros(TOKENS, 1), grid], dim=1)
        reference = torch.cat([torch.ones(TOKENS, 1), grid], dim=1)
        self.image_ids: Tensor
        self.text_ids: Tensor
        self.register_buffer("image_ids", torch.cat([picture, reference]), persistent=False)
        self.register_buffer("text_ids", torch.zeros(tokenizers.MAX_TOKENS, 3), persistent=False)

    def forward(self, latents: Tensor, reference: Tensor, clip_ids: Tensor, text_ids: Tensor, sigma: Tensor) -> Tensor:
        """Velocity (B, 64, 4C) at noise level sigma (B,)."""
        return self.transformer(
            hidden_states=torch.cat([latents, reference], dim=1),
            encoder_hidden_states=self.text_encoder_2(text_ids)[0],
            pooled_projections=self.text_encoder(clip_ids).pooler_output,
            timestep=sigma,
            guidance=torch.full_like(sigma, GUIDANCE),
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0][:, :TOKENS]


@dataclass(frozen=True)
class Pairs:
    """Encoded training pairs."""

    latents: Tensor
    """(N, V, 64, 4C) float16; column 0 is the reference."""
    clip_ids: Tensor
    """(N, V, 16) for the CLIP text tower."""
    text_ids: Tensor
    """(N, V, 16) for the T5."""
    weights: Tensor
    """(N, V, 64) of the errors. They depend on the prompt and the pose alone, not on whether a pair is faithful."""
    metric: Tensor
    """(4C, 4C) of the errors within a token; see `pixel_metric`."""

    def save(self, path: Path) -> None:
        """Save atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vars(self), path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    @classmethod
    def load(cls, path: Path) -> "Pairs":
        return cls(**torch.load(path, weights_only=True, mmap=True))


@torch.no_grad()
def encode_pairs(corpus: Corpus, autoencoder: Autoencoder) -> Pairs:
    count, views = corpus.images.shape[:2]
    prompts = [p for row in corpus.prompts for p in row]
    clip_ids, text_ids = (
        clip.tokenize(tokenizers.build(begin=begin, size=corpus.size), prompts).view(count, views, -1)
        for begin in (True, False)
    )
    marked = torch.cat([F.adaptive_avg_pool2d(m / 255, GRID) for m in corpus.masks.flatten(0, 1).split(1000)])
    latents = encode(autoencoder, corpus.images.flatten(0, 1)).view(count, views, TOKENS, -1)
    return Pairs(
        latents=latents,
        clip_ids=clip_ids,
        text_ids=text_ids,
        weights=1 + CHANGED_WEIGHT * marked.view(count, views, TOKENS),
        metric=pixel_metric(autoencoder, latents[:12, 1].float()),
    )


def loss(model: Generator, pairs: Pairs, batch_size: int, generator: torch.Generator) -> Tensor:
    """Flow matching loss, weighted by what shows in pixels; logit-normal noise levels of location 0.5 and scale 1."""
    n = torch.randint(len(pairs.latents), (batch_size,), generator=generator)
    v = torch.randint(1, pairs.latents.shape[1], (batch_size,), generator=generator)
    device = model.image_ids.device
    picture, reference = pairs.latents[n, v].to(device).float(), pairs.latents[n, 0].to(device).float()
    noise = torch.randn(picture.shape, generator=generator).to(device)
    sigma = torch.sigmoid(torch.randn(batch_size, generator=generator) + 0.5).to(device)
    noisy = torch.lerp(picture, noise, sigma[:, None, None])
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
        velocity = model(noisy, reference, pairs.clip_ids[n, v].to(device), pairs.text_ids[n, v].to(device), sigma)
    difference, weights = velocity.float() - noise + picture, pairs.weights[n, v].to(device)
    error = ((difference @ pairs.metric.to(device)) * difference).mean(-1)
    return (error * weights).sum() / weights.sum()
