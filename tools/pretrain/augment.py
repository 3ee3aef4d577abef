"""Augmentations that make rendered images resemble generated ones. Batches are (B, 3, S, S) in [0, 1], on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Apply small shifts, zooms and changes of brightness, and add a little noise."""
    count = len(images)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + (_uniform(count, generator) - 0.5) * 0.1
    theta[:, :, 2] = (torch.rand(count, 2, generator=generator) - 0.5) * 0.1
    moved = F.grid_sample(
        images,
        F.affine_grid(theta, list(images.shape), align_corners=False),
        padding_mode="reflection",
        align_corners=False,
    )
    brightness = (_uniform(count, generator) - 0.5).view(-1, 1, 1, 1) * 0.06
    return moved + brightness + _noise(images, generator, 0.02)


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur half of the images like a small autoencoder does; warp all of them slightly and add noise."""
    count, shape = len(images), images.shape[-2:]
    side = int(torch.randint(28, 56, (1,), generator=generator)) * shape[0] // 64
    small = F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
    blurred = F.interpolate(small, shape, mode="bicubic", align_corners=False)
    chosen = (_uniform(count, generator) < 0.5).view(-1, 1, 1, 1)
    strength = 0.02 * _uniform(count, generator).view(-1, 1, 1, 1)
    bends = torch.randn(count, 2, 9, 9, generator=generator) * strength
    flow = F.interpolate(bends, shape, mode="bilinear", align_corners=False).movedim(1, -1)
    still = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(images.shape), align_corners=False)
    mixed = torch.where(chosen, blurred, images)
    return F.grid_sample(mixed, still + flow, padding_mode="border", align_corners=False) + _noise(
        images, generator, 0.06
    )


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator)


def _noise(images: Tensor, generator: torch.Generator, most: float) -> Tensor:
    """White noise with a standard deviation drawn per image from [0, most]."""
    strength = most * _uniform(len(images), generator).view(-1, 1, 1, 1)
    return torch.randn(images.shape, generator=generator) * strength
