"""The autoencoder: 64 x 64 pixels to 16 x 16 latents and back."""

from typing import Any

import torch
from torch import Tensor

from tools.pretrain.models import Autoencoder

LATENT_CHANNELS = 12


def build() -> Autoencoder:
    from diffusers import AutoencoderKL

    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 8,
        "sample_size": 64,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
    return AutoencoderKL(**config)


def loss(autoencoder: Autoencoder, images: Tensor, generator: torch.Generator, kl_weight: float = 5e-4) -> Tensor:
    """Absolute, squared and edge errors plus a small Kullback-Leibler term towards a standard normal.

    Args:
        images: (B, 3, 64, 64) float32 in [-1, 1].
    """
    with torch.autocast(images.device.type, torch.bfloat16):
        posterior = autoencoder.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(images.device)
        decoded = autoencoder.decode(posterior.mean + posterior.std * noise).sample
    error = decoded.float() - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    return error.abs().mean() + 4 * error.square().mean() + 0.5 * edges + kl_weight * kl


@torch.no_grad()
def calibrate(autoencoder: Autoencoder, images: Tensor) -> None:
    """Set shift and scale so that the latents of `images` have mean 0 and standard deviation 1."""
    latents = autoencoder.encode(images).latent_dist.mode()
    autoencoder.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


@torch.no_grad()
def psnr(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each reconstruction, in dB. images: (B, 3, 64, 64) in [-1, 1]; returns (B,)."""
    decoded = autoencoder.decode(autoencoder.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    return -10 * ((decoded - images).square().mean((1, 2, 3)) / 4).log10()
