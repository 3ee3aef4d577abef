"""An autoencoder for 128 x 128 pictures whose decoder is fast on a CPU."""

from inspect import signature
from typing import Any, ClassVar

import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

__all__ = ["ModelMixin", "PatchAutoencoder"]
"""A pipeline loads a class of another library only if its module names a base that diffusers can load."""

PATCH = 2
_SETTINGS = (
    "block_out_channels",
    "latent_channels",
    "norm_num_groups",
    "sample_size",
    "scaling_factor",
    "shift_factor",
)


class PatchAutoencoder(AutoencoderKL):
    """AutoencoderKL without a level at full resolution: patches of 2 x 2 pixels are folded into 12 channels.

    The level at full resolution takes more than half of the time of a small AutoencoderKL on a CPU.

    Args:
        block_out_channels: of each level; the first, of the folded pixels, is 12.
    """

    ignore_for_config: ClassVar[list[str]] = [
        name for name in signature(AutoencoderKL.__init__).parameters if name not in _SETTINGS
    ]

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (12, 24, 48, 96),
        latent_channels: int = 32,
        norm_num_groups: int = 8,
        sample_size: int = 128,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        folded, *widths = block_out_channels
        levels: Any = {
            "down_block_types": ("DownEncoderBlock2D",) * len(widths),
            "up_block_types": ("UpDecoderBlock2D",) * len(widths),
            "block_out_channels": tuple(widths),
        }
        super().__init__(
            **levels,
            in_channels=folded,
            out_channels=folded,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        )
        self.register_to_config(block_out_channels=block_out_channels)  # pipelines count the levels

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        return super().encode(F.pixel_unshuffle(x, PATCH), return_dict)

    def decode(self, z: Any, return_dict: bool = True, generator: object = None) -> DecoderOutput | tuple[Tensor]:
        sample = F.pixel_shuffle(super().decode(z, return_dict=False)[0], PATCH)
        return DecoderOutput(sample=sample) if return_dict else (sample,)
