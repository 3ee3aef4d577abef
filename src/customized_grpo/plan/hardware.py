"""GPUs by name: memory and peak rates, from the vendor's data sheets."""

from typing import NamedTuple

import torch

from customized_grpo.errors import UserError, nearest


class Gpu(NamedTuple):
    """One GPU."""

    gib: float
    """GiB of memory, as the driver reports it."""
    bfloat16: float
    """Peak TFLOP/s of dense matrix products with float32 accumulation."""
    float32: float
    """Peak TFLOP/s in float32 without TF32, which PyTorch uses for matrix products only if asked to."""

    @property
    def usable(self) -> int:
        """Bytes for tensors: all but 1 GiB for the CUDA context and 5 % that the allocator cannot use."""
        return int((self.gib * 0.95 - 1) * 2**30)

    def rate(self, dtype: torch.dtype) -> float:
        """Peak operations per second."""
        return 1e12 * (self.bfloat16 if dtype == torch.bfloat16 else self.float32)


GPUS = {
    "3090": Gpu(24, 71, 35.6),
    "4090": Gpu(24, 165, 82.6),
    "5090": Gpu(32, 209, 104.8),
    "a10g": Gpu(22.5, 70, 31),
    "l4": Gpu(22.5, 121, 30),
    "a6000": Gpu(48, 155, 38.7),
    "l40s": Gpu(45, 362, 91.6),
    "a100-40": Gpu(40, 312, 19.5),
    "a100-80": Gpu(80, 312, 19.5),
    "h100-80": Gpu(79.6, 989, 67),
    "h200": Gpu(140, 989, 67),
    "b200": Gpu(179, 2250, 75),
}


def find_gpu(name: str) -> Gpu:
    """The GPU with this name.

    Raises:
        UserError: with the nearest name, if there is none.
    """
    if name.lower() not in GPUS:
        alike = [known for known in GPUS if known.startswith(name.lower())] or GPUS
        raise UserError(
            f"There is no GPU '{name[:40]}' in the table; give one of {', '.join(GPUS)}.{nearest(name, alike)}"
        )
    return GPUS[name.lower()]
