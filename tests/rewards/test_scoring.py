import math

import pytest
import torch

import fakes
from customized_grpo.errors import UserError
from customized_grpo.rewards.scoring import named, score, score_groups


def test_rows_stay_with_their_examples() -> None:
    seen = []

    def watch(images, examples):
        seen.extend(example.id for example in examples)
        return torch.arange(float(len(examples)))

    rewards = score_groups(torch.rand(6, 3, 2, 2), fakes.examples(2), {"watch": watch}, 3)
    assert seen == ["e0"] * 3 + ["e1"] * 3
    assert rewards.values.shape == (2, 3, 1)
    assert rewards.values[1, :, 0].tolist() == [3, 4, 5]
    assert rewards.names == ("watch",)


def test_what_is_not_finite_is_not_scored() -> None:
    scores = score(torch.rand(2, 3, 2, 2), fakes.examples(2), {"a": lambda i, e: torch.tensor([math.inf, 1.0])})
    assert scores[:, 0].isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (torch.zeros(2, 1), r"returned shape \(2, 1\) for 2 images; it must return a tensor of shape \(2,\)"),
        ([1.0, 2.0], "returned list for 2 images"),
        (torch.tensor(1.0), r"returned shape \(\)"),
    ],
)
def test_a_wrong_answer_names_the_reward(answer, sentence: str) -> None:
    def odd(images, examples):
        return answer

    with pytest.raises(UserError, match=f"test_scoring:.*odd {sentence}"):
        score(torch.rand(2, 3, 2, 2), fakes.examples(2), {"odd": odd})


def test_a_failure_names_the_reward_and_the_example() -> None:
    def broken(images, examples):
        raise KeyError("weights")

    with pytest.raises(UserError, match=r"test_scoring:.*broken failed on 2 images.*'e0': KeyError: 'weights'"):
        score(torch.rand(2, 3, 2, 2), fakes.examples(2), {"broken": broken})


def test_names_come_from_the_reward_and_must_differ() -> None:
    assert list(named([fakes.red, fakes.dark])) == ["red", "dark"]
    with pytest.raises(UserError, match="Two rewards are called 'red'"):
        named([fakes.red, fakes.red])
    with pytest.raises(UserError, match="No reward"):
        named([])
