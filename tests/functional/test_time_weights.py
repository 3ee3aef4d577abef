import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from customized_grpo.functional.time_weights import (
    by_loop_index,
    constant,
    cosine,
    fitted_weights,
    linear,
    piecewise,
    reversed_,
    sigmoid_crossover,
    tabulated,
)

CASES = json.loads((Path(__file__).parents[1] / "vectors" / "tdw.json").read_text())["cases"]
PROGRESS = torch.arange(25, dtype=torch.float64) / 25


@pytest.mark.parametrize("case", [c for c in CASES if c["inputs"]["kind"] == "schedule"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_published_schedule(case, dtype):
    i, o = case["inputs"], case["outputs"]
    row = sigmoid_crossover(torch.tensor([i["t"]], dtype=dtype) / i["num_timesteps"])
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert_close(row, torch.tensor([[o["w_prompt"], o["w_id"]]], dtype=dtype), atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", [c for c in CASES if c["inputs"]["kind"] == "perm_all_strategy"])
def test_published_shuffled_steps(case):
    o, steps = case["outputs"], torch.tensor(case["outputs"]["true_steps"])
    true = sigmoid_crossover(steps.double() / 25)[:, 0]
    assert_close(true, torch.tensor(o["w_prompt_by_true_step"], dtype=torch.float64), atol=1e-10, rtol=0)

    # We keep steps ascending: `place` is where the released loop trains each of them.
    ascending, place = steps.sort()
    ours = by_loop_index(ascending.double() / 25, permutation=place)[:, 0]
    as_shipped = torch.tensor(o["w_prompt_as_shipped"], dtype=torch.float64)
    assert_close(ours, as_shipped[place], atol=1e-10, rtol=0)


def test_by_loop_index_gives_every_step_the_same_weight_on_average():
    progress = torch.arange(14, dtype=torch.float64) / 25
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([by_loop_index(progress, generator=g)[:, 0] for _ in range(2000)])
    assert_close(drawn.mean(0), torch.full((14,), 0.60, dtype=torch.float64), atol=0.015, rtol=0)
    assert drawn.std(0).min() > 0.1


@pytest.mark.parametrize("num_steps", [8, 10, 25, 28, 50, 75, 100])
def test_tdw_crosses_at_the_same_progress_for_any_number_of_steps(num_steps):
    progress = torch.arange(num_steps) / num_steps
    prompt = sigmoid_crossover(progress)[:, 0]
    tdw_step = 25 * torch.arange(num_steps, dtype=torch.float64) / num_steps
    assert (prompt[tdw_step < 6 - 1e-9] == 0.7).all()
    assert (prompt[tdw_step >= 22] == 0.5).all()
    middle = (tdw_step > 6) & (tdw_step < 22 - 1e-9)
    assert_close(prompt[middle].double(), 0.3 + 0.4 * torch.sigmoid(-0.8 * (tdw_step[middle] - 10)), atol=1e-6, rtol=0)


SCHEDULES = {
    "constant": lambda p: constant(p, weights=(0.4, 0.6)),
    "sigmoid_crossover": sigmoid_crossover,
    "linear": linear,
    "cosine": cosine,
    "piecewise": piecewise,
    "tabulated": lambda p: tabulated(p, grid=(0.0, 0.5, 1.0), weights=((0.9, 0.1), (0.2, 0.8), (0.5, 0.5))),
    "reversed_": reversed_,
    "by_loop_index": lambda p: by_loop_index(p, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_schedule_gives_rows_that_sum_to_one(schedule, dtype):
    weights = schedule(PROGRESS.to(dtype))
    assert weights.shape == (25, 2)
    assert weights.dtype == dtype
    assert_close(weights.sum(-1), torch.ones(25, dtype=dtype))
    assert (weights >= 0).all()


def test_prompt_comes_first_and_reversed_identity_does():
    assert (sigmoid_crossover(PROGRESS)[:6, 0] > 0.6).all()
    assert_close(reversed_(PROGRESS), sigmoid_crossover(1 - PROGRESS))
    early = reversed_(PROGRESS)[4:10]
    assert (early[:, 1] > early[:, 0]).all()
    assert_close(reversed_(PROGRESS, schedule=linear, first=(1.0, 0.0), last=(0.0, 1.0))[:, 0], PROGRESS)


def test_schedules_by_hand():
    p = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert_close(linear(p, first=(1.0, 0.0, 0.0), last=(0.0, 0.0, 2.0))[:, 2], torch.tensor([0.0, 0.5, 1.0, 2.0]))
    assert_close(cosine(p, first=(1.0, 0.0), last=(0.0, 1.0))[:, 1], torch.tensor([0.0, 0.1464466, 0.5, 1.0]))
    rows = piecewise(p, boundaries=(0.25, 0.75), weights=((1.0, 0.0), (0.5, 0.5), (0.0, 1.0)))
    assert_close(rows[:, 0], torch.tensor([1.0, 0.5, 0.5, 0.0]))
    table = tabulated(p, grid=(0.25, 0.75), weights=((1.0, 0.0), (0.0, 1.0)))
    assert_close(table[:, 0], torch.tensor([1.0, 1.0, 0.5, 0.0]))
    three = tabulated(p, grid=(0.0, 0.5, 1.0), weights=((1.0, 0.0), (0.0, 1.0), (0.6, 0.4)))
    assert_close(three[:, 0], torch.tensor([1.0, 0.5, 0.0, 0.6]))
    assert_close(tabulated(p, grid=(0.3,), weights=((0.2, 0.8),)), constant(p, weights=(0.2, 0.8)))


def test_the_paper_changes_over_at_its_steps_6_and_22():
    just_before_and_at = torch.tensor([0.2399, 0.24, 0.8799, 0.88], dtype=torch.float64)
    crossover = 0.3 + 0.4 * torch.sigmoid(-20 * (just_before_and_at - 0.4))
    expected = torch.tensor([0.7, crossover[1], crossover[2], 0.5], dtype=torch.float64)
    assert_close(sigmoid_crossover(just_before_and_at)[:, 0], expected)
    rows = torch.tensor([[0.7, 0.3], [0.3, 0.7], [0.3, 0.7], [0.5, 0.5]], dtype=torch.float64)
    assert_close(piecewise(just_before_and_at), rows)
    ends = torch.tensor([[0.7, 0.3], [0.3, 0.7]], dtype=torch.float64)
    for schedule in (linear, cosine):
        assert_close(schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)), ends)


def test_weights_are_on_the_device_of_the_progress():
    assert constant(torch.zeros(3, device="meta"), weights=(0.5, 0.5)).device.type == "meta"


def test_by_loop_index_follows_its_generator():
    drawn = [by_loop_index(PROGRESS, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_by_loop_index_hands_settings_on():
    place = torch.tensor([2, 0, 1])
    looked_up = by_loop_index(
        PROGRESS[:3], num_inference_steps=4, schedule=linear, permutation=place, first=(1.0,), last=(0.0,)
    )
    assert_close(looked_up[:, 0], torch.tensor([0.5, 1.0, 0.75], dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: piecewise(p, boundaries=(0.5,), weights=((1.0, 0.0),)), "2 rows of weights, got 1"),
        (lambda p: tabulated(p, grid=(0.5, 0.2), weights=((1.0, 0.0), (1.0, 0.0))), "ascending grid"),
        (lambda p: tabulated(p, grid=(0.5, 0.5), weights=((1.0, 0.0), (1.0, 0.0))), "ascending grid"),
        (lambda p: tabulated(p, grid=(0.5,), weights=()), "ascending grid"),
        (lambda p: by_loop_index(p), "got neither"),
        (lambda p: by_loop_index(p, permutation=torch.arange(3)), "permutation of shape"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(PROGRESS)


# ---- fitted weights


def test_weights_are_shares_against_shares() -> None:
    found = fitted_weights(torch.tensor([[0.6, 0.2], [0.4, 0.8]]), smoothing=0, floor=0.0)
    assert_close(found, torch.tensor([[0.75, 0.25], [1 / 3, 2 / 3]]))


def test_weights_are_clipped_to_the_floor() -> None:
    variance = torch.tensor([[9.0, 1.0], [3.0, 2.0], [0.0, 0.0], [1.0, 10.0]])
    share = variance / variance.sum(0)
    found = fitted_weights(share, smoothing=0, floor=0.2)
    expected = (share / share.sum(1, keepdim=True))[:, 0].nan_to_num(0.5).clamp(0.2, 0.8)
    assert_close(found[:, 0], expected)
    assert_close(found.sum(1), torch.ones(4))


def test_three_rewards_keep_the_floor_and_the_sum() -> None:
    shares = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)) ** 8
    found = fitted_weights(shares, smoothing=0, floor=0.2)
    assert bool((found >= 0.2 - 1e-6).all())
    assert_close(found.sum(1), torch.ones(7))


def test_smoothing_blends_neighbours_and_renormalises_the_ends() -> None:
    shares = torch.tensor([[1.0, 0.25], [0.0, 0.25], [0.0, 0.25], [0.0, 0.25]])
    found = fitted_weights(shares, smoothing=1, floor=0.0)
    first = torch.tensor([0.5 / 0.75, 0.25, 0.0, 0.0])
    second = torch.full((4,), 0.25)
    assert_close(found[:, 0], first / (first + second))


def test_a_floor_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 0 <= floor < 1/2, got 0\.5"):
        fitted_weights(torch.ones(3, 2), floor=0.5)
