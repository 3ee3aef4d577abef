"""Refuse a run that cannot fit on its GPU before anything is loaded."""

import os
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from customized_grpo.config import Config
from customized_grpo.errors import UserError
from customized_grpo.policies.pipeline import default_device
from customized_grpo.settings import Spec
from customized_grpo.settings.build import exported
from customized_grpo.shell import command
from customized_grpo.sources import locate
from customized_grpo.structures import Example

ROOM = 32
"""A device with so many times the bytes of the weights is not counted. Full training in float32 of weights in bfloat16
takes 12 times their bytes: with gradient, optimizer, average and a copy of the base."""


def check_fits(config: Config, example: Example) -> None:
    """Raise UserError if a run needs more memory than its GPU has.

    Nothing is refused on a CPU, for a pipeline that is not on this machine, or where counting fails.

    Args:
        config: the configuration of the run.
        example: stands for all.
    """
    device, folder = torch.device(config.policy.arguments.get("device") or default_device()), _folder(config.policy)
    if not config.training.preflight or device.type != "cuda" or folder is None:
        return
    total = _total_memory(device)
    if ROOM * sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < total:
        return
    from customized_grpo.plan.estimate import Planner  # which needs transformers
    from customized_grpo.plan.hardware import Gpu

    policy = config.policy.model_copy(update={"path": str(folder)})
    try:
        planner = Planner(
            config.model_copy(update={"policy": policy}), int(os.environ.get("WORLD_SIZE", "1")), example=example
        )
        memory = planner.memory(planner.given)
    except Exception:  # some components cannot be counted, and may fit
        return
    if memory.peak > total:
        first = planner.advice(planner.given, Gpu(total / 2**30, 1, 1))
        raise UserError(
            f"This run needs about {memory.peak / 2**30:.1f} GiB in the stage {memory.fullest}, and {device} has "
            f"{total / 2**30:.1f} GiB; {first}; `{command('plan')}` counts other settings, and "
            f"training.preflight=false tries these."
        )


def _folder(policy: Spec) -> Path | None:
    """Where the policy's pipeline is on this machine, if it is here and a family of this package."""
    if exported(policy.use, "policy") is None:
        return None
    source, index = locate(str(policy.arguments.get("path", "toyworld:pipeline"))), "model_index.json"
    if not Path(source).is_dir():
        cached = try_to_load_from_cache(source, index, revision=policy.arguments.get("revision"))
        source = Path(cached).parent if isinstance(cached, str) else source
    return Path(source) if (Path(source) / index).is_file() else None


def _total_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory
