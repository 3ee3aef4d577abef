"""A FLUX transformer that is small for the width of its tokens."""

from typing import Any

from diffusers import FluxTransformer2DModel, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

__all__ = ["ModelMixin", "PictureTransformer"]
"""A pipeline loads a class of another library only if its module names a base that diffusers can load."""

LEAST_NOISE = 0.05
"""Noise level below which errors of the picture are not magnified further."""


class PictureTransformer(FluxTransformer2DModel):
    """FluxTransformer2DModel that predicts the picture, from which the velocity follows, as in JiT.

    A velocity is noise for the larger part, and a transformer no wider than a token has no room to carry all the noise
    through its layers. JiT: arXiv 2511.13720.
    """

    def forward(
        self, hidden_states: Tensor, *arguments: Any, timestep: Any, return_dict: bool = True, **named: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        picture = super().forward(hidden_states, *arguments, timestep=timestep, return_dict=False, **named)[0]
        velocity = (hidden_states - picture) / timestep[:, None, None].clamp(min=LEAST_NOISE)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
