"""A FLUX transformer that is small for the width of its tokens."""

from typing import Any

from diffusers import FluxTransformer2DModel, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

__all__ = ["ModelMixin", "PictureTransformer"]
"""A pipeline loads a class of another library only if its module names a base that diffusers can load."""

LEAST_SIGMA = 0.05


class PictureTransformer(FluxTransformer2DModel):
    """FluxTransformer2DModel that predicts the clean picture and returns the velocity towards it.

    A velocity holds all the noise of a token. A transformer no wider than a token has no room to carry this noise
    through its layers and the picture as well.
    """

    def forward(
        self, hidden_states: Tensor, *arguments: Any, timestep: Any, return_dict: bool = True, **named: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        picture = super().forward(hidden_states, *arguments, timestep=timestep, return_dict=False, **named)[0]
        velocity = (hidden_states - picture) / timestep.clamp(min=LEAST_SIGMA)[:, None, None].to(picture)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
