"""A trained adapter as one file for other tools: diffusers' own naming, or kohya's, which ComfyUI and others read.

In either, alpha is the rank, so that readers with and without an alpha see the same update.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.policies.contract import METADATA
from customized_grpo.policies.flux_names import BLOCKS, FLUX1, FLUX2
from customized_grpo.policies.lora import ADAPTER_FILE, read_adapter
from customized_grpo.store import check_place, replacing

Format = Literal["diffusers", "kohya"]


def export_adapter(adapter: Path, file: str | Path, format: Format = "diffusers", *, pipeline: str = "") -> Path:
    """Write what a checkpoint's `adapter` folder holds as one file.

    Args:
        adapter: the folder.
        file: to write; ends in .safetensors.
        format: "diffusers" for `pipeline.load_lora_weights(file)`, or "kohya".
        pipeline: class of the pipeline that the adapter is of, which decides whether kohya has names for it.

    Raises:
        UserError: if there is no adapter, kohya has no names for its layers, or the file exists.
    """
    source, whole = adapter / ADAPTER_FILE, adapter / "transformer"
    if not source.is_file() and whole.is_dir():
        raise UserError(
            f"This run trained all weights, so it has no adapter; its transformer in diffusers' layout is '{whole}', "
            f"for from_pretrained, and for a pipeline's folder in place of its own."
        )
    if not source.is_file():
        raise UserError(f"'{adapter}' holds no {ADAPTER_FILE}; only adapters of pipelines can be exported.")
    if format == "kohya":
        if not pipeline.startswith("Flux"):
            raise UserError(
                f"Kohya's names are known for FLUX, and this adapter is of a {pipeline or 'model of another kind'}; "
                f"export it with --format diffusers."
            )
        return export_kohya(source, file)
    named = {f"transformer.{name}": tensor for name, tensor in read_adapter(source).items()}
    return _write(named, file, **metadata(adapter))


def export_kohya(adapter: str | Path, file: str | Path) -> Path:
    """Write an adapter that a FLUX policy saved as a kohya file.

    Args:
        adapter: the folder that `save` wrote, or its safetensors file.
        file: to write; ends in .safetensors.

    Raises:
        UserError: if the adapter is of another family, or the file exists.
    """
    converted = to_kohya(read_adapter(Path(adapter).expanduser()))
    return _write(converted, file, ss_network_module="networks.lora_flux", **metadata(Path(adapter).expanduser()))


def metadata(adapter: Path) -> dict[str, str]:
    """What a checkpoint says beside its adapter: the iteration and the held-out worst-reward gain, if known."""
    file = (adapter if adapter.is_dir() else adapter.parent) / METADATA
    found: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # missing or damaged
        found = dict(json.loads(file.read_text(encoding="utf-8")))
    return {name: str(value) for name, value in found.items() if value is not None}


def check_output(file: str | Path) -> Path:
    """The file to export to.

    Raises:
        UserError: if it has another ending, exists, or cannot be written.
    """
    target = Path(file).expanduser()
    if target.suffix != ".safetensors":
        raise UserError(f"The export is a safetensors file; '{target}' should end in .safetensors.")
    check_place(target)
    if target.exists():
        raise UserError(f"'{target}' is already there; nothing was overwritten. Give another name.")
    return target


def _write(state: Mapping[str, Tensor], file: str | Path, **metadata: str) -> Path:
    """Write a safetensors file that is not there yet."""
    from safetensors.torch import save_file

    target = check_output(file)
    with replacing(target, new=True) as draft:
        save_file(dict(state), draft, metadata={"format": "pt", **metadata})
    return target


def to_kohya(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`{module}.lora_A.weight` of diffusers to `lora_unet_{original}.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    Layers that the original model has as one (q, k and v) become one adapter of the summed rank, whose up matrix is
    block-diagonal: the same update exactly.

    Args:
        state: of a FLUX.1 or FLUX.2 adapter, the update of each layer being B A.

    Raises:
        UserError: if a module is not FLUX's.
    """
    original = {
        f"{BLOCKS[stack]}.{{}}.{part}": (stack, layer, parts.index(part), len(parts))
        for table in (FLUX1, FLUX2)
        for stack, layers in table.items()
        for layer, parts in layers.items()
        for part in parts
    }
    groups: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    counts: dict[str, int] = {}
    for key in state:
        module, separator, _ = key.partition(".lora_A.")
        if not separator:
            continue
        stack, index, rest = [*module.split(".", 2), "", ""][:3]
        if (found := original.get(f"{stack}.{{}}.{rest}")) is None:
            raise UserError(
                f"The adapter changes '{module}', which FLUX does not have; only FLUX adapters can be exported."
            )
        name = f"lora_unet_{found[0]}_{index}_{found[1].replace('.', '_')}"
        groups.setdefault(name, {})[found[2]] = (state[key], state[f"{module}.lora_B.weight"])
        counts[name] = found[3]
    converted: dict[str, Tensor] = {}
    for name, parts in groups.items():
        down, up = _stacked(parts, counts[name])
        converted[f"{name}.lora_down.weight"] = down.contiguous()
        converted[f"{name}.lora_up.weight"] = up.contiguous()
        converted[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return converted


def _stacked(parts: Mapping[int, tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """One (down, up) for `count` layers stacked along the output, of which some have no adapter."""
    if count == 1:
        return parts[0]
    width = next(iter(parts.values()))[0].shape[1]
    heights = [width, width, width, 4 * width][:count]  # q, k, v, and in single blocks the feed-forward
    present = sorted(parts)
    blocks = [parts[i][1] if i in parts else torch.zeros(heights[i], 0) for i in range(count)]
    return torch.cat([parts[i][0] for i in present]), torch.block_diag(*blocks)
