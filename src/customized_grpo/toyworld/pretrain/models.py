"""Names for models of diffusers and transformers, whose own annotations are too loose to check against."""

from typing import Any, TypeAlias

Autoencoder: TypeAlias = Any
"""diffusers.AutoencoderKL"""
Transformer: TypeAlias = Any
"""diffusers.FluxTransformer2DModel"""
Scheduler: TypeAlias = Any
"""diffusers.FlowMatchEulerDiscreteScheduler"""
Clip: TypeAlias = Any
"""transformers.CLIPModel"""
ClipText: TypeAlias = Any
"""transformers.CLIPTextModel"""
Dino: TypeAlias = Any
"""transformers.Dinov2Model"""
T5: TypeAlias = Any
"""transformers.T5EncoderModel"""
Tokenizer: TypeAlias = Any
"""transformers.PreTrainedTokenizerFast"""
