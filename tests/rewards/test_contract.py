import math
import os
import sys
import tempfile
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from customized_grpo.errors import UserError
from customized_grpo.rewards.contract import (
    call_reward,
    check_reward,
    check_scores,
    frozen,
    import_path,
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


def spoil_pixels(images, examples):
    images.mul_(0)
    return brightness(images, examples)


def spoil_through_numpy(images, examples):
    images.numpy()[:] = 0
    return brightness(images, examples)


def spoil_data(images, examples):
    images.data.fill_(0)
    images.requires_grad_()
    return brightness(images, examples)


def spoil_examples(images, examples):
    examples[0].references[0].paste((0, 0, 0), (0, 0, 40, 40))
    examples[0].references[0].thumbnail((4, 4))
    examples[0].masks[0].putpixel((0, 0), 255)
    object.__setattr__(examples[0], "prompt", "")
    examples.pop()
    return brightness(images, examples)


@pytest.mark.parametrize("spoiler", [spoil_pixels, spoil_through_numpy, spoil_data, spoil_examples])
def test_a_reward_works_in_place_on_copies_of_its_own(images, spoiler):
    example = replace(tiny.example(), masks=(Image.new("L", (40, 40)),))
    before = images.clone(), example.references[0].tobytes(), example.masks[0].tobytes()
    call_reward(spoiler, images, [example] * 3)
    assert torch.equal(images, before[0])
    assert not images.requires_grad
    assert (example.references[0].tobytes(), example.masks[0].tobytes()) == before[1:]
    assert (example.references[0].size, example.prompt) == ((40, 40), tiny.example().prompt)


def test_rows_of_one_example_still_hold_one_object(images):
    first, second = tiny.example("1"), tiny.example("2")
    seen = []
    call_reward(lambda images, examples: seen.extend(examples) or images.sum((1, 2, 3)), images, [first, second, first])
    assert seen[0] is seen[2]
    assert seen[0] is not seen[1]
    assert [example.id for example in seen] == ["1", "2", "1"]


def test_the_names_of_a_reward_with_arguments_are_its_own():
    bound = partial(partial(brightness, scale=2), more=3)
    assert (reward_name(bound), import_path(bound)) == ("brightness", "rewards.test_contract:brightness")


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (torch.tensor([1, 0, 2]), [1.0, 0.0, 2.0]),
        (torch.tensor([True, False, True]), [1.0, 0.0, 1.0]),
        (torch.ones(3, dtype=torch.bfloat16, requires_grad=True), [1.0, 1.0, 1.0]),
        (torch.tensor([1e300, 2.0, 3.0], dtype=torch.float64), [math.nan, 2.0, 3.0]),
        (torch.tensor([3e38, -math.inf, math.nan]), [3e38, math.nan, math.nan]),
    ],
)
def test_numbers_of_every_kind_are_scores(images, scores, expected):
    found = call_reward(lambda images, examples: scores, images, [tiny.example()] * 3)
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)
    assert (found.dtype, found.requires_grad) == (torch.float32, False)
    assert found.data_ptr() != scores.data_ptr()


@pytest.mark.parametrize(
    ("scores", "seen"),
    [
        (lambda: torch.ones(3, device="meta"), "a meta tensor"),
        (lambda: torch.ones(3).to_sparse(), "a sparse or nested tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(1)] * 3, layout=torch.jagged), "a sparse or nested tensor"),
        (lambda: torch.ones(3, dtype=torch.complex64), "complex numbers"),
        (lambda: torch.ones(3).numpy(), "ndarray"),
        (lambda: None, "NoneType"),
        (lambda: 1.0, "float"),
    ],
)
def test_what_is_no_score_names_the_reward(images, scores, seen):
    def odd(images, examples):
        return scores()

    with pytest.raises(UserError, match=rf"The reward rewards\.test_contract:.*odd returned {seen} for 3 images"):
        call_reward(odd, images, [tiny.example()] * 3)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_scores_are_refused(images):
    with pytest.raises(UserError, match="returned a quantized tensor"):
        call_reward(
            lambda i, e: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.quint8), images, [tiny.example()] * 3
        )


def into_a_folder_that_goes():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)


CHANGES = {
    "the working directory": lambda: os.chdir("/"),
    "working directory": into_a_folder_that_goes,
    "whether gradients are recorded": lambda: torch.set_grad_enabled(False),
    "gradients are recorded": lambda: torch.no_grad().__enter__(),
    "the default dtype": lambda: torch.set_default_dtype(torch.float64),
    "the default device": lambda: torch.set_default_device("meta"),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
}


def process_state():
    return (
        Path.cwd(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_what_a_reward_changes_for_the_whole_process_is_put_back_and_said(images, what, fails):
    def careless(images, examples):
        scores = brightness(images, examples)
        CHANGES[what]()
        return scores if not fails else 1 / 0

    before = process_state()
    sentence = "failed on 3 images" if fails else f"changed .*{what} for the whole process"
    with pytest.raises(UserError, match=rf"The reward rewards\.test_contract:.*careless {sentence}"):
        call_reward(careless, images, [tiny.example()] * 3)
    assert process_state() == before
    assert torch.ones(1).device.type == "cpu"


def test_gradients_may_be_off_around_a_reward_and_on_inside(images):
    @torch.enable_grad()
    def saliency(images, examples):
        images.requires_grad_()
        return torch.autograd.grad(brightness(images, examples).sum(), images)[0].mean((1, 2, 3))

    with torch.no_grad():
        assert call_reward(saliency, images, [tiny.example()] * 3).shape == (3,)


def test_a_changed_warnings_filter_is_put_back_without_a_word(images):
    def loud(images, examples):
        warnings.simplefilter("ignore")
        return brightness(images, examples)

    before = list(warnings.filters)
    call_reward(loud, images, [tiny.example()] * 3)
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


@pytest.mark.parametrize("code", [0, None, "usage: ..."])
def test_a_reward_that_exits_is_an_error(images, code):
    def leaving(images, examples):
        sys.exit(code)

    with pytest.raises(UserError, match=r"The reward .*leaving called sys\.exit\("):
        call_reward(leaving, images, [tiny.example()] * 3)


def test_an_interrupt_stays_one_and_says_where(images):
    def interrupted(images, examples):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"The reward .*interrupted was interrupted"):
        call_reward(interrupted, images, [tiny.example()] * 3)


def test_check_reward_lets_a_reward_work_in_place(images):
    def squared(images, examples):
        return brightness(images.square_(), examples)

    check_reward(squared, images, [tiny.example()] * 3)


def test_device_zero_is_not_left_out(monkeypatch):
    """YAML gives `device: 0` as a number; left out, a reward takes the process's current GPU."""
    model, asked = torch.nn.Linear(1, 1), []
    monkeypatch.setattr(model, "to", lambda device: asked.append(device) or model)
    for device in (0, "cpu"):
        frozen(model, device)
    assert asked == [0, "cpu"]
