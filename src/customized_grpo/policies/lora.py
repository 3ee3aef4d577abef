"""What trains inside a frozen transformer: a LoRA adapter (peft), or all of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from customized_grpo.errors import TrainingError, UserError
from customized_grpo.settings import Settings

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = (
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
)  # fmt: skip


class LoraSettings(Settings):
    """A low-rank adapter on the linear layers of the transformer's blocks."""

    rank: int = Field(16, ge=1)
    """Rank of the update of each layer."""
    alpha: float | None = None
    """Scale numerator; the update is alpha / rank * B A. None is alpha = rank."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Must stay 0 for exact log-probs: a dropout mask would differ between sampling and training."""
    targets: tuple[str, ...] = ATTENTION + FEED_FORWARD
    """Ends of module names that get an adapter, as peft's `target_modules`, inside transformer blocks only."""


Trainable = Literal["lora", "full"]


def make_trainable(transformer: nn.Module, trainable: Trainable, lora: LoraSettings, seed: int = 0) -> int:
    """Freeze the transformer and open what trains, in float32. Returns the number of trainable parameters.

    Raises:
        UserError: if no module name ends in one of `lora.targets`.
        TrainingError: if the adapter is bound to nothing.
    """
    transformer.requires_grad_(False)
    if trainable == "full":
        transformer.float().requires_grad_(True)
    else:
        _add_adapter(transformer, lora, seed)
    count = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    if count == 0:
        raise TrainingError("No parameter of the transformer trains; check policy.trainable and lora.targets.")
    return count


def _add_adapter(transformer: nn.Module, lora: LoraSettings, seed: int) -> None:
    from peft import LoraConfig

    blocks = [name for name, module in transformer.named_modules() if isinstance(module, nn.ModuleList)]
    wanted = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and name.split(".")[0] in {b.split(".")[0] for b in blocks}
        and any(name.endswith("." + target) for target in lora.targets)
    ]
    if not wanted:
        raise UserError(
            f"No linear layer of {type(transformer).__name__} ends in any of lora.targets {list(lora.targets)}; "
            f"print(transformer) shows the names there are."
        )
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha or lora.rank, lora_dropout=lora.dropout, target_modules=wanted
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config)  # pyright: ignore[reportCallIssue] - a mixin of diffusers models
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def adapter_off(transformer: nn.Module, trainable: Trainable) -> Iterator[None]:
    """Inside it the transformer computes what it did before training.

    Raises:
        UserError: for full fine-tuning, where the base weights are gone.
    """
    if trainable == "full":
        raise UserError("The base policy is needed (beta > 0), but full fine-tuning overwrites it; train a LoRA.")
    transformer.disable_adapters()  # pyright: ignore[reportCallIssue]
    try:
        yield
    finally:
        transformer.enable_adapters()  # pyright: ignore[reportCallIssue]


def trainable_state(transformer: nn.Module) -> dict[str, Tensor]:
    """Detached references to the trained tensors, by parameter name."""
    return {name: p.detach() for name, p in transformer.named_parameters() if p.requires_grad}


def load_trainable_state(transformer: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the trained tensors.

    Raises:
        UserError: if a name is missing or left over, or a shape differs.
    """
    own = trainable_state(transformer)
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        raise UserError(
            f"The checkpoint is of another model or adapter: {len(missing)} tensors missing"
            f"{f' (such as {missing[0]})' if missing else ''}, {len(extra)} left over"
            f"{f' (such as {extra[0]})' if extra else ''}; use the policy settings of the run that wrote it."
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"The checkpoint holds {name} of shape {tuple(state[name].shape)}, the model has "
                f"{tuple(tensor.shape)}; use the rank and model of the run that wrote it."
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def save_adapter(pipeline: Any, transformer: Any, folder: Path) -> None:
    """Write the adapter as diffusers does, with rank and alpha in its metadata, for `load_lora_weights(folder)`."""
    from peft.utils import get_peft_model_state_dict

    layers = {name: value.detach().contiguous() for name, value in get_peft_model_state_dict(transformer).items()}
    metadata = transformer.peft_config["default"].to_dict()
    pipeline.save_lora_weights(folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)
