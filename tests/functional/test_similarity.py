import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from customized_grpo.functional.similarity import angle, best_assignment, copying, matching_reward, target_identity


def test_target_identity_by_hand():
    # one reference: k = 7; two: k = 10; three: k = 13
    assert target_identity(torch.tensor([0.65])).item() == 0.5
    assert target_identity(torch.tensor([0.75])).item() == pytest.approx(1 / (1 + math.exp(-0.7)))
    two = target_identity(torch.tensor([[0.75, 0.65], [0.85, 0.45]]))
    assert_close(two.tolist(), [(1 / (1 + math.exp(-1)) + 0.5) / 2, 0.5], atol=1e-6, rtol=0)
    three = target_identity(torch.tensor([0.5, 0.6, 0.5]), centre=0.5)
    assert three.item() == pytest.approx((1 + 1 / (1 + math.exp(-1.3))) / 3)


def at(degrees: float, length: float = 1.0) -> torch.Tensor:
    radians = math.radians(degrees)
    return length * torch.tensor([math.cos(radians), math.sin(radians)], dtype=torch.float64)


def test_angles_by_hand():
    for degrees in (0, 1e-5, 30, 90, 179, 180):
        assert math.degrees(angle(at(10, 3.0), at(10 + degrees))) == pytest.approx(degrees, abs=1e-9)
    assert angle(torch.zeros(3, 2) + at(0), torch.zeros(3, 2) + at(60)).shape == (3,)


@pytest.mark.parametrize(
    ("image", "measure"), [(60, 1.0), (0, -1.0), (30, 0.0), (45, 0.5), (90, 1.0), (-40, -1.0), (20, -1 / 3)]
)
def test_copying_by_hand(image, measure):
    """The target at 0 degrees, the reference at 60."""
    assert copying(at(image, 2.0), at(0), at(60, 5.0)).item() == pytest.approx(measure, abs=1e-9)


def test_copying_without_a_distance_to_measure_by_is_0():
    assert copying(at(40), at(7), at(7)).item() == 0
    assert copying(at(7), at(7), at(7)).item() == 0
    assert copying(at(7.001), at(7), at(7.001)).item() == pytest.approx(1)


@given(st.lists(st.floats(-180, 180), min_size=3, max_size=3))
def test_copying_stays_in_its_range_and_turns_with_its_arguments(degrees):
    image, target, reference = map(at, degrees)
    measure = copying(image, target, reference).item()
    assert -1 <= measure <= 1
    assert copying(image, reference, target).item() == pytest.approx(-measure, abs=1e-6)


def test_matching_reward_by_hand():
    assert matching_reward(torch.tensor([[0.7]])).item() == pytest.approx(0.7)
    # greedy takes 0.9 first and is left with 0.1; the best assignment is 0.8 + 0.7
    greedy = torch.tensor([[0.9, 0.8], [0.7, 0.1]])
    assert best_assignment(greedy) == [(0, 1), (1, 0)]
    assert matching_reward(greedy).item() == pytest.approx((0.8 + 0.7 - 0.9 - 0.1) / 4)
    # one subject too many counts against the image
    more = torch.tensor([[0.9], [0.3], [-0.5]])
    assert matching_reward(more).item() == pytest.approx((0.9 - 0.3 + 0.5) / 3)
    assert matching_reward(more.T).item() == pytest.approx((0.9 - 0.3 + 0.5) / 3)


def test_matching_reward_pairs_all_even_where_nothing_fits():
    cosines = torch.tensor([[-0.2, -0.6], [-0.4, -0.3]])
    assert matching_reward(cosines).item() == pytest.approx((-0.2 - 0.3 + 0.6 + 0.4) / 4)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0)])
def test_matching_reward_of_nobody_is_0(shape):
    assert matching_reward(torch.zeros(shape)).item() == 0


def test_matching_reward_carries_the_gradient_of_the_cosines():
    cosines = torch.tensor([[0.9, 0.8], [0.7, 0.1]]).requires_grad_()
    matching_reward(cosines).backward()
    assert_close(cosines.grad, torch.tensor([[-0.25, 0.25], [0.25, -0.25]]))


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_the_assignment_is_the_best_of_all(rows, columns, seed):
    values = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    pairs = best_assignment(values)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs) == min(rows, columns)
    wide = values if rows <= columns else values.T
    best = max(
        sum(wide[i, j].item() for i, j in enumerate(order))
        for order in itertools.permutations(range(wide.shape[1]), wide.shape[0])
    )
    assert sum(values[i, j].item() for i, j in pairs) == pytest.approx(best)


def test_matching_reward_needs_a_matrix():
    with pytest.raises(ValueError, match=r"shape \(M, N\), got \(2,\)"):
        matching_reward(torch.zeros(2))
