"""Data types shared between modules. All are frozen; shapes use the notation of docs/concepts.md.

P prompts, G generations per prompt, B = P * G rows (row b belongs to prompt b // G), K rewards, T inference steps,
S trained steps, N latent tokens, C channels.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar, overload

from PIL.Image import Image
from torch import Tensor

Conditioning: TypeAlias = Mapping[str, Tensor]
"""What a policy encoded from prompts and references. Every tensor has leading axis B; opaque outside its policy."""


@dataclass(frozen=True)
class Example:
    """One task: draw this subject as the prompt says."""

    id: str
    """Unique within a dataset; seeds every random draw made for this example."""
    prompt: str
    references: tuple[Image, ...]
    """One or more RGB pictures of the subject."""
    subject: str = ""
    """Class noun, such as "dog"."""
    masks: tuple[Image | None, ...] = ()
    """Per reference an "L" image, 255 on the subject; empty where there are none."""
    kind: str = ""
    """Kind of prompt, such as "accessory"; evaluations are broken down by it. Empty where it is unknown."""
    target: Image | None = None
    """A real image of what the prompt asks for, which rewards alone may see; None where there is none."""
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    """Reward to the factor of its weight for this example; 1 for the others."""


@dataclass(frozen=True)
class Rollout:
    """P * G images of one policy. What else the update needs from them is kept by a subclass of the objective."""

    images: Tensor
    """(B, 3, H, W) float32 in [0, 1]."""
    conditioning: Conditioning
    """Leading axis B."""
    previews: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor], kw_only=True)
    """By step the images, as above, that the model predicts there; empty unless `method.credit` asks for them."""

    def __len__(self) -> int:
        return len(next(iter(self.conditioning.values())))


@dataclass(frozen=True)
class Rewards:
    """Raw scores of the images of P groups."""

    values: Tensor
    """(P, G, K) float32, raw units, higher is better; NaN where a reward could not score."""
    names: tuple[str, ...]
    """K names, in column order."""
    credited: Tensor | None = None
    """(P, G, S, K) what of them each trained step is credited with; None if all of it."""


E = TypeVar("E", bound=Example, covariant=True)


class LazyExamples(Sequence[E]):
    """A sequence that says how one example is made; a slice makes a list of them."""

    @abstractmethod
    def example(self, index: int) -> E:
        """The example at an index, which may count from the end."""

    def all_kinds(self) -> list[str]:
        """The kind of each example; overridden where it is known without reading the images."""
        return [example.kind for example in self]

    @overload
    def __getitem__(self, index: int) -> E: ...
    @overload
    def __getitem__(self, index: slice) -> list[E]: ...
    def __getitem__(self, index: int | slice) -> E | list[E]:
        if isinstance(index, slice):
            return [self.example(n) for n in range(*index.indices(len(self)))]
        return self.example(index)
