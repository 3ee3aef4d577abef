"""Random numbers as a function of what they are for.

A draw depends on its key alone: (seed, iteration, example, generation, step). So the number of processes, the chunk
size and a resume change no draw, and no generator state has to be carried along.
"""

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Key = tuple[int | str, ...]


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the key: equal keys give equal draws, on any machine."""
    return torch.Generator().manual_seed(_seed(key))


def normal(shape: Sequence[int], keys: Sequence[Key]) -> Tensor:
    """Standard normal noise, shape (len(keys), *shape), float32 on CPU: row i depends on keys[i] alone."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(*key)) for key in keys])


def moved(noise: Tensor, device: torch.device) -> Tensor:
    """On the device; the host does not wait for the copy."""
    return noise.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else noise.to(device)


def seed_global(*key: int | str) -> None:
    """Seed the global generators of torch (on all devices), numpy and Python by the key, for code that is not ours.

    No draw of this package uses them.
    """
    seed = _seed(key)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the legacy generator is the global one
    random.seed(seed)


def _seed(key: Key) -> int:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
