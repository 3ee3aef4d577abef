from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from customized_grpo.policies import lora
from customized_grpo.policies.lora import LoraSettings

from . import tiny


class Operations(TorchDispatchMode):
    """Inside it the names of operations are kept, with the dtype of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen.append((func.overloadpacket.__name__, out.dtype))
        return out


def adapted(dtype: torch.dtype, alpha: float) -> Any:
    """A layer of a transformer whose adapter has changed it."""
    model: nn.Module = tiny.flux_parts()["transformer"].to(dtype)
    lora.make_trainable(model, "lora", LoraSettings(rank=4, alpha=alpha))
    layer = model.get_submodule("transformer_blocks.0.attn.to_q")
    draw = torch.Generator().manual_seed(1)
    for p in layer.parameters():
        p.data += p.requires_grad * 0.1 * torch.randn(p.shape, generator=draw)
    return layer


def passes(forward: Any, layer: nn.Module, dtype: torch.dtype) -> tuple[list[Tensor], list[tuple[str, torch.dtype]]]:
    """The output, its gradients by the input and the adapter, and the operations of the forward pass."""
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    trained = [p for p in layer.parameters() if p.requires_grad]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), Operations() as operations:
        out = forward(layer, x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *trained])], operations.seen


@pytest.mark.parametrize("alpha", [4.0, 6.0])
def test_in_bfloat16_a_layer_gives_the_bits_that_peft_gives_without_the_cast_to_float32(alpha):
    layer = adapted(torch.bfloat16, alpha)
    ours, did = passes(type(layer).forward, layer, torch.bfloat16)
    layer.cast_input_dtype_enabled = True
    theirs, does = passes(Linear.forward, layer, torch.bfloat16)
    assert all(map(torch.equal, ours, theirs))
    assert ("_to_copy", torch.float32) in does
    assert ("_to_copy", torch.float32) not in did
    assert ("mul" in dict(did)) == (alpha != 4)


@pytest.mark.parametrize("alpha", [4.0, 6.0])
def test_in_float32_the_adapter_is_added_to_the_weight(alpha):
    layer = adapted(torch.float32, alpha)
    ours, did = passes(type(layer).forward, layer, torch.float32)
    theirs, _ = passes(Linear.forward, layer, torch.float32)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    products = [name for name, _ in did if name.endswith("mm")]
    assert products == ["addmm", "addmm"]
    with torch.no_grad():
        x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
        assert torch.equal(layer(x), ours[0]), "sampling and training compute the same"


@torch.no_grad()
def test_an_adapter_that_is_off_costs_nothing():
    layer, x = adapted(torch.float32, 4.0), torch.randn(3, 32)
    with lora.adapter_off(layer, "lora"), Operations() as operations:
        out = layer(x)
    assert torch.equal(out, layer.base_layer(x))
    assert [name for name, _ in operations.seen] == ["t", "addmm"]


@torch.no_grad()
def test_a_merged_layer_is_left_to_peft():
    layer, x = adapted(torch.float32, 6.0), torch.randn(3, 32)
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before)
