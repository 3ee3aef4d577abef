"""Model families. Loaded when first asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from customized_grpo.policies.contract import Policy, check_policy
    from customized_grpo.policies.export import export_kohya
    from customized_grpo.policies.flux import FluxKontextPolicy
    from customized_grpo.policies.flux2 import Flux2KleinPolicy
    from customized_grpo.policies.lora import LoraSettings
    from customized_grpo.policies.pipeline import PipelinePolicy
    from customized_grpo.policies.qwen_image import QwenImageEditPolicy
    from customized_grpo.policies.uno import UnoPolicy

_HOME = {
    "Flux2KleinPolicy": "flux2",
    "FluxKontextPolicy": "flux",
    "LoraSettings": "lora",
    "PipelinePolicy": "pipeline",
    "Policy": "contract",
    "QwenImageEditPolicy": "qwen_image",
    "UnoPolicy": "uno",
    "check_policy": "contract",
    "export_kohya": "export",
}

__all__ = [
    "Flux2KleinPolicy",
    "FluxKontextPolicy",
    "LoraSettings",
    "PipelinePolicy",
    "Policy",
    "QwenImageEditPolicy",
    "UnoPolicy",
    "check_policy",
    "export_kohya",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
