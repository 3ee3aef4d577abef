"""Encoded prompts and references, kept by content so that nothing is encoded twice."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from customized_grpo.store import check_place, replacing

Row = dict[str, Tensor]
"""The conditioning of one example, or a part of it, without the batch axis."""


class EncodingCache:
    """Rows by key in host memory; the least recently used make room. A row larger than the limit is not kept.

    Args:
        limit: bytes in host memory.
        folder: of files that keep the rows beyond this process, one for each; None keeps none.

    Raises:
        UserError: if the folder cannot be made.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        if folder is not None:
            check_place(folder)
        self.limit, self.bytes, self.folder = limit, 0, folder
        self._rows: OrderedDict[Hashable, Row] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._rows or (self.folder is not None and self._file(key).is_file())

    def _file(self, key: Hashable) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()}.safetensors"

    def _made(self, key: Hashable, make: Callable[[], Row]) -> Row:
        """The row from its file, or a new one."""
        if self.folder is not None and (file := self._file(key)).is_file():
            try:
                return load_file(file)
            except (OSError, SafetensorError):
                pass  # damaged, and written again
        row = {name: value.detach().cpu() for name, value in make().items()}
        if self.folder is not None:
            with replacing(self._file(key)) as draft:
                save_file({name: value.contiguous() for name, value in row.items()}, draft)
        return row

    def get(self, key: Hashable, make: Callable[[], Row]) -> Row:
        """The row of `key`, made and kept if it is not there."""
        if key in self._rows:
            self._rows.move_to_end(key)
            return self._rows[key]
        row = self._made(key, make)
        self._rows[key], self.bytes = row, self.bytes + _bytes(row)
        while self.bytes > self.limit:
            self.bytes -= _bytes(self._rows.popitem(last=False)[1])
        return row


def _bytes(row: Row) -> int:
    return sum(value.numel() * value.element_size() for value in row.values())


SAMPLES = 8
"""Numbers of each tensor that tell weights apart."""


def identity(modules: Iterable[nn.Module], settings: object) -> str:
    """Equal for modules with equal weights under equal settings, from a few numbers of each weight."""
    state = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for module in modules:
        for name, value in module.state_dict().items():
            flat = value.detach().flatten()
            few = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].to(torch.float64).tolist()
            state.update(repr((name, tuple(value.shape), str(value.dtype), few)).encode())
    return state.hexdigest()


def digest(image: Image) -> bytes:
    """Equal for equal pictures."""
    state = hashlib.blake2b(repr((image.mode, image.size)).encode(), digest_size=16)
    state.update(image.tobytes())
    return state.digest()
