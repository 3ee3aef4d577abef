"""Encoded prompts and references, kept by content so that nothing is encoded twice."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable

from PIL.Image import Image
from torch import Tensor

Row = dict[str, Tensor]
"""The conditioning of one example, or a part of it, without the batch axis."""


class EncodingCache:
    """Rows by key in host memory; the least recently used make room. A row larger than the limit is not kept."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._rows: OrderedDict[Hashable, Row] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._rows

    def get(self, key: Hashable, make: Callable[[], Row]) -> Row:
        """The row of `key`, made and kept if it is not there."""
        if key in self._rows:
            self._rows.move_to_end(key)
            return self._rows[key]
        row = {name: value.detach().cpu() for name, value in make().items()}
        self._rows[key], self.bytes = row, self.bytes + _bytes(row)
        while self.bytes > self.limit:
            self.bytes -= _bytes(self._rows.popitem(last=False)[1])
        return row


def _bytes(row: Row) -> int:
    return sum(value.numel() * value.element_size() for value in row.values())


def digest(image: Image) -> bytes:
    """Equal for equal pictures."""
    state = hashlib.blake2b(repr((image.mode, image.size)).encode(), digest_size=16)
    state.update(image.tobytes())
    return state.digest()
