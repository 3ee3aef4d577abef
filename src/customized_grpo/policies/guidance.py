"""Which setting of a policy is its guidance: models that are distilled with guidance embed it, others run with
classifier-free guidance, and some are distilled to run without."""

import inspect
import json
from pathlib import Path
from typing import Any

from customized_grpo.errors import UserError
from customized_grpo.policies.pipeline import PipelinePolicy
from customized_grpo.settings import Spec
from customized_grpo.sources import locate

EMBEDDED, CLASSIFIER_FREE = "guidance_scale", "true_cfg_scale"


def guidance_setting(target: Any, spec: Spec) -> str | None:
    """The name of the setting, or None if the model takes no guidance.

    Nothing is fetched: the model's own configuration decides where it is on disk, else its family.

    Args:
        target: the class or function of the spec.
        spec: of a policy.
    """
    if not (inspect.isclass(target) and issubclass(target, PipelinePolicy)):
        return next((name for name in (EMBEDDED, CLASSIFIER_FREE) if takes(target, name)), None)
    path = str(spec.arguments.get("path", ""))
    if _config(path, "model_index.json").get("is_distilled", target.GUIDED_BY is None):
        return None
    embeds = _config(path, "transformer/config.json").get("guidance_embeds", target.GUIDED_BY == EMBEDDED)
    return EMBEDDED if embeds else CLASSIFIER_FREE


def describe_guidance(target: Any, spec: Spec) -> str:
    """The guidance that is used, in a sentence."""
    name = guidance_setting(target, spec)
    if name is None:
        return "Guidance: none, the model takes none."
    kind = "embedded in the model" if name == EMBEDDED else "classifier-free, two passes a step"
    value = spec.arguments.get(name, getattr(target, "GUIDANCE", None) if name == EMBEDDED else None)
    return f"Guidance: {name} {'of the family' if value is None else f'{value:g}'}, {kind}."


def takes(target: Any, name: str) -> bool:
    """Whether a class, or its `from_pretrained`, has the argument."""
    makers = [target, getattr(target, "from_pretrained", target)]
    return any(name in inspect.signature(maker).parameters for maker in makers)


def _config(path: str, name: str) -> dict[str, Any]:
    """A JSON file of a model in a local folder or in the cache of the hub; empty if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        source = locate(path)
        found = Path(source, name) if Path(source).is_dir() else try_to_load_from_cache(source, name)
        content = json.loads(Path(found).read_text(encoding="utf-8")) if isinstance(found, str | Path) else {}
    except (UserError, OSError, ValueError):  # whoever loads the model says what is wrong with it
        return {}
    return content if isinstance(content, dict) else {}
