"""The autoencoder: pixels to 16 x 16 latents and back."""

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from customized_grpo.toyworld.draw import SIZE
from tools.pretrain.models import Autoencoder

SUBJECT_WEIGHT = 3.0
"""How much more an error on the subject and its outline counts, because a flat background is easy."""
DECODER_NOISE = 0.6
"""Largest standard deviation of the noise on standardized latents from which the decoder learns."""


def build(size: int = SIZE) -> Autoencoder:
    from diffusers import AutoencoderKL

    from customized_grpo.toyworld.autoencoder import PatchAutoencoder

    if size > SIZE:
        folded: Any = PatchAutoencoder(sample_size=size)
        return folded.to(memory_format=torch.channels_last)  # faster on a CPU
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "latent_channels": 12,
        "norm_num_groups": 8,
        "sample_size": size,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
    return AutoencoderKL(**config)


def loss(
    autoencoder: Autoencoder, images: Tensor, masks: Tensor, generator: torch.Generator, kl_weight: float = 5e-4
) -> Tensor:
    """Absolute, squared and edge errors plus a small Kullback-Leibler term towards a standard normal.

    Args:
        images: (B, 3, S, S) float32 in [-1, 1].
        masks: (B, S, S) float32 in [0, 1], 1 on the subject.
    """
    with _mixed(images):
        posterior = autoencoder.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(images.device)
        decoded = autoencoder.decode(posterior.mean + posterior.std * noise).sample
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    return _error(decoded.float() - images, masks) + kl_weight * kl


def decoder_loss(autoencoder: Autoencoder, images: Tensor, masks: Tensor, generator: torch.Generator) -> Tensor:
    """The same errors of the decoder alone, from latents with noise, so that it draws small errors of a generator away.

    RAE (arXiv 2510.11690) trains its decoder so. A quarter of the latents has no noise.
    """
    with torch.no_grad(), _mixed(images):
        latents = autoencoder.encode(images).latent_dist.mode()
    strength = DECODER_NOISE * torch.rand(len(images), 1, 1, 1, generator=generator)
    strength[::4] = 0
    noise = strength / autoencoder.config.scaling_factor * torch.randn(latents.shape, generator=generator)
    with _mixed(images):
        decoded = autoencoder.decode(latents + noise.to(images.device)).sample
    return _error(decoded.float() - images, masks)


def _mixed(images: Tensor) -> torch.autocast:
    """Convolutions of so few channels are slower in bfloat16 than in float32 on a CPU."""
    return torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type != "cpu")


def _error(error: Tensor, masks: Tensor) -> Tensor:
    """Absolute, squared and edge errors, weighted."""
    weight = 1 + SUBJECT_WEIGHT * F.max_pool2d(masks[:, None], 5, stride=1, padding=2)
    weight = weight / weight.mean()
    edges = (error.diff(dim=-1).abs() * weight[..., 1:]).mean() + (error.diff(dim=-2).abs() * weight[..., 1:, :]).mean()
    return (error.abs() * weight).mean() + 4 * (error.square() * weight).mean() + 0.5 * edges


@torch.no_grad()
def calibrate(autoencoder: Autoencoder, images: Tensor) -> None:
    """Set shift and scale so that the latents of `images` have mean 0 and standard deviation 1."""
    latents = autoencoder.encode(images).latent_dist.mode()
    autoencoder.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


@torch.no_grad()
def psnr(autoencoder: Autoencoder, images: Tensor, masks: Tensor) -> Tensor:
    """Peak signal-to-noise ratios of each reconstruction, in dB.

    Args:
        images: (B, 3, S, S) in [-1, 1].
        masks: (B, S, S) bool, true on the subject.

    Returns:
        (B, 2): over all pixels, and over those of the subject.
    """
    decoded = autoencoder.decode(autoencoder.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    error = (decoded - images).square().mean(1) / 4
    on_subject = (error * masks).sum((1, 2)) / masks.sum((1, 2))
    return -10 * torch.stack([error.mean((1, 2)), on_subject], dim=-1).log10()


@torch.no_grad()
def decoding_seconds(autoencoder: Autoencoder, count: int = 64) -> float:
    """Processor seconds to decode `count` images on one thread."""
    threads = torch.get_num_threads()
    latents = torch.zeros(count, autoencoder.config.latent_channels, 16, 16, device=autoencoder.device)
    torch.set_num_threads(1)
    autoencoder.decode(latents[:1])
    started = time.process_time()
    autoencoder.decode(latents)
    seconds = time.process_time() - started
    torch.set_num_threads(threads)
    return seconds
