"""Latent pictures as tokens: packing, positions, and the sizes a model takes. Pure."""

import math

import torch
from torch import Tensor

Size = tuple[int, int]
"""(width, height) in pixels, as PIL has it."""


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) to tokens of 2 x 2 latent pixels, (B, H/2 * W/2, 4 C), the channel varying slowest in a token."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `pack`, for a grid of rows x columns tokens."""
    patches = tokens.reshape(len(tokens), rows, columns, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, rows * 2, columns * 2)


def grid_positions(rows: int, columns: int, *, plane: int = 0, row: int = 0, column: int = 0) -> Tensor:
    """Positions (rows * columns, 3) for the rotary embedding: (plane, row, column), counted from `row`, `column`."""
    y, x = torch.meshgrid(torch.arange(rows) + row, torch.arange(columns) + column, indexing="ij")
    return torch.stack([torch.full_like(y, plane), y, x], dim=-1).reshape(-1, 3).float()


def fit_area(size: Size, side: int, unit: int) -> Size:
    """The aspect of `size` with about side^2 pixels, in multiples of `unit`."""
    aspect = size[0] / size[1]
    return _snap(side * math.sqrt(aspect), unit), _snap(side / math.sqrt(aspect), unit)


def floor_to(size: Size, unit: int) -> Size:
    """Both sides down to a multiple of `unit`, at least one."""
    return max(unit, size[0] // unit * unit), max(unit, size[1] // unit * unit)


def _snap(pixels: float, unit: int) -> int:
    return max(unit, round(pixels / unit) * unit)
