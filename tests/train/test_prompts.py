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


def test_the_order_of_an_epoch_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, order = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda count, **more: made.append(count) or order(count, **more))
    stream = PromptStream(fakes.examples(6), seed=12345)
    assert len({stream[index] for index in range(12)}) == 6
    assert made == [6, 6]


def test_kinds_in_turn_and_each_in_its_own_epochs() -> None:
    data, kinds = of_kinds("place", "place", "colour", "place", "", "place"), {"place": 2, "colour": 1, "none": 1}
    stream = PromptStream(data, 0, kinds)
    drawn = [stream[index] for index in range(24)]
    assert [data[place].kind for place in drawn[:4]] == ["place", "colour", "", "place"]  # spread, then by name
    assert {*drawn[1::4]} == {2}
    assert {*drawn[2::4]} == {4}
    places = [place for n, place in enumerate(drawn) if n % 4 in (0, 3)]
    epochs = [places[i : i + 4] for i in range(0, 12, 4)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 3, 5]] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = PromptStream(data, 1, kinds)
    assert [other[index] for index in range(24)] != drawn
    without = PromptStream(data, 0, {**kinds, "none": 0})
    assert [data[without[index]].kind for index in range(6)] == ["place", "colour", "place"] * 2


@pytest.mark.parametrize(
    ("kinds", "problem"),
    [
        ({"place": 1, "colr": 1}, "no kind 'colr'; the kinds of the training examples are colour, place.*'colour'"),
        ({"place": 1}, "does not say how often to draw colour; .* 0 draws none"),
        ({"place": 0, "colour": 0}, "draws no kind of prompt; give at least one"),
    ],
)
def test_other_kinds_are_refused(kinds: dict[str, int], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        PromptStream(of_kinds("place", "colour"), 0, kinds)
