"""Random numbers as a function of what they are for.

A draw depends on its key alone: (seed, iteration, example, generation, step). So a result does not depend on the
number of processes, the chunk size, or a resume, and no generator state has to be carried along.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Key = tuple[int | str, ...]


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the key: equal keys give equal draws, on any machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(shape: Sequence[int], keys: Sequence[Key]) -> Tensor:
    """Standard normal noise, shape (len(keys), *shape), float32 on CPU: row i depends on keys[i] alone."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(*key)) for key in keys])
