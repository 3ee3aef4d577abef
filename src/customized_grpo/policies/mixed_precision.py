"""What autocast leaves undone, for small models in bfloat16."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,  # pyright: ignore[reportPrivateUsage] - nothing public tells the active modes
)


class MixedPrecision(TorchFunctionMode):
    """Context for use with autocast: norms in the dtype of their input and, on a CPU, attention written out.

    Autocast leaves the float32 scale of an RMS norm as it is, which keeps PyTorch from its fused norm, with a warning.
    PyTorch's flash kernel for CPUs is slow backwards at a hundred tokens: written out as two matrix products and a
    softmax, a training step of the tiny transformer is 1.7 times as fast. Masks and dropout are PyTorch's.

    Args:
        device_type: "cpu", "cuda", ...
    """

    writes_out_attention: ClassVar[bool] = True
    """Off where a CPU only stands in for a GPU."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.on_cpu = device_type == "cpu" and self.writes_out_attention

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.rms_norm:
            return _norm(*args, **kwargs)
        plain = func is F.scaled_dot_product_attention and self.on_cpu and not kwargs.get("is_causal")
        if plain and kwargs.get("attn_mask") is None and not kwargs.get("dropout_p") and len(args) <= 3:
            inputs = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return _attend(inputs["query"], inputs["key"], inputs["value"], kwargs.get("scale"))
        return func(*args, **kwargs)


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """`torch.utils.checkpoint.checkpoint`, which also restores `MixedPrecision` for the recomputation.

    PyTorch restores autocast and the random state, but no function modes, so the recomputation would run other
    operations than the forward pass.

    Args:
        function: whose activations are recomputed in the backward pass, such as a block of a transformer.
        args: of `function`.
    """
    modes = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, MixedPrecision)]

    @contextmanager
    def recomputation() -> Iterator[None]:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            yield

    return torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputation())
    )


def _norm(input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return F.rms_norm(input, normalized_shape, None if weight is None else weight.to(input.dtype), eps)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return (query @ key.transpose(-1, -2) * factor).softmax(-1).to(value.dtype) @ value
