import pytest
import torch

from customized_grpo.errors import UserError
from customized_grpo.rewards.contract import (
    check_reward,
    check_scores,
    in_batches,
    once_per_example,
    reference_similarity,
    reward_name,
)
from rewards import tiny


def brightness(images, examples):
    return images.mean((1, 2, 3))


class Named:
    name = "identity"

    def __call__(self, images, examples):
        return brightness(images, examples)


def test_a_good_reward_passes(images):
    check_reward(brightness, images, [tiny.example()] * 3)


def test_check_reward_names_what_is_wrong(images):
    examples = [tiny.example()] * 3
    calls = iter(range(9))
    cases = {
        "must return a tensor of shape": lambda images, examples: images.mean(),
        "returned list": lambda images, examples: [0.0] * len(images),
        "must be deterministic": lambda images, examples: brightness(images, examples) + next(calls),
        "rows must not mix": lambda images, examples: torch.arange(3.0) + brightness(images, examples),
    }
    for sentence, reward in cases.items():
        with pytest.raises(UserError, match=sentence):
            check_reward(reward, images, examples)
    with pytest.raises(UserError, match="two images or more"):
        check_reward(brightness, images[:1], examples[:1])


def test_nan_is_a_legal_score(images):
    check_reward(lambda images, examples: torch.full((3,), torch.nan), images, [tiny.example()] * 3)


def test_scores_become_float32_without_gradient():
    scores = check_scores(torch.ones(2, dtype=torch.float64, requires_grad=True), brightness, 2)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


def test_once_per_example_computes_each_once_and_keeps_rows_in_place():
    first, second = tiny.example("1"), tiny.example("2")
    seen = []

    def compute(distinct):
        seen.extend(example.id for example in distinct)
        return torch.tensor([float(example.id) for example in distinct])

    rows = once_per_example([second, first, first, second], compute)
    assert rows.tolist() == [2, 1, 1, 2]
    assert seen == ["2", "1"]


def test_in_batches_is_the_whole():
    sizes = []
    rows = torch.arange(10.0).view(5, 2)
    result = in_batches(lambda chunk: sizes.append(len(chunk)) or chunk.sum(1), rows, 2)
    assert torch.equal(result, rows.sum(1))
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(("reduce", "expected"), [("mean", [0.5, 0.0]), ("max", [1.0, 0.0])])
def test_reference_similarity_by_hand(reduce, expected):
    """Row 0 equals the first of its two references and is orthogonal to the second; row 1 is so to its only one."""
    directions = {40: [1.0, 0.0], 48: [0.0, 1.0]}  # by the width of the picture

    def embed(pictures):
        return torch.tensor([directions[picture.width] for picture in pictures])

    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    examples = [tiny.example("1", references=2), tiny.example("2", references=1)]
    scores = reference_similarity(rows, examples, embed, lambda example: list(example.references), reduce)
    assert scores.tolist() == expected


def test_names():
    assert (reward_name(brightness), reward_name(Named())) == ("brightness", "identity")
