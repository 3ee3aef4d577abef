"""Aliases for classes of diffusers and transformers whose annotations are too loose for a type checker."""

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
