"""peft's LoRA layer without the work that changes no result."""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def quicken(transformer: nn.Module) -> None:
    """Give the adapted layers of a transformer the forward pass below; a quantised layer only loses the cast.

    peft casts the input of every layer to float32, which autocast casts back.
    """
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            if type(layer) is Linear and not layer.lora_variant:
                layer.__class__ = _Linear


class _Linear(Linear):
    """An adapter of scale 0 is not computed, and one of scale 1 is not multiplied.

    In float32 the only adapter of a layer is added to the weight, as in `_Added`. In bfloat16 the sum would round the
    update away.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        names = [name for name in self.active_adapters if name in self.lora_A and self.scaling[name]]
        if (
            len(names) == len(self.lora_A) == 1
            and x.dtype == base.weight.dtype == torch.float32
            and not torch.is_autocast_enabled(x.device.type)
        ):
            down, up = self.lora_A[names[0]], self.lora_B[names[0]]
            if up.bias is None and isinstance(self.lora_dropout[names[0]], nn.Identity):
                added: Any = _Added.apply(x, base.weight, base.bias, down.weight, up.weight, self.scaling[names[0]])
                return added
        result = base(x)
        for name in names:
            change = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
            result = result + (change if self.scaling[name] == 1 else change * self.scaling[name])
        return result


class _Added(torch.autograd.Function):
    """x (W + scale B A)^T + bias, with W and the bias frozen: one product in place of three, in both directions.

    The sum is made again in the backward pass, because it is as large as W.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale = scale
        return F.linear(x, torch.addmm(weight, up, down, alpha=scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        by_input = gradient @ torch.addmm(weight, up, down, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        rows, x = gradient.flatten(0, -2), x.flatten(0, -2)
        by_down, by_up = (rows @ up * ctx.scale).T @ x, rows.T @ (x @ down.T * ctx.scale)
        return by_input, None, None, by_down, by_up, None
