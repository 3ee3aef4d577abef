import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from customized_grpo.functional import statistics
from customized_grpo.functional.statistics import (
    Interval,
    bootstrap,
    gradient_cosine,
    hypervolume,
    interval,
    mean_interval,
    paired_difference,
    pareto_front,
    probability_of_improvement,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def width(i: Interval) -> float:
    return (i.high - i.low).item()


@pytest.mark.parametrize("missing", [False, True])
def test_bootstrap_agrees_with_every_possible_resample(missing):
    scores = torch.rand(3, 8, 2, generator=rng(1), dtype=torch.float64)
    if missing:
        scores[1, 4, 0] = scores[0, 7, 1] = math.nan
    clusters = ["cat", "dog", "cat", "owl", "owl", "owl", "dog", "cat"]
    mean, draws = bootstrap(scores, clusters, rng(), resamples=20_000)
    assert_close(mean, scores.nanmean(dim=(0, 1)))

    members = [[t for t, d in enumerate(clusters) if d == c] for c in ("cat", "dog", "owl")]
    threes = list(itertools.product(range(3), repeat=3))
    every = torch.stack(
        [scores[list(s)][:, [t for n in c for t in members[n]]].nanmean(dim=(0, 1)) for s in threes for c in threes]
    )
    assert_close(draws.mean(0), every.mean(0), atol=0.003, rtol=0)
    assert_close(draws.std(0), every.std(0), atol=0.002, rtol=0)
    for q in (0.025, 0.5, 0.975):
        assert_close(draws.quantile(q, dim=0), every.quantile(q, dim=0), atol=0.015, rtol=0)  # in leaps


@pytest.mark.parametrize("few_seeds", [False, True])
def test_seeds_that_a_column_lacks_are_not_its_seeds(few_seeds):
    """As if each column came alone, with its own seeds; and columns of one set of seeds stay paired."""
    whole = torch.rand(5, 6, 1, generator=rng(1), dtype=torch.float64)
    three = whole.clone()
    three[[1, 4]] = math.nan
    clusters = ["cat", "cat", "dog", "owl", "dog", "owl"]
    _, draws = bootstrap(torch.cat([whole, three, whole + 1, three + 1], dim=-1), clusters, rng(), few_seeds=few_seeds)
    alone = [bootstrap(x[..., 0], clusters, rng(), few_seeds=few_seeds)[1] for x in (whole, three[[0, 2, 3]])]
    assert_close(draws[:, :2], torch.stack(alone, dim=-1))
    assert_close(draws[:, 2:], draws[:, :2] + 1, atol=1e-6, rtol=0)


def test_one_of_several_seeds_has_no_interval():
    scores = torch.rand(3, 6, 3, generator=rng(1))
    scores[1:, :, 1] = scores[:, :, 2] = math.nan
    mean, draws = bootstrap(scores, range(6), rng(), few_seeds=True)
    assert_close(mean, scores.nanmean(dim=(0, 1)).double(), equal_nan=True)
    assert draws.isnan().all(dim=0).tolist() == [False, True, True]
    assert bootstrap(scores[:1], range(6), rng(), few_seeds=True)[1][:, :2].isfinite().all()


def test_two_clusters_by_hand():
    """Means 0 and 1: resampled pairs of clusters give 0, 1/2, 1/2, 1."""
    scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    mean, draws = bootstrap(scores, [7, 7, 3, 3], rng(), resamples=4000)
    assert mean == 0.5
    assert draws.unique().tolist() == [0.0, 0.5, 1.0]
    assert_close((draws == 0.5).double().mean().item(), 0.5, atol=0.04, rtol=0)


def test_subjects_and_not_pictures_are_resampled():
    """Ten identical pictures of one subject are no more evidence than one."""
    per_subject = torch.rand(1, 12, generator=rng(2))
    copied = per_subject.repeat_interleave(10, dim=1)
    subjects = range(12)
    once = mean_interval(per_subject, subjects, rng())
    assert_close(mean_interval(copied, sorted([*subjects] * 10), rng()), once)
    assert width(mean_interval(copied, range(120), rng())) < 0.5 * width(once)


def test_seeds_are_resampled():
    scores = torch.tensor([[0.0], [1.0], [2.0]]).expand(3, 40)
    assert width(mean_interval(scores, range(40), rng())) > 1.0


def test_interval_covers_the_truth_about_as_often_as_it_says():
    g, hits = rng(3), 0
    for _ in range(200):
        subject_effect = torch.randn(30, generator=g).repeat_interleave(4)
        scores = subject_effect + 0.5 * torch.randn(1, 120, generator=g)
        i = mean_interval(scores, sorted(list(range(30)) * 4), g, resamples=300)
        hits += bool(i.low <= 0 <= i.high)
    assert 0.87 <= hits / 200 <= 0.99


def test_more_clusters_than_are_resampled_one_by_one(random):
    values = torch.randn(1, 20_000, generator=random)
    values[0, ::2] += 3  # twos of unlike tasks make a subject, so that only the noise is left between subjects
    found = mean_interval(values, [n // 2 for n in range(20_000)], random)
    half_width = 1.96 * float(values.view(10_000, 2).mean(1).std()) / 100
    assert_close(found.estimate, values.double().mean())
    for bound, sign in ((found.low, -1), (found.high, 1)):
        assert float(bound - found.estimate) == pytest.approx(sign * half_width, rel=0.1)


@pytest.mark.parametrize(("few_seeds", "low", "high"), [(False, 0.6, 0.87), (True, 0.91, 1.0)])
def test_few_seeds_cover_the_truth_only_when_spread_further(random, few_seeds, low, high):
    covered = 0
    for _ in range(200):
        values = torch.randn(5, 1, generator=random) + 0.2 * torch.randn(5, 12, generator=random)
        found = interval(*bootstrap(values, range(12), random, resamples=300, few_seeds=few_seeds))
        covered += bool(found.low <= 0 <= found.high)
    assert low <= covered / 200 <= high


@pytest.mark.parametrize(("n", "student"), [(2, 12.706), (5, 2.776), (11, 2.228), (12, 2.201), (31, 2.042)])
def test_few_seeds_are_spread_as_far_as_students_t_reaches(n, student):
    """With a single task only the seeds vary; the bootstrap's own spread lacks the factor sqrt(n / (n - 1))."""
    values = torch.rand(n, 1, generator=rng(1), dtype=torch.float64)
    (mean, plain), (_, wide) = (bootstrap(values, ["a"], rng(), resamples=200, few_seeds=few) for few in (False, True))
    assert_close(wide - mean, math.sqrt(n / (n - 1)) * student / 1.96 * (plain - mean), rtol=2e-3, atol=1e-6)


def test_every_generator_gives_draws_of_its_own():
    values = torch.rand(1, 50, generator=rng(1))
    drawn = {float(bootstrap(values, range(50), rng(seed), resamples=1)[1]) for seed in range(300)}
    assert len(drawn) > 290


def test_few_seeds_change_nothing_where_only_subjects_vary(random):
    values = torch.randn(1, 30, generator=random).expand(5, -1)
    plain, wide = (
        interval(*bootstrap(values, range(30), torch.Generator().manual_seed(1), few_seeds=few))
        for few in (False, True)
    )
    assert_close(plain.low, wide.low)
    assert_close(plain.high, wide.high)


def test_interval_by_hand():
    draws = torch.arange(101.0, dtype=torch.float64)
    i = interval(torch.tensor(50.0, dtype=torch.float64), draws, level=0.9)
    assert [x.item() for x in i] == pytest.approx([50.0, 5.0, 95.0])


def test_a_constant_score_has_no_width():
    i = mean_interval(torch.full((3, 10), 0.1), ["a", "b"] * 5, rng())
    assert_close(i.low, i.estimate, atol=1e-9, rtol=0)
    assert_close(i.high, i.estimate, atol=1e-9, rtol=0)


def test_digits_survive_far_from_zero():
    scores = torch.rand(2, 20, generator=rng(), dtype=torch.float64)
    near, far = (mean_interval(scores + offset, range(20), rng()) for offset in (0.0, 1e6))
    assert_close(far.low - 1e6, near.low, atol=1e-6, rtol=0)


def test_the_generator_decides():
    scores = torch.rand(2, 20, generator=rng())
    assert mean_interval(scores, range(20), rng(5)) == mean_interval(scores, range(20), rng(5))
    assert mean_interval(scores, range(20), rng(5)) != mean_interval(scores, range(20), rng(6))


def test_columns_share_every_resample():
    scores = torch.rand(3, 20, 1, generator=rng())
    _, draws = bootstrap(torch.cat([scores, scores + 0.5], dim=-1), range(20), rng())
    assert_close(draws[:, 1] - draws[:, 0], torch.full((2000,), 0.5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_pairing_removes_what_both_share():
    difficulty = 10 * torch.rand(1, 50, generator=rng())
    baseline = difficulty + 0.1 * torch.rand(4, 50, generator=rng(1))
    better = difficulty + 0.1 * torch.rand(4, 50, generator=rng(2)) + 0.2
    difference = paired_difference(better, baseline, range(50), rng())
    assert 0.15 < difference.low < difference.estimate < difference.high < 0.25
    assert width(difference) < 0.1 * width(mean_interval(better, range(50), rng()))


INTERVALS = {
    "mean": mean_interval,
    "difference": lambda x, *rest, **settings: paired_difference(x, x.flip(0), *rest, **settings),
    "improvement": lambda x, *rest, **settings: probability_of_improvement(x, x.flip(1), *rest, **settings),
}


@pytest.mark.parametrize("columns", [(), (3,)], ids=["one column", "many"])
@pytest.mark.parametrize("kind", INTERVALS)
def test_intervals_follow_the_level_and_the_number_of_resamples(kind, columns):
    values = torch.rand(4, 9, *columns, generator=rng(1))
    usual, narrow, one = (
        INTERVALS[kind](values, range(9), rng(), **settings) for settings in ({}, {"level": 0.5}, {"resamples": 1})
    )
    same = INTERVALS[kind](values, range(9), rng(), level=0.95, resamples=2000)
    assert all(torch.equal(a, b) for a, b in zip(usual, same, strict=True))
    assert (narrow.high - narrow.low < 0.6 * (usual.high - usual.low)).all()
    assert torch.equal(one.low, one.high)
    assert not torch.equal(one.low, one.estimate)


def test_paired_difference_uses_only_what_both_have_scored():
    values = torch.tensor([[1.0, 100.0, 3.0]])
    baseline = torch.tensor([[0.0, math.nan, 1.0]])
    assert paired_difference(values, baseline, ["a", "b", "c"], rng()).estimate == 1.5


def test_paired_difference_against_one_base_model():
    values = torch.rand(3, 6, 2, generator=rng())
    base = torch.rand(1, 6, 2, generator=rng(1))
    assert_close(
        paired_difference(values, base, list("aabbcc"), rng()).estimate, (values - base).double().mean(dim=(0, 1))
    )


def test_probability_of_improvement_by_hand():
    ours, theirs = torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[2.0, 5.0], [0.0, 6.0], [3.0, math.nan]])
    # Task 1: wins of 1 over (2, 0, 3): 1; of 3: 2 + a tie. Task 2: a tie and a loss, twice; the NaN is no comparison.
    p = probability_of_improvement(ours, theirs, ["a", "b"], rng())
    assert_close(p.estimate.item(), (1 + 2.5 + 0.5 + 0.5) / 10)
    assert 0 <= p.low < p.estimate < p.high <= 1


def test_probability_of_improvement_is_symmetric():
    ours, theirs = torch.rand(3, 30, generator=rng(1)), torch.rand(3, 30, generator=rng(2))
    clusters = range(30)
    there, back = (probability_of_improvement(*sides, clusters, rng()) for sides in ((ours, theirs), (theirs, ours)))
    assert_close(there.estimate, 1 - back.estimate)
    sure = probability_of_improvement(ours + 2, theirs, clusters, rng())
    assert sure.low == sure.high == 1


def test_probability_of_improvement_of_many_methods_is_one_by_one():
    ours, theirs = torch.rand(2, 9, 3, generator=rng(1)), torch.rand(2, 9, 3, generator=rng(2))
    together = probability_of_improvement(ours, theirs, range(9), rng())
    for m in range(3):
        one = probability_of_improvement(ours[..., m], theirs[..., m], range(9), rng())
        assert_close(Interval(*(x[m] for x in together)), one)


def test_pareto_front_by_hand():
    points = torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [1.0, 1.0], [2.0, 2.0], [3.0, 0.5], [math.nan, 9.0]])
    assert pareto_front(points).tolist() == [True, True, True, False, True, False, False]


def test_hypervolume_by_hand():
    reference = torch.tensor([1.0, 1.0])
    # Above (1, 1): boxes 1x2 and 2x1 overlap in 1x1; the third is inside, the rest are not above in both.
    points = torch.tensor([[2.0, 3.0], [3.0, 2.0], [1.5, 1.5], [0.0, 9.0], [9.0, 1.0]])
    assert hypervolume(points, reference) == 3.0
    assert hypervolume(points[3:], reference) == 0.0
    assert hypervolume(points[:0], reference) == 0.0
    assert_close(hypervolume(torch.stack([points, points + 1]), reference)[0].item(), 3.0)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8))
def test_hypervolume_counts_the_dominated_cells(points):
    tensor = torch.tensor(points, dtype=torch.float64)
    cells = sum(any(x > i and y > j for x, y in points) for i in range(6) for j in range(6))
    assert hypervolume(tensor, torch.zeros(2, dtype=torch.float64)) == cells
    front = pareto_front(tensor)
    assert front.any()
    assert hypervolume(tensor[front], torch.zeros(2, dtype=torch.float64)) == cells


def draws_of_wrong_shape() -> tuple[Tensor, Tensor]:
    return torch.zeros(2), torch.zeros(10, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval(torch.zeros(4), list("abcd"), rng()), "seeds, tasks"),
        (lambda: mean_interval(torch.zeros(0, 4), list("abcd"), rng()), "nothing to resample in 0 seeds"),
        (lambda: mean_interval(torch.zeros(1, 4), list("abc"), rng()), "got 3 for 4 tasks"),
        (lambda: probability_of_improvement(torch.zeros(1, 4), torch.zeros(1, 3), list("abcd"), rng()), "same tasks"),
        (lambda: interval(*draws_of_wrong_shape()), "draws of shape"),
        (lambda: pareto_front(torch.zeros(3)), r"\(n, d\)"),
        (lambda: hypervolume(torch.zeros(3, 3), torch.zeros(2)), r"reference \(2,\)"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("unit", [2.0**126, 2.0**-140])
def test_intervals_do_not_depend_on_the_unit(unit):
    scores = torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(0)).double()
    clusters = [n // 2 for n in range(12)]
    plain, scaled = (
        mean_interval(values, clusters, torch.Generator().manual_seed(1)) for values in (scores, scores * unit)
    )
    for ours, theirs in zip(plain, scaled, strict=True):
        assert torch.equal(ours * unit, theirs)


def test_many_clusters_are_put_together_into_groups_of_equal_size(monkeypatch):
    """Eight clusters in two groups of four: a resample has twice the first group, both, or twice the second."""
    monkeypatch.setattr(statistics, "MOST_CLUSTERS", 2)
    mean, draws = bootstrap(torch.arange(8.0).unsqueeze(0) ** 2, range(8), rng(), resamples=500)
    low, middle, high = draws.unique().tolist()
    assert mean.item() == middle == 17.5
    assert low + high == pytest.approx(35)
    assert [(draws == value).double().mean().item() for value in (low, high)] == pytest.approx([0.25, 0.25], abs=0.08)


# ---- gradients of subjects


def gram(gradients: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ukd,vld->ukvl", gradients, gradients)


def test_the_cosine_is_of_the_summed_gradients() -> None:
    gradients = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [2.0, 0.0]]])
    counts = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
    expected = torch.tensor([1 / math.sqrt(2), 0.0, 1.0], dtype=torch.float64)
    assert_close(gradient_cosine(gram(gradients), counts), expected)


def test_across_subjects_the_common_noise_drops_out() -> None:
    """Expected gradients e and -e, under noise that both rewards of a subject share and that is ten times as long."""
    direction = torch.zeros(8, 2, 9, dtype=torch.float64)
    direction[:, 0, 8], direction[:, 1, 8] = 1.0, -1.0
    noise = 10 * torch.eye(9, dtype=torch.float64)[:8].unsqueeze(1)
    everyone = torch.ones(1, 8)
    products = gram(direction + noise)
    # Summed: 8 e + noise and -8 e + noise, with 64 of signal and 800 of noise in every product.
    assert float(gradient_cosine(products, everyone)) == pytest.approx((-64 + 800) / (64 + 800))
    assert float(gradient_cosine(products, everyone, across=True)) == pytest.approx(-1.0)


def test_no_gradient_has_no_cosine() -> None:
    assert bool(gradient_cosine(torch.zeros(3, 2, 3, 2), torch.ones(1, 3)).isnan().all())
