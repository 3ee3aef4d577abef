"""A FLUX transformer that is small for the width of its tokens."""

from typing import Any

from diffusers import FluxTransformer2DModel, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

__all__ = ["ModelMixin", "PictureTransformer"]
"""A pipeline loads a class of another library only if its module names a base that diffusers can load."""


class PictureTransformer(FluxTransformer2DModel):
    """FluxTransformer2DModel whose output is added to the best linear guess of the velocity, as in EDM.

    The output at a high noise level is the picture, at a low one the noise, with a variance of 1. A velocity is both at
    every level, and a transformer no wider than a token has no room to carry all the noise and the picture through its
    layers. EDM: arXiv 2206.00364.
    """

    def forward(
        self, hidden_states: Tensor, *arguments: Any, timestep: Any, return_dict: bool = True, **named: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        output = super().forward(hidden_states, *arguments, timestep=timestep, return_dict=False, **named)[0]
        sigma = timestep[:, None, None]
        power = sigma.square() + (1 - sigma).square()  # of latents with a variance of 1
        velocity = (2 * sigma - 1) / power * hidden_states - output / power.sqrt()
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
