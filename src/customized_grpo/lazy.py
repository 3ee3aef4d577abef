"""Sequences of examples that are made when asked for."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

from customized_grpo.types import Example

E = TypeVar("E", bound=Example, covariant=True)


class LazyExamples(Sequence[E]):
    """A sequence that says how one example is made; a slice makes a list of them."""

    @abstractmethod
    def example(self, index: int) -> E:
        """The example at an index, which may count from the end."""

    @overload
    def __getitem__(self, index: int) -> E: ...
    @overload
    def __getitem__(self, index: slice) -> list[E]: ...
    def __getitem__(self, index: int | slice) -> E | list[E]:
        if isinstance(index, slice):
            return [self.example(n) for n in range(*index.indices(len(self)))]
        return self.example(index)
