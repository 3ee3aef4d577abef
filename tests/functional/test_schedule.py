import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from customized_grpo.functional.schedule import (
    all_steps,
    random_fraction,
    resolution_shift,
    shifted_sigmas,
    sliding_window,
)

VECTORS = Path(__file__).parents[1] / "vectors"
SIGMAS = json.loads((VECTORS / "sigma_schedule.json").read_text())["cases"]
WINDOWS = json.loads((VECTORS / "mixgrpo_window.json").read_text())["cases"]


@pytest.mark.parametrize("case", [c for c in SIGMAS if c["inputs"]["kind"] == "sd3_time_shift"])
def test_published_shifted_sigmas(case):
    i, o = case["inputs"], case["outputs"]
    dtype = getattr(torch, i["dtype"])
    sigmas = shifted_sigmas(i["sampling_steps"], i["shift"], dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert_close(sigmas, torch.tensor(o["sigmas"], dtype=dtype), atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", [c for c in SIGMAS if c["inputs"]["kind"] == "uno_get_schedule"])
def test_published_resolution_dependent_sigmas(case):
    i, o = case["inputs"], case["outputs"]
    sigmas = shifted_sigmas(i["num_steps"], resolution_shift(i["image_seq_len"]))
    assert_close(sigmas, torch.tensor(o["timesteps"]), atol=2e-5, rtol=0)


@given(st.integers(1, 60), st.floats(0.2, 20.0))
def test_sigmas_fall_from_one_to_zero(steps, shift):
    sigmas = shifted_sigmas(steps, shift)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_resolution_shift_by_hand():
    assert resolution_shift(256) == pytest.approx(math.exp(0.5))
    assert resolution_shift(4096) == pytest.approx(math.exp(1.15))
    # exp(mu) / (exp(mu) + 1/t - 1) at t = 0.5 is exp(mu) / (exp(mu) + 1)
    assert shifted_sigmas(2, resolution_shift(256), dtype=torch.float64)[1] == pytest.approx(
        math.exp(0.5) / (math.exp(0.5) + 1)
    )


def window_settings(case: dict) -> dict:
    c = case["inputs"]["config"]
    decays = c["sample_strategy"] in ("decay", "exp_decay")
    return {
        "num_inference_steps": c["max_timesteps"] + 1,
        "size": c["group_size"],
        "stride": c["prog_overlap_step"] if c["prog_overlap"] else c["group_size"],
        # For `decay` the published class starts from another setting than for the rest.
        "iterations_per_window": (c["sample_strategy"] == "decay" and c["max_iters_per_group"]) or c["iters_per_group"],
        "min_iterations": c["min_iters_per_group"],
        "strategy": c["sample_strategy"],
        "first": c["cur_timestep"],
        "roll_back": c["roll_back"],
        "partial": case["inputs"]["variant"] == "mixgrpo" or decays,
    }


def window_id(case: dict) -> str:
    s = window_settings(case)
    return f"{case['inputs']['variant']}-{s['strategy']}-stride{s['stride']}-roll_back{s['roll_back']}"


@pytest.mark.parametrize("case", [c for c in WINDOWS if window_settings(c)["strategy"] != "random"], ids=window_id)
def test_published_windows(case):
    settings, previous = window_settings(case), None
    for iteration, published in enumerate(case["outputs"]["windows"]):
        plan = sliding_window(iteration, **settings)
        # Where the published class trains nothing, ours stays where it was.
        assert plan.trained.tolist() == (published or previous)
        assert torch.equal(plan.stochastic, plan.trained)
        previous = plan.trained.tolist()


@pytest.mark.parametrize("case", [c for c in WINDOWS if window_settings(c)["strategy"] == "random"], ids=window_id)
def test_published_random_windows(case, monkeypatch):
    """The published draws come from numpy; fed with the same draws, the windows are the same."""
    starts = case["outputs"]["cur_timestep"]
    for iteration, published in enumerate(case["outputs"]["windows"]):

        def draw(places, shape, *, generator, start=starts[iteration]):
            assert places == 20
            return torch.tensor(start)

        monkeypatch.setattr(torch, "randint", draw)
        plan = sliding_window(iteration, **window_settings(case), generator=torch.Generator())
        assert plan.trained.tolist() == published


def places(iterations: int, num_inference_steps: int = 11, **settings) -> list[int]:
    """Where the window begins, iteration by iteration."""
    g = torch.Generator().manual_seed(0)
    plans = (sliding_window(i, num_inference_steps, generator=g, **settings) for i in range(iterations))
    return [int(plan.trained[0]) for plan in plans]


def stays(iterations: int, *args: int, **settings) -> list[int]:
    """How long it stays in each place that it has left after so many iterations."""
    return [len(list(group)) for _, group in itertools.groupby(places(iterations + 1, *args, **settings))][:-1]


def test_a_window_of_four_moves_by_one_every_25_iterations_and_starts_again():
    assert places(7 * 25 + 1) == [place for place in range(7) for _ in range(25)] + [0]


@pytest.mark.parametrize(("stop", "last"), [(4, 2), (10, 8), (99, 8), (None, 8)])
def test_a_window_ends_at_the_stop_or_before_the_last_step(stop, last):
    assert places(last + 2, size=2, iterations_per_window=1, stop=stop) == [*range(last + 1), 0]


def test_decay_by_hand():
    # 7 (1 - p/4) + s p/4, rounded down, with s = 7 // 4 = 1, or what is asked for
    settings = {"strategy": "decay", "size": 1, "stop": 4}
    assert stays(7 + 5 + 4 + 2, iterations_per_window=7, **settings) == [7, 5, 4, 2]
    assert stays(3 + 2 + 2 + 1, iterations_per_window=3, **settings) == [3, 2, 2, 1]
    assert stays(8 + 7 + 6 + 5, iterations_per_window=8, min_iterations=4, **settings) == [8, 7, 6, 5]


def test_exponential_decay_begins_after_step_13():
    # 25 exp(-0.1) = 22.6, 25 exp(-0.2) = 20.5
    assert stays(14 * 25 + 23 + 21, 17, strategy="exp_decay", size=1) == [25] * 14 + [23, 21]


def test_a_random_window_as_long_as_the_trajectory_stands_still():
    assert set(places(20, 4, strategy="random", size=5, partial=True)) == {0}


def test_random_windows_reach_every_place_and_follow_the_generator():
    def draw(seed: int) -> list[int]:
        g = torch.Generator().manual_seed(seed)
        return [sliding_window(0, 10, strategy="random", generator=g).trained[0].item() for _ in range(200)]

    assert set(draw(0)) == set(range(6))
    assert draw(0) == draw(0) != draw(1)


@given(
    iteration=st.integers(0, 300),
    steps=st.integers(2, 30),
    size=st.integers(1, 8),
    stride=st.integers(0, 8),
    stay=st.integers(1, 30),
    strategy=st.sampled_from(["progressive", "random", "decay", "exp_decay"]),
    first=st.integers(0, 5),
    roll_back=st.booleans(),
    partial=st.booleans(),
)
def test_no_window_is_ever_empty(iteration, steps, size, stride, stay, strategy, first, roll_back, partial):
    settings = {
        "size": size, "stride": stride, "iterations_per_window": stay, "strategy": strategy, "first": first,
        "roll_back": roll_back, "partial": partial, "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    if first >= steps - 1 or (not partial and first + size > steps - 1):
        with pytest.raises(ValueError, match="does not fit"):
            sliding_window(iteration, steps, **settings)
        return
    window = sliding_window(iteration, steps, **settings).trained
    assert 1 <= len(window) <= size
    assert len(window) == size or partial
    assert (window.diff() == 1).all()
    assert first <= window[0]
    assert window[-1] < steps - 1


def test_all_steps_leave_out_the_last():
    plan = all_steps(7, 5)
    assert plan.trained.tolist() == plan.stochastic.tolist() == [0, 1, 2, 3]
    assert all_steps(7, 5, include_last=True).trained.tolist() == [0, 1, 2, 3, 4]
    assert plan.trained.dtype == torch.int64


def test_random_fraction_is_the_papers_14_of_24():
    plan = random_fraction(0, 25, generator=torch.Generator().manual_seed(0))
    assert plan.stochastic.tolist() == list(range(24))
    assert len(plan.trained) == 14
    assert (plan.trained.diff() > 0).all()
    assert set(plan.trained.tolist()) <= set(range(24))


def test_random_fraction_trains_every_step_equally_often():
    g = torch.Generator().manual_seed(0)
    counts = sum(
        torch.bincount(random_fraction(i, 10, fraction=0.34, generator=g).trained, minlength=10) for i in range(3000)
    )
    assert counts[9] == 0
    assert_close(counts[:9] / 3000, torch.full((9,), 1 / 3), atol=0.05, rtol=0)


def test_the_whole_fraction_is_every_step():
    assert random_fraction(0, 5, fraction=1.0, generator=torch.Generator()).trained.tolist() == [0, 1, 2, 3]


def test_random_fraction_is_never_empty():
    plan = random_fraction(0, 3, fraction=0.01, generator=torch.Generator().manual_seed(0))
    assert len(plan.trained) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shifted_sigmas(0, 3.0), "at least 1 step"),
        (lambda: shifted_sigmas(10, 0.0), "shift > 0"),
        (lambda: all_steps(0, 1), "no step is left"),
        (lambda: random_fraction(0, 10), "needs a generator"),
        (lambda: random_fraction(0, 10, fraction=0.0, generator=torch.Generator()), "fraction <= 1"),
        (lambda: random_fraction(0, 10, fraction=1.5, generator=torch.Generator()), "fraction <= 1, got 1.5"),
        (lambda: sliding_window(0, 10, size=0), "window of 0 steps does not fit"),
        (lambda: sliding_window(0, 10, first=-1), "does not fit in steps -1 to 8"),
        (lambda: sliding_window(0, 10, strategy="random"), "needs a generator"),
        (lambda: sliding_window(0, 10, strategy="randm"), "got 'randm'"),
        (lambda: sliding_window(0, 4, size=4), "does not fit in steps 0 to 2"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
