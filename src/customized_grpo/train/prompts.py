"""Which prompts an iteration draws."""

from collections.abc import Sequence

import torch

from customized_grpo.errors import UserError
from customized_grpo.randomness import generator
from customized_grpo.structures import Example, LazyExamples


class PromptStream:
    """An endless stream of places in a data set: shuffled epochs of all, or of each kind in turn.

    An entry is a function of the seed and its index alone, so that processes and resumed runs agree on it.

    Args:
        dataset: of the examples.
        seed: of the run.
        balance_kinds: take the kinds of prompts in turn (stratified sampling) in place of their shares of the data.

    Raises:
        UserError: if kinds are to be balanced and there are fewer than two.
    """

    def __init__(self, dataset: Sequence[Example], seed: int, balance_kinds: bool = False) -> None:
        self.seed = seed
        self.pools: dict[str, Sequence[int]] = {"": range(len(dataset))}
        if balance_kinds:
            self.pools = _by_kind(dataset)

    def __getitem__(self, index: int) -> int:
        turn, place = divmod(index, len(self.pools))
        kind, pool = list(self.pools.items())[place]
        epoch, rank = divmod(turn, len(pool))
        purpose = ("order", self.seed, epoch, kind) if kind else ("order", self.seed, epoch)
        return pool[int(torch.randperm(len(pool), generator=generator(*purpose))[rank])]


def _by_kind(dataset: Sequence[Example]) -> dict[str, Sequence[int]]:
    kinds = dataset.all_kinds() if isinstance(dataset, LazyExamples) else [example.kind for example in dataset]
    pools: dict[str, list[int]] = {}
    for place, kind in enumerate(kinds):
        pools.setdefault(kind or "none", []).append(place)
    if len(pools) < 2:
        raise UserError(
            f"training.balance_kinds: all {len(kinds)} training examples are of the kind '{kinds[0]}'; give the "
            "examples at least two kinds, or set it to false."
        )
    return dict(sorted(pools.items()))
