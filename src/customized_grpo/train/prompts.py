"""Which prompts an iteration draws."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch

from customized_grpo.errors import UserError, nearest
from customized_grpo.randomness import generator
from customized_grpo.structures import Example, LazyExamples


class PromptStream:
    """An endless stream of places in a data set, in shuffled epochs of all examples, or of each kind of prompt.

    An entry is a function of the seed and its index alone, so that processes and resumed runs agree on it.

    Args:
        dataset: of the examples.
        seed: of the run.
        kinds: how often each kind is drawn in a round (stratified sampling); {} draws them by their shares of the data.

    Raises:
        UserError: if the kinds are not those of the data, or none is drawn.
    """

    def __init__(self, dataset: Sequence[Example], seed: int, kinds: Mapping[str, int] | None = None) -> None:
        self.seed = seed
        self.pools: dict[str, Sequence[int]] = _by_kind(dataset, kinds) if kinds else {"": range(len(dataset))}
        counts = {kind: kinds[kind] for kind in self.pools} if kinds else {"": 1}
        spread = sorted(((n + 0.5) / count, kind, n) for kind, count in counts.items() for n in range(count))
        self.round = [(kind, n, counts[kind]) for _, kind, n in spread]
        """Kind, its rank among those of its kind and their number, for each draw of a round; evenly spread."""

    def __getitem__(self, index: int) -> int:
        turn, place = divmod(index, len(self.round))
        kind, rank, count = self.round[place]
        pool = self.pools[kind]
        epoch, place = divmod(turn * count + rank, len(pool))
        return pool[int(_order(self.seed, epoch, kind, len(pool))[place])]


@lru_cache(maxsize=40)  # two epochs of each of 20 kinds: the order of a large data set is not made for every draw
def _order(seed: int, epoch: int, kind: str, count: int) -> torch.Tensor:
    purpose = ("order", seed, epoch, kind) if kind else ("order", seed, epoch)
    return torch.randperm(count, generator=generator(*purpose))


def _by_kind(dataset: Sequence[Example], wanted: Mapping[str, int]) -> dict[str, Sequence[int]]:
    """The places of each kind that is drawn."""
    found = dataset.all_kinds() if isinstance(dataset, LazyExamples) else [example.kind for example in dataset]
    pools: dict[str, list[int]] = {}
    for place, kind in enumerate(found):
        pools.setdefault(kind or "none", []).append(place)
    known = f"the kinds of the training examples are {', '.join(sorted(pools))}"
    for kind in wanted:
        if kind not in pools:
            raise UserError(f"training.kinds: there is no kind '{kind}'; {known}.{nearest(kind, pools)}")
    if forgotten := sorted(pools.keys() - wanted.keys()):
        raise UserError(f"training.kinds does not say how often to draw {', '.join(forgotten)}; {known}. 0 draws none.")
    if not any(wanted.values()):
        raise UserError("training.kinds draws no kind of prompt; give at least one a number above 0.")
    return {kind: pools[kind] for kind in sorted(pools) if wanted[kind]}
