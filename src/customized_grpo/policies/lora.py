"""What trains inside a frozen transformer: a LoRA adapter (peft), or all of it."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from customized_grpo.errors import TrainingError, UserError
from customized_grpo.policies.settings import LoraSettings

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = (
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
)  # fmt: skip


Trainable = Literal["lora", "full"]

ADAPTER = "default"
"""peft's name of the adapter that trains. Adapters of other names are frozen and belong to the base policy."""


def make_trainable(
    transformer: nn.Module,
    trainable: Trainable,
    lora: LoraSettings,
    seed: int = 0,
    targets: Sequence[str] = ATTENTION + FEED_FORWARD,
) -> int:
    """Freeze the transformer and open what trains, in float32. Returns the number of trainable parameters.

    Args:
        transformer: a diffusers model.
        trainable: an adapter, or all weights.
        lora: the adapter.
        seed: of its initial weights.
        targets: of the family, where `lora` names none.

    Raises:
        UserError: if no module name ends in one of the targets that the user gave.
        TrainingError: if the adapter is bound to nothing.
    """
    transformer.requires_grad_(False)
    if trainable == "full":
        transformer.float().requires_grad_(True)
    else:
        _add_adapter(transformer, lora, seed, targets)
    count = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    if count == 0:
        raise TrainingError("No parameter of the transformer trains; check policy.trainable and lora.targets.")
    return count


def _add_adapter(transformer: Any, lora: LoraSettings, seed: int, family_targets: Sequence[str]) -> None:
    from peft import LoraConfig

    from customized_grpo.policies.lora_layer import quicken

    linears = block_linears(transformer)
    for target in lora.targets or ():
        if not any(name.endswith("." + target) for name in linears):
            raise UserError(
                f"No linear layer in the blocks of {type(transformer).__name__} ends in '{target}', which "
                f"lora.targets names; print(transformer) shows the names there are."
            )
    targets = family_targets if lora.targets is None else lora.targets
    wanted = [name for name in linears if any(name.endswith("." + target) for target in targets)]
    frozen = list(getattr(transformer, "peft_config", {}))
    if ADAPTER in frozen:
        raise UserError("The pipeline already holds an adapter that trains; load a fresh pipeline for another policy.")
    alpha: Any = lora.rank if lora.alpha is None else lora.alpha  # peft calls it an int, and takes a float
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=wanted)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of an adapter beneath, which is meant
        torch.manual_seed(seed)
        transformer.add_adapter(config, adapter_name=ADAPTER)
    if frozen:
        transformer.set_adapter([*frozen, ADAPTER])
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(".lora_" in name and f".{ADAPTER}." in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    quicken(transformer)


def fuse(transformer: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Add an adapter to the weights, in float32, for good. `state` as in `add_frozen_adapter`."""
    _check_fit(transformer, state)
    with torch.no_grad():
        for name in _modules(state):
            weight: Tensor = transformer.get_submodule(name).weight  # pyright: ignore[reportAssignmentType]
            down, up = (state[f"{name}.lora_{part}.weight"].to(weight.device).float() for part in "AB")
            weight.copy_(weight.float() + up @ down)


def _modules(state: Mapping[str, Tensor]) -> list[str]:
    return [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]


def _check_fit(transformer: nn.Module, state: Mapping[str, Tensor]) -> None:
    linears = block_linears(transformer)
    for name in _modules(state):
        linear: Any = linears.get(name)
        found = (linear.out_features, linear.in_features) if linear else None  # a quantised weight has another shape
        down, up = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        if found != (len(up), down.shape[1]):
            raise UserError(
                f"The adapter is of another model: it changes {name} of shape {(len(up), down.shape[1])}, here "
                f"it is {found or 'no layer'}; give the base model it was trained on."
            )


def add_frozen_adapter(transformer: Any, state: Mapping[str, Tensor], name: str) -> None:
    """Put an adapter beneath the one that trains; it stays on in the base policy.

    Args:
        transformer: a diffusers model without an adapter that trains.
        state: `{module}.lora_A.weight` (rank, in) and `{module}.lora_B.weight` (out, rank), of one rank.
        name: peft's name for it.
    """
    from peft import LoraConfig

    _check_fit(transformer, state)
    modules = _modules(state)
    rank = len(state[modules[0] + ".lora_A.weight"])
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=modules), adapter_name=name)
    with torch.no_grad():
        for module in modules:
            layer = transformer.get_submodule(module)
            for part in ("lora_A", "lora_B"):
                getattr(layer, part)[name].weight.copy_(state[f"{module}.{part}.weight"])
    transformer.requires_grad_(False)


def block_linears(transformer: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside the transformer's blocks, by name, whether an adapter wraps them or not."""
    stacks = {name.split(".")[0] for name, module in transformer.named_modules() if isinstance(module, nn.ModuleList)}
    return {
        name: module
        for name, module in transformer.named_modules()
        if name.split(".")[0] in stacks
        and isinstance(getattr(module, "base_layer", module), nn.Linear)
        and not {"base_layer", "lora_A", "lora_B"} & set(name.split("."))
    }


@contextmanager
def adapter_off(transformer: nn.Module, trainable: Trainable) -> Iterator[None]:
    """Inside it the transformer computes what it did before training; adapters beneath ours stay on.

    Raises:
        UserError: for full fine-tuning, where the base weights are gone.
    """
    if trainable == "full":
        raise UserError("The base policy is needed, but full fine-tuning overwrites it; call keep_base before it.")
    scales = [s for m in transformer.modules() if ADAPTER in (s := getattr(m, "scaling", {}))]
    kept = [scale[ADAPTER] for scale in scales]
    for scale in scales:
        scale[ADAPTER] = 0.0
    try:
        yield
    finally:
        for scale, value in zip(scales, kept, strict=True):
            scale[ADAPTER] = value


def trainable_state(transformer: nn.Module) -> dict[str, Tensor]:
    """Detached references to the trained tensors, by parameter name."""
    return {name: p.detach() for name, p in transformer.named_parameters() if p.requires_grad}


def load_trainable_state(transformer: nn.Module, state: Mapping[str, Tensor], what: str = "The checkpoint") -> None:
    """Copy `state` into the trained tensors.

    Raises:
        UserError: if a name is missing or left over, or a shape differs.
    """
    own = trainable_state(transformer)
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        raise UserError(
            f"{what} is of another model or adapter: {len(missing)} tensors missing"
            f"{f' (such as {missing[0]})' if missing else ''}, {len(extra)} left over"
            f"{f' (such as {extra[0]})' if extra else ''}; use the policy settings of the run that wrote it."
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{what} holds {name} of shape {tuple(state[name].shape)}, the model has "
                f"{tuple(tensor.shape)}; use the rank and model of the run that wrote it."
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


ADAPTER_FILE = "pytorch_lora_weights.safetensors"


def save_adapter(pipeline: Any, transformer: Any, folder: Path) -> None:
    """Write the adapter as diffusers does, for `load_lora_weights(folder)`.

    Its scale, alpha / rank, is multiplied into the up matrices and the file names no alpha, because some readers ignore
    it.
    """
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    layers = {name: value.detach().contiguous() for name, value in state.items()}
    for module in _modules(layers):
        layers[f"{module}.lora_B.weight"] = layers[f"{module}.lora_B.weight"] * _scale(transformer, module)
    pipeline.save_lora_weights(folder, transformer_lora_layers=layers)


def _scale(transformer: nn.Module, module: str) -> float:
    layer: Any = transformer.get_submodule(module)
    return layer.scaling[ADAPTER]


def load_adapter(transformer: Any, folder: Path) -> None:
    """Inverse of `save_adapter`, into the adapter that trains, whatever alpha either has.

    Raises:
        UserError: if there is no adapter, or it is of another model, rank or targets.
    """
    state, own = read_adapter(folder), trainable_state(transformer)
    for module in _modules(state):
        if f"{module}.lora_B.{ADAPTER}.weight" in own:
            state[f"{module}.lora_B.weight"] = state[f"{module}.lora_B.weight"] / _scale(transformer, module)
    named = {name.removesuffix("weight") + f"{ADAPTER}.weight": tensor for name, tensor in state.items()}
    load_trainable_state(transformer, named, f"The adapter in '{folder}'")


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """An adapter in diffusers' layout: `{module}.lora_A.weight` (rank, in) and `{module}.lora_B.weight` (out, rank).

    The update of a layer is B A: a scale that the file names, as peft's settings or as `{module}.alpha`, is multiplied
    into B.

    Raises:
        UserError: if there is no adapter, or it is more than two matrices for each layer.
    """
    file = folder / ADAPTER_FILE if folder.is_dir() else folder
    tensors, metadata = read_safetensors(file)
    prefix = "transformer."
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    settings = {name.removeprefix(prefix): value for name, value in settings.items()}
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    alphas = {name: float(state.pop(name)) for name in list(state) if name.endswith(".alpha")}
    modules = _modules(state)
    if unknown := state.keys() ^ {f"{module}.lora_{part}.weight" for module in modules for part in "AB"}:
        raise UserError(
            f"The adapter in '{folder}' is not a plain LoRA, whose layers have lora_A.weight and lora_B.weight: "
            f"{sorted(unknown)[0]} is left over or missing; give an adapter without biases or magnitudes."
        )
    for module in modules:
        rank = len(state[f"{module}.lora_A.weight"])
        scale = _told_scale(settings, module, rank, alphas.get(f"{module}.alpha"))
        state[f"{module}.lora_B.weight"] = state[f"{module}.lora_B.weight"] * scale
    return state


def _told_scale(settings: Mapping[str, Any], module: str, rank: int, alpha: float | None) -> float:
    """The scale of a module's update by peft's settings, unless it has an alpha of its own; 1 if nothing is told."""
    from peft.utils.other import get_pattern_key

    if alpha is None:
        alphas: dict[str, float] = settings.get("alpha_pattern") or {}
        key = get_pattern_key(list(alphas), module)
        alpha = float(alphas[key] if key in alphas else settings.get("lora_alpha", rank))
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UserError: if it is not there or not one.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"There is no file '{file}'; give the path of a safetensors file.")
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"'{file}' is not a safetensors file ({error}); other formats are not read.") from error
