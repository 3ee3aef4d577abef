"""Models without contents: policies and rewards of any size from their configurations, on fake tensors.

A fake tensor has a shape and a dtype, and takes no memory. All are on the CPU, so that no GPU is needed. What a CPU
would compute differently from a GPU (attention written out as matrix products) is switched off.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from customized_grpo.errors import UserError
from customized_grpo.policies import lora as _lora
from customized_grpo.policies.encodings import EncodingCache
from customized_grpo.policies.mixed_precision import MixedPrecision
from customized_grpo.policies.pipeline import PipelinePolicy, as_dtype, read_settings
from customized_grpo.settings import Spec
from customized_grpo.settings.build import exported
from customized_grpo.sources import locate
from customized_grpo.store import read_json

PACKAGED = Path(__file__).parent
Config = tuple[str, str, dict[str, Any]]
"""Library, class and configuration of a model."""
BLOCKS = ("num_layers", "num_single_layers")
"""What configurations of transformers call the numbers of their blocks."""
IMAGE_TOKENS, TEMPLATE_TOKENS = 190, 100
"""Tokens of Qwen-Image-Edit's text encoder for each reference, and for the prompt with its template."""
UNO_RANK, UNO_TARGETS = 512, (*_lora.ATTENTION, "proj_out")
"""Rank and layers of UNO's own adapter, where it is not fused."""
NOT_HERE = ("path", "revision", "adapter", "adapter_revision", "transformer", "quantize", "attention")
"""Settings that say what is loaded or runs on the GPU, which a fake policy does not need."""
BITS = {"int8": (1.0, 0), "nf4": (0.5, 64)}
"""Bytes for each weight, and weights that share a float32 scale; 0 is a row."""


@contextmanager
def without_contents() -> Iterator[None]:
    """Inside it, new tensors are fake, and modules of fake tensors can be moved and initialised."""
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Passing `image` as torch tensor with value range")  # which is not known
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Answers())
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(patch.object(MixedPrecision, "writes_out_attention", False))
        yield


class _Answers(TorchDispatchMode):
    """Answers libraries that read the value of a fake tensor: True, 1.0, or 0 for an integer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
        return func(*args, **(kwargs or {}))


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that makes new parameters. The original replaces their contents, which are missing here."""
    for child in module.children():
        child._apply(change)
    for held in (module._parameters, module._buffers):
        for name, old in held.items():
            if old is None:
                continue
            with torch.no_grad():
                new = change(old)
            if new is not old:
                trains = old.requires_grad
                held[name] = nn.Parameter(new, trains) if isinstance(old, nn.Parameter) else new  # pyright: ignore
    return module


def fake_model(config: Config, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model of a configuration."""
    from transformers.initialization import no_init_weights

    library, name, settings = config
    kind, settings = getattr(import_module(library), name), {**settings, **changes}
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if hasattr(kind, "from_config"):
            return kind.from_config(settings)
        with no_init_weights():  # which draws again until all values are in a range
            return kind(kind.config_class(**settings)).eval()
    finally:
        torch.set_default_dtype(default)


class FakeFamily:
    """Policies of one specification, with any numbers of blocks.

    Args:
        spec: of a family of this package. Sizes are those of config.json in a local folder, else the packaged ones.

    Raises:
        UserError: for another policy, or settings that it cannot take.
    """

    def __init__(self, spec: Spec) -> None:
        self.kind: Any = exported(spec.use, "policy")
        self.configs, self.index = self._read(spec, getattr(self.kind, "PIPELINE", ""))
        given = read_settings(spec.arguments)
        self.fuse = given.pop("fuse", True)
        for name in (*self.kind.RUNTIME, *NOT_HERE):
            given.pop(name, None)
        dtype = given.get("dtype", torch.float32)
        self.dtype = torch.bfloat16 if dtype == "auto" else as_dtype(dtype)
        self.settings = {**given, "dtype": self.dtype}
        depth = self.configs["transformer"][2]
        self.blocks: dict[str, int] = {name: depth[name] for name in BLOCKS if name in depth}
        self._parts = {
            name: fake_model(config, torch.float32 if name == "vae" else self.dtype)
            for name, config in self.configs.items()
            if name != "transformer"
        }
        self._cache = EncodingCache(2**62)

    def _read(self, spec: Spec, pipeline: str) -> tuple[dict[str, Config], Mapping[str, Any]]:
        path = str(spec.arguments.get("path", "toyworld:pipeline"))
        folder = Path(locate(path))
        if self.kind is not None and (folder / "model_index.json").is_file():
            return _read_folder(folder)
        known: dict[str, Any] = read_json(PACKAGED / "models.json")
        known["FluxKontextPipeline"] = known["FluxPipeline"]
        known["Flux2KleinKVPipeline"] = known["Flux2KleinPipeline 9B"]
        large = f"{pipeline} 9B"
        name = large if large in known and "9b" in path.lower() else pipeline
        if name not in known:
            choices = ", ".join(name for name in sorted(known) if " " not in name)
            raise UserError(f"policy.use is {spec.use}, whose sizes are not known; a plan can be made for {choices}.")
        return known[name], {"is_distilled": "base" not in path.lower()}

    def policy(self, blocks: Mapping[str, int], *, checkpointing: bool, quantize: str) -> PipelinePolicy:
        """A policy with the given number of blocks of each kind. All policies share one cache of encodings."""
        import diffusers

        parts = {**self._parts, "transformer": fake_model(self.configs["transformer"], self.dtype, **blocks)}
        if quantize != "none":
            store_quantized(parts["transformer"], quantize)
        if not self.fuse:
            _add_adapter_beneath(parts["transformer"])
        make: Any = getattr(diffusers, self.kind.PIPELINE)
        for name, parameter in inspect.signature(make).parameters.items():
            if name not in parts and parameter.default is parameter.empty:
                parts[name] = None
        if "is_distilled" in inspect.signature(make).parameters:
            parts["is_distilled"] = bool(self.index.get("is_distilled"))
        policy = self.kind(make(**parts), **self.settings, gradient_checkpointing=checkpointing, device="cpu")
        policy._cache = self._cache
        policy._encode_text = partial(self._encode_text, policy)
        return policy

    def _encode_text(self, policy: Any, prompt: str, example: Any) -> dict[str, Tensor]:
        """What the family's own method returns for the longest prompt, without a tokenizer."""
        pipeline = policy.pipeline
        length = min(policy.max_text_tokens, self.index.get("tokens", policy.max_text_tokens))
        ids = torch.zeros(1, length, dtype=torch.long)
        if hasattr(pipeline, "text_encoder_2"):
            seen = ids[:, : pipeline.text_encoder.config.max_position_embeddings]
            pooled = pipeline.text_encoder(seen).pooler_output
            return {"text": pipeline.text_encoder_2(ids)[0][0], "pooled": pooled[0]}
        layers = inspect.signature(pipeline.encode_prompt).parameters.get("text_encoder_out_layers")
        if layers is not None:
            states = pipeline.text_encoder(ids, output_hidden_states=True, use_cache=False).hidden_states
            return {"text": torch.cat([states[layer] for layer in layers.default], dim=-1)[0]}
        length = TEMPLATE_TOKENS + IMAGE_TOKENS * len(example.references)
        inside = pipeline.text_encoder.model.language_model
        seen = torch.zeros(1, length, inside.config.hidden_size, dtype=policy.dtype)
        places = torch.zeros(3, 1, length, dtype=torch.long)
        return {"text": inside(inputs_embeds=seen, position_ids=places, use_cache=False).last_hidden_state[0]}


def _read_folder(folder: Path) -> tuple[dict[str, Config], dict[str, Any]]:
    """The configurations of a pipeline on disk, and its index."""
    index, configs = read_json(folder / "model_index.json"), {}
    for name, file in (("scheduler", "scheduler_config.json"), *((n, "config.json") for n in index)):
        if (folder / name / file).is_file():
            configs[name] = (*index[name], read_json(folder / name / file))
    tokens = [read_json(file).get("model_max_length") for file in folder.glob("tokenizer_2/tokenizer_config.json")]
    return configs, {**index, "tokens": tokens[0]} if tokens else index


def _add_adapter_beneath(transformer: Any) -> None:
    """Add UNO's own adapter, as where it is not fused."""
    linears: dict[str, Any] = _lora.block_linears(transformer)
    chosen = [(name, linear) for name, linear in linears.items() if name.endswith(UNO_TARGETS)]
    state = {f"{name}.lora_A.weight": torch.empty(UNO_RANK, linear.in_features) for name, linear in chosen}
    state |= {f"{name}.lora_B.weight": torch.empty(linear.out_features, UNO_RANK) for name, linear in chosen}
    _lora.add_frozen_adapter(transformer, state, "uno")


def fake_reward(spec: Spec, slot: str = "reward") -> nn.Module | None:
    """The model of a reward (or metric) of this package whose sizes are known, else None. It takes `pixel_values`."""
    parameters = inspect.signature(kind).parameters if (kind := exported(spec.use, slot)) is not None else {}
    path = str(spec.arguments.get("path", parameters["path"].default if "path" in parameters else ""))
    config = read_json(PACKAGED / "rewards.json").get(path)
    folder = Path(locate(path)) if path else Path()
    if (folder / "config.json").is_file():
        found = read_json(folder / "config.json")
        config = ("transformers", found["architectures"][0], found)
    return None if config is None else fake_model(config)


# ---- quantised weights


class _Product(torch.autograd.Function):
    """x W^T. For the backward pass it keeps the quantised weight, not the dense one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "StoredLinear") -> Tensor:
        ctx.layer = layer
        return x @ layer.dense(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.dense(gradients[0].dtype), None


class StoredLinear(nn.Linear):
    """A frozen linear layer whose weight takes as much memory as a quantised one."""

    def __init__(self, layer: nn.Linear, scheme: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        each, shared = BITS[scheme]
        count = layer.weight.numel()
        self.weight = nn.Parameter(torch.empty(int(count * each), dtype=torch.int8), requires_grad=False)
        scales = count // shared if shared else layer.out_features
        self.scales = nn.Parameter(torch.empty(scales, dtype=torch.float32), requires_grad=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantised weight."""
        return torch.empty(self.out_features, self.in_features, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        product = _Product.apply(input, self)
        return product if self.bias is None else product + self.bias.to(product.dtype)  # pyright: ignore


def store_quantized(transformer: nn.Module, scheme: str) -> None:
    """Replace the linear layers of the transformer, as diffusers' quantizers do."""
    for name, module in list(transformer.named_modules()):
        if type(module) is nn.Linear:
            parent, _, own = name.rpartition(".")
            setattr(transformer.get_submodule(parent), own, StoredLinear(module, scheme))
