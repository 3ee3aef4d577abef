from dataclasses import replace

import pytest
import torch

import fakes
from customized_grpo.errors import UserError
from customized_grpo.randomness import generator
from customized_grpo.train.prompts import PromptStream


def of_kinds(*kinds: str) -> list:
    return [replace(example, kind=kind) for example, kind in zip(fakes.examples(len(kinds)), kinds, strict=True)]


def test_epochs_are_shuffled_as_they_always_were() -> None:
    stream = PromptStream(fakes.examples(6), seed=3)
    for epoch in range(3):
        order = torch.randperm(6, generator=generator("order", 3, epoch)).tolist()
        assert [stream[6 * epoch + rank] for rank in range(6)] == order


def test_kinds_in_turn_and_each_in_its_own_epochs() -> None:
    stream = PromptStream(of_kinds("place", "place", "colour", "place", "", "place"), seed=0, balance_kinds=True)
    drawn = [stream[index] for index in range(36)]
    assert set(drawn[0::3]) == {2}  # colour, none, place: by name
    assert set(drawn[1::3]) == {4}
    places = drawn[2::3]
    epochs = [places[i : i + 4] for i in range(0, 12, 4)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 3, 5]] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = PromptStream(of_kinds("place", "place", "colour", "place", "", "place"), seed=1, balance_kinds=True)
    assert [other[index] for index in range(2, 36, 3)] != places


def test_one_kind_cannot_be_balanced() -> None:
    with pytest.raises(UserError, match=r"all 6 training examples are of the kind ''; give the examples at least two"):
        PromptStream(fakes.examples(6), seed=0, balance_kinds=True)
