"""A frozen transformer in eight or four bits, through diffusers' own quantizers."""

from importlib.util import find_spec
from typing import Any, Literal

import torch

from customized_grpo.errors import UserError
from customized_grpo.shell import install

Quantize = Literal["none", "int8", "nf4"]

LIBRARIES: dict[str, str] = {"int8": "torchao", "nf4": "bitsandbytes"}


def check_quantize(scheme: str, trainable: str) -> None:
    """Raise UserError for a scheme that does not exist, has nothing frozen to store, or cannot run here."""
    if scheme == "none":
        return
    if scheme not in LIBRARIES:
        raise UserError(f"policy.quantize is '{scheme}'; it must be none, {' or '.join(LIBRARIES)}.")
    if trainable == "full":
        raise UserError(
            f"policy.quantize is {scheme}, but with trainable: full no weight is frozen; train a LoRA, or leave it out."
        )
    if find_spec(LIBRARIES[scheme]) is None:
        raise UserError(f"policy.quantize is {scheme}, which needs {LIBRARIES[scheme]}; {install('quantized')}.")
    if scheme == "nf4" and not torch.cuda.is_available():
        raise UserError("policy.quantize is nf4, which diffusers runs on GPUs only, and there is none; use int8.")


def quantization(scheme: Quantize, dtype: torch.dtype) -> dict[str, Any]:
    """What a pipeline's `from_pretrained` takes to quantise the linear layers of its transformer while it loads.

    Args:
        scheme: "int8" rounds each row of a weight to 255 levels (torchao, weights only); "nf4" is QLoRA's four-bit
            float in blocks of 64 (bitsandbytes); "none" is nothing.
        dtype: that weights are multiplied in.

    Source: Dettmers et al. 2023 (arXiv 2305.14314) for nf4.
    """
    if scheme == "none":
        return {}
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

    if scheme == "int8":
        from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports] - an extra

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping={"transformer": config})}
