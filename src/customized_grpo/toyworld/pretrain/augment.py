"""What stands between a rendered picture and a generated one. Batches are (B, 3, 64, 64) float32 in [0, 1]."""

import torch
import torch.nn.functional as F
from torch import Tensor


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Small shifts and zooms, a little brightness, a little noise."""
    count = len(images)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + (_uniform(count, generator) - 0.5) * 0.1
    theta[:, :, 2] = (torch.rand(count, 2, generator=generator) - 0.5) * 0.1
    moved = F.grid_sample(
        images,
        F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False),
        padding_mode="reflection",
        align_corners=False,
    )
    brightness = (_uniform(count, generator) - 0.5).view(-1, 1, 1, 1) * 0.06
    return moved + brightness.to(images.device) + _noise(images, generator, 0.02)


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures blurred as a tiny autoencoder blurs; small warps and noise in all of them."""
    count = len(images)
    size = int(torch.randint(28, 56, (1,), generator=generator))
    small = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
    blurred = F.interpolate(small, images.shape[-2:], mode="bicubic", align_corners=False)
    chosen = (_uniform(count, generator) < 0.5).view(-1, 1, 1, 1).to(images.device)
    warp = (
        torch.randn(count, 2, 9, 9, generator=generator).to(images.device)
        * 0.02
        * _uniform(count, generator).view(-1, 1, 1, 1).to(images.device)
    )
    flow = F.interpolate(warp, images.shape[-2:], mode="bilinear", align_corners=False).movedim(1, -1)
    identity = F.affine_grid(
        torch.eye(2, 3, device=images.device).expand(count, 2, 3), list(images.shape), align_corners=False
    )
    warped = F.grid_sample(
        torch.where(chosen, blurred, images), identity + flow, padding_mode="border", align_corners=False
    )
    return warped + _noise(images, generator, 0.06)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator)


def _noise(images: Tensor, generator: torch.Generator, most: float) -> Tensor:
    """White noise whose strength is drawn per picture from [0, most]."""
    strength = most * _uniform(len(images), generator).view(-1, 1, 1, 1)
    return (torch.randn(images.shape, generator=generator) * strength).to(images.device)
