import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from customized_grpo.functional import advantages as adv
from customized_grpo.functional.time_weights import constant, sigmoid_crossover

VECTORS = Path(__file__).parents[1] / "vectors"
SARS = json.loads((VECTORS / "sars.json").read_text())["cases"]
HAZARDS = json.loads((VECTORS / "sars_hazards.json").read_text())["cases"]
GDPO = json.loads((VECTORS / "gdpo.json").read_text())["cases"]

ON_Z = [
    adv.weighted_sum,
    adv.sars,
    adv.sars_recentred,
    adv.sars_by_conflict,
    adv.minimum,
    adv.maximum,
    adv.harmonic,
    partial(adv.harmonic, punish_conflict=True),
    adv.product,
    adv.conflict_drop,
]
CME = partial(adv.cme, execution=(1,), zero=-8.0, one=8.0)
GATE = partial(adv.identity_gate, threshold=0.5, strength=5)
ON_REWARDS = [adv.raw_sum, adv.log_tamed, GATE, CME, adv.gdpo]
OVER_THE_BATCH = (adv.gdpo, adv.sars_by_conflict)
"""Their numbers depend on the other groups."""
WITHIN_GROUPS = [f for f in ON_Z + ON_REWARDS if f not in OVER_THE_BATCH]
STRATEGIES = {
    "tanh": adv.sars,
    "min": adv.minimum,
    "max": adv.maximum,
    "harmonic": adv.harmonic,
    "product": adv.product,
}
TWO_STEPS = torch.tensor([[0.7, 0.3], [0.4, 0.6]])


def name(function) -> str:
    """Not the repr of a partial, which holds an address: processes that share the tests must name them alike."""
    return function.__name__ if hasattr(function, "__name__") else f"{function.func.__name__}-{function.keywords}"


def rewards_of(case: dict) -> Tensor:
    i = case["inputs"]
    dtype = getattr(torch, i["dtype"])
    rewards = torch.tensor([i["reward_prompt"], i["reward_id"]], dtype=dtype).T
    # "two_groups" is the one case whose lists hold more than one group.
    return rewards.view(-1, i["group_size"], 2)


def tolerance(case: dict) -> dict[str, float]:
    return {"atol": 1e-10, "rtol": 0} if case["inputs"]["dtype"] == "float64" else {"atol": 2e-5, "rtol": 2e-5}


def published(case: dict, key: str) -> Tensor:
    return torch.tensor(case["outputs"][key], dtype=getattr(torch, case["inputs"]["dtype"]))


def final(case: dict) -> dict[str, list[float | None]]:
    return case["outputs"]["final_advantage_by_step"]


def case_id(case: dict) -> str:
    i = case["inputs"]
    return f"{i['label']}-{i['group_size']}-{i['conflict_strategy']}-{i['weight_strategy']}-{i['form']}"


@pytest.mark.parametrize("case", SARS, ids=case_id)
def test_published_standard_scores(case):
    z = adv.standardize(rewards_of(case))
    assert_close(z[..., 0].flatten(), published(case, "A_prompt"), **tolerance(case))
    assert_close(z[..., 1].flatten(), published(case, "A_id"), **tolerance(case))


@pytest.mark.parametrize(
    "case", [c for c in SARS if c["inputs"]["conflict_strategy"] in ("tanh", "tanh_only")], ids=case_id
)
def test_published_synergy(case):
    gamma = case["inputs"]["gamma"] if case["inputs"]["conflict_strategy"] == "tanh" else 1.0
    bonus = gamma * adv.synergy(adv.standardize(rewards_of(case))).flatten()
    assert_close(bonus, published(case, "bonus"), **tolerance(case))


@pytest.mark.parametrize("case", [c for c in SARS if None not in next(iter(final(c).values()))], ids=case_id)
def test_published_advantages(case):
    i = case["inputs"]
    rewards = rewards_of(case)
    progress = torch.tensor([int(s) for s in final(case)], dtype=rewards.dtype) / 25
    fixed = partial(constant, weights=(i["fixed_w_prompt"], i["fixed_w_id"]))
    weights = (sigmoid_crossover if i["weight_strategy"] == "dynamic" else fixed)(progress)
    settings = {"gamma": i["gamma"]} if i["conflict_strategy"] in ("tanh", "harmonic") else {}
    ours = adv.advantages(STRATEGIES[i["conflict_strategy"]], rewards, weights, i["adv_clip_max"], **settings)
    for s, expected in enumerate(final(case).values()):
        assert_close(ours[..., s].flatten(), torch.tensor(expected, dtype=rewards.dtype), **tolerance(case))


def test_published_nan_is_the_only_thing_not_reproduced():
    without = [c for c in SARS if None in next(iter(final(c).values()))]
    assert {(c["inputs"]["conflict_strategy"], c["inputs"]["form"]) for c in without} == {
        ("product", "per_sample_as_shipped"),
        ("tanh_only", "per_sample_as_shipped"),
    }
    for case in without:
        assert adv.advantages(adv.product, rewards_of(case).float(), TWO_STEPS).isfinite().all()


@pytest.mark.parametrize("case", HAZARDS)
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_constant_float32_group_has_exactly_no_advantage(case, contiguous):
    rewards = rewards_of(case)
    z = adv.standardize(rewards.contiguous() if contiguous else rewards)
    assert (z[..., 0] == 0).all()
    assert_close(z[..., 1].flatten(), published(case, "A_id"), atol=2e-5, rtol=2e-5)


@given(
    value=st.floats(-1e4, 1e4, width=32).filter(lambda x: abs(x) > 1e-3),
    ulps=st.lists(st.integers(-2, 2), min_size=2, max_size=16),
)
def test_rounding_is_not_reward(value, ulps):
    column = torch.tensor([value] * len(ulps)) * (1 + torch.tensor(ulps) * torch.finfo(torch.float32).eps)
    assert (adv.standardize(column.view(1, -1, 1)) == 0).all()


@pytest.mark.parametrize(("units", "counts"), [(8, False), (9, True)])
def test_rounding_is_eight_units_in_the_last_place_of_1(units, counts):
    column = torch.tensor([1 - units * torch.finfo(torch.float32).eps, 1.0])
    assert bool(adv.standardize(column.view(1, 2, 1)).any()) == counts


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.floats(0.1, 10), st.floats(-50, 50))
def test_standard_scores_ignore_scale_and_shift(values, scale, shift):
    rewards = torch.tensor(values, dtype=torch.float64).view(1, -1, 1)
    assume(rewards.amax() - rewards.amin() > 1e-3)
    z = adv.standardize(rewards)
    assert_close(z.mean(), torch.tensor(0.0, dtype=torch.float64), atol=1e-9, rtol=0)
    assert_close(z.std(), torch.tensor(1.0, dtype=torch.float64), atol=1e-3, rtol=0)
    assert_close(adv.standardize(scale * rewards + shift), z, atol=1e-3, rtol=0)


def test_standardize_by_hand():
    # mean 2, unbiased std 1
    assert_close(adv.standardize(torch.tensor([[[1.0], [2.0], [3.0]]])), torch.tensor([[[-1.0], [0.0], [1.0]]]))


def test_narrow_group_far_from_zero_keeps_its_digits():
    # 0.001 apart at 1000: sixteen units in the last place, real spread.
    column = torch.tensor([1000.0, 1001.0, 1002.0]) / 1
    offset = torch.tensor([[1000.0], [1000.0 + 2**-10], [1000.0 + 2**-9]]).unsqueeze(0)
    assert_close(adv.standardize(offset), adv.standardize(column.view(1, 3, 1)), atol=2e-5, rtol=0)
    # 2^-18 apart at 2^30: sixteen units of float64.
    double = 2**30 + torch.tensor([[0.0], [2**-18], [2**-17]], dtype=torch.float64).unsqueeze(0)
    assert_close(adv.standardize(double, eps=0.0).flatten().tolist(), [-1.0, 0.0, 1.0])


def test_rounding_in_one_group_is_no_reward_beside_another():
    rounding = 1 + torch.tensor([0.0, 1.0, 2.0]) * torch.finfo(torch.float32).eps
    z = adv.standardize(torch.stack([rounding, torch.tensor([-1e3, 0.0, 1e3])]).unsqueeze(-1))
    assert z.flatten().tolist() == [0, 0, 0, -1, 0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_unscored_image_teaches_nothing_and_moves_no_other(bad):
    rewards = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(0))
    spoilt = rewards.clone()
    spoilt[0, 2, 1] = bad
    z, whole = adv.standardize(spoilt), adv.standardize(rewards)
    assert z[0, 2, 1] == 0
    kept = [0, 1, 3, 4]
    assert_close(z[0, kept, 1], adv.standardize(rewards[:1, kept])[0, :, 1])
    assert_close(z[0, :, 0], whole[0, :, 0])  # the other reward scored all five
    assert_close(z[1], whole[1])


@pytest.mark.parametrize("scored", [0, 1])
def test_a_group_with_at_most_one_scored_image_is_all_zero(scored):
    rewards = torch.full((1, 3, 2), math.nan)
    rewards[0, :, 1] = torch.arange(3.0)
    rewards[0, :scored, 0] = 3.0
    z = adv.standardize(rewards)
    assert (z[..., 0] == 0).all()
    assert_close(z[0, :, 1], torch.tensor([-1.0, 0.0, 1.0]))


@pytest.mark.parametrize("unit", [1e38, -1e38, 1e-30])
def test_huge_values_are_standardized_exactly(unit):
    rewards = torch.tensor([[[-3.0], [1.0], [2.0], [3.0]]])
    eps = 1e-8 if abs(unit) > 1 else 0.0
    z = adv.standardize(rewards * unit, eps)
    assert_close(z, math.copysign(1, unit) * adv.standardize(rewards, eps))


def test_synergy_by_hand():
    z = torch.tensor([[[1.0, 2.0], [1.0, -2.0], [-1.0, -2.0], [0.0, 2.0]]])
    t = math.tanh(2)
    assert_close(adv.synergy(z), torch.tensor([[t, -t, -t, 0.0]]))
    three = torch.tensor([[[1.0, 1.0, -1.0]]])  # one pair agrees, two do not
    assert_close(adv.synergy(three), torch.tensor([[-math.tanh(1) / 3]]))


def test_sars_by_hand():
    z = torch.tensor([[[1.0, 2.0], [1.0, -2.0]]])
    weights = torch.tensor([[0.7, 0.3], [0.5, 0.5]])
    t = 0.4 * math.tanh(2)
    assert_close(adv.sars(z, weights), torch.tensor([[[1.3 + t, 1.5 + t], [0.1 - t, -0.5 - t]]]))


def test_sars_recentred_by_hand():
    # pairs 1, -1, -1, 1 -> bonus t, -t, -t, -t with t = tanh 1; its mean -t/2 goes
    z, t = torch.tensor([[[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]]), math.tanh(1)
    expected = torch.tensor([[[1 + 0.75 * t], [-0.25 * t], [-0.25 * t], [-1 - 0.25 * t]]])
    assert_close(adv.sars_recentred(z, torch.tensor([[0.5, 0.5]]), gamma=0.5), expected)
    by_default = torch.tensor([[[1 + 0.6 * t], [-0.2 * t], [-0.2 * t], [-1 - 0.2 * t]]])
    assert_close(adv.sars_recentred(z, torch.tensor([[0.5, 0.5]])), by_default)


def test_sars_recentred_takes_the_mean_of_each_pair_over_the_images_that_both_scored():
    z = torch.tensor([[[1.0, 1.0, 1.0], [-1.0, -1.0, 1.0], [0.0, 1.0, -1.0]]])
    scored = torch.tensor([[[True] * 3, [True] * 3, [False, True, True]]])
    none = torch.zeros(1, 3)
    bonus = adv.sars_recentred(z, none, gamma=1.0, scored=scored).flatten()
    # pairs 01: t, -t, out; 02: t, -t, out; 12: t, -t, -t with mean -t/3
    expected = torch.tensor([2 + 4 / 3, -2 - 2 / 3, -2 / 3]) / 3
    assert_close(bonus, math.tanh(1) * expected)
    alone = torch.tensor([True, False, False]).view(1, 3, 1).expand(-1, -1, 3)
    assert (adv.sars_recentred(z, none, scored=alone) == 0).all()


def test_sars_as_published_has_a_negative_mean_that_recentring_takes_away(random):
    noise = torch.randn(4000, 8, 2, generator=random)
    rewards = torch.stack([noise[..., 0], -0.8 * noise[..., 0] + 0.6 * noise[..., 1]], dim=-1)
    z = adv.standardize(rewards)
    assert -0.2 < float(adv.sars(z, TWO_STEPS).mean()) < -0.12
    assert_close(adv.sars_recentred(z, TWO_STEPS).mean(dim=1), torch.zeros(4000, 2), atol=1e-5, rtol=0)


def test_gamma_follows_the_conflict():
    weights, half = torch.tensor([[0.5, 0.5]]), [[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]
    for z, gamma in ((half, 0.4), ([[1.0, -1.0], [-1.0, 1.0]], 0.8), ([[1.0, 1.0], [-1.0, -1.0]], 0.0)):
        scores = torch.tensor([z])
        assert_close(adv.sars_by_conflict(scores, weights), adv.sars_recentred(scores, weights, gamma=gamma))


def test_minimum_and_maximum_by_hand():
    z = torch.tensor([[[1.0, 2.0], [1.0, -2.0]]])
    assert_close(adv.minimum(z, TWO_STEPS), torch.tensor([[[1.0, 1.0], [-2.0, -2.0]]]))
    assert_close(adv.maximum(z, TWO_STEPS), torch.tensor([[[2.0, 2.0], [1.0, 1.0]]]))


def test_the_minimum_of_an_image_that_nobody_scored_is_zero():
    z, scored = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[True, False], [False, False]]])
    assert adv.minimum(z, torch.ones(1, 2), scored=scored).flatten().tolist() == [1.0, 0.0]


def test_harmonic_punishes_conflict_only_when_asked_to():
    z = torch.tensor([[[1.0, -3.0], [1.0, 3.0], [-1.0, -3.0]]])  # conflict, agreement, agreement
    weights = torch.zeros(1, 2)
    as_released = adv.harmonic(z, weights, gamma=1.0)[0, :, 0]
    ours = adv.harmonic(z, weights, gamma=1.0, punish_conflict=True)[0, :, 0]
    assert_close(as_released, torch.tensor([1.5, 0.75, -0.75]), atol=1e-5, rtol=0)
    assert_close(ours, torch.tensor([-0.75, 0.75, -0.75]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1.0, 1e-3, 5e-7, 0.0])
def test_harmonic_is_never_larger_than_either_where_it_punishes_conflict(size):
    z = size * torch.tensor([[[1.0, 1.0], [1.0, -1.0], [-1.0, -2.0]]], dtype=torch.float64)
    bonus = adv.harmonic(z, torch.zeros(1, 2, dtype=torch.float64), punish_conflict=True)
    assert (bonus.abs().flatten() <= 0.4 * size).all()
    if size == 1:
        assert_close(bonus.flatten().tolist(), [0.2, -0.2, -0.4 * 2 / 3], atol=1e-6, rtol=0)


def test_product_prefers_two_good_to_one_excellent():
    z = torch.tensor([[[1.0, 1.0], [2.5, -1.5], [-1.0, -1.0]]])
    a = adv.product(z, torch.tensor([[0.5, 0.5]]))[0, :, 0]
    assert a[0] > a[1] > a[2]


def test_conflict_drop_by_hand():
    z = torch.tensor([[[1.0, 2.0], [1.0, -2.0], [-1.0, -2.0], [0.0, -2.0], [-2.0, 0.0]]])
    weights = torch.tensor([[0.5, 0.5]])
    assert_close(adv.conflict_drop(z, weights), torch.tensor([[[1.5], [0.0], [-1.5], [-1.0], [-1.0]]]))


def test_gdpo_has_unit_spread_over_the_batch_at_every_step():
    rewards = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0))
    a = adv.gdpo(rewards, TWO_STEPS).flatten(0, 1)
    assert_close(a.std(dim=0), torch.ones(2))
    assert_close(a.mean(dim=0), torch.zeros(2), atol=1e-6, rtol=0)
    plain = adv.weighted_sum(adv.standardize(rewards), TWO_STEPS).flatten(0, 1)
    assert_close(a, (plain - plain.mean(0)) / plain.std(0))
    assert_close(adv.gdpo(rewards, TWO_STEPS, eps=1.0).flatten(0, 1), (plain - plain.mean(0)) / (plain.std(0) + 1))


ALL_SCORED = [c for c in GDPO if "unscored" not in c["inputs"]["label"]]
SAMPLES = [c for c in ALL_SCORED if "response_lengths" not in c["inputs"]]
"""Without the case that weighs responses by their length, which only the two verl variants do."""
TRL = {"group_eps": 1e-4, "eps": 1e-4}
VERL = {"group_eps": 1e-6, "eps": 1e-8, "eps_to": "variance"}
FLOW_FACTORY = {"ddof": 0, "group_eps": 1e-6, "group_eps_to": "floor", "eps": 1e-6, "eps_to": "floor"}
PUBLISHED_GDPO = [
    ("NVlabs/GDPO trl", GDPO, TRL),
    ("huggingface/trl normalize_then_sum", GDPO, TRL),
    ("NVlabs/GDPO verl", SAMPLES, VERL),
    ("verl-project/verl", SAMPLES, VERL),
    ("X-GenGroup/Flow-Factory gdpo, group_contiguous", ALL_SCORED, FLOW_FACTORY),
    ("X-GenGroup/Flow-Factory gdpo, distributed_k_repeat (rewards pass through float32)", ALL_SCORED, FLOW_FACTORY),
]
GRPO_BESIDE = (
    "huggingface/trl sum_then_normalize (not GDPO)",
    "X-GenGroup/Flow-Factory sum, global_std (not GDPO)",
    "X-GenGroup/Flow-Factory sum, group std (not GDPO)",
)


def gdpo_rewards(case: dict, *, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(
        [[[math.nan if r is None else r for r in row] for row in group] for group in case["inputs"]["rewards"]],
        dtype=dtype or getattr(torch, case["inputs"]["dtype"]),
    )


def check_gdpo(ours: Tensor, case: dict, variant: str, exact: bool) -> None:
    expected = torch.tensor(case["outputs"][variant], dtype=torch.float64)
    # In float32 "different scales" has a spread of 0.02 at -4.4, so that their own rounding is 1e-5 of a deviation.
    close = {"atol": 1e-10, "rtol": 1e-10} if exact else {"atol": 1e-5, "rtol": 1e-5}
    assert_close(ours.double(), expected, **close)


def test_every_published_variant_of_gdpo_is_used():
    assert {v for c in GDPO for v in c["outputs"]} == {variant for variant, *_ in PUBLISHED_GDPO} | {*GRPO_BESIDE}


@pytest.mark.parametrize(
    ("variant", "settings", "case"),
    [(variant, settings, c) for variant, cases, settings in PUBLISHED_GDPO for c in cases if variant in c["outputs"]],
    ids=lambda x: x["inputs"]["label"] if isinstance(x, dict) and "inputs" in x else None,
)
def test_published_gdpo(variant, settings, case):
    single = variant == "verl-project/verl" or "float32" in variant
    rewards = gdpo_rewards(case, dtype=torch.float32 if single else None)
    if variant == "NVlabs/GDPO trl":
        rewards = rewards.nan_to_num()
    weights = torch.tensor([case["inputs"]["weights"]], dtype=rewards.dtype)
    if variant == "NVlabs/GDPO verl":
        weights = torch.ones_like(weights)
    check_gdpo(adv.gdpo(rewards, weights, **settings)[..., 0], case, variant, rewards.dtype == torch.float64)


@pytest.mark.parametrize("case", ALL_SCORED, ids=lambda case: case["inputs"]["label"])
def test_published_grpo_beside_gdpo(case):
    rewards = gdpo_rewards(case)
    total = adv.weighted_sum(rewards, torch.tensor([case["inputs"]["weights"]], dtype=rewards.dtype))
    ours = (
        adv.standardize(total, 1e-4),
        adv.normalized(adv.centred(total), total, eps=1e-20),  # theirs is a floor, which only constants reach
        adv.standardize(total, 1e-6, ddof=0, eps_to="floor"),
    )
    for variant, result in zip(GRPO_BESIDE, ours, strict=True):
        check_gdpo(result[..., 0], case, variant, rewards.dtype == torch.float64)


def test_the_settings_of_a_deviation_by_hand():
    column = torch.tensor([[[1.0], [2.0], [3.0]]])  # variance 1, or 2/3 with ddof 0
    for settings, expected in (
        ({"ddof": 0}, math.sqrt(1.5)),
        ({"eps": 1.0}, 0.5),
        ({"eps": 3.0, "eps_to": "variance"}, 0.5),
        ({"eps": 4.0, "eps_to": "floor"}, 0.25),
        ({"eps": 0.5, "eps_to": "floor"}, 1.0),
    ):
        assert_close(adv.standardize(column, **settings).flatten().tolist(), [-expected, 0.0, expected])


def test_gdpo_has_a_deviation_of_its_own_for_groups_and_batch():
    rewards = torch.tensor([[[1.0], [3.0]], [[0.0], [4.0]]], dtype=torch.float64)  # deviations 1 and 2 with ddof 0
    one = torch.ones(1, 1, dtype=torch.float64)
    a = adv.gdpo(rewards, one, ddof=0, group_eps=1.0, eps=0.0)
    # z is -+1/2 and -+2/3, of root mean square sqrt(25/72)
    assert_close(a.flatten(), torch.tensor([-3, 3, -4, 4], dtype=torch.float64) / 6 / math.sqrt(25 / 72))
    floors = adv.gdpo(rewards, one, ddof=0, group_eps=2.0, group_eps_to="floor", eps=3.0, eps_to="floor")
    assert_close(floors.flatten(), torch.tensor([-1, 1, -2, 2], dtype=torch.float64) / 6)
    roots = adv.gdpo(rewards, one, ddof=0, group_eps=0.0, eps=3.0, eps_to="variance")
    assert_close(roots.flatten(), torch.tensor([-1, 1, -1, 1], dtype=torch.float64) / 2)


def test_centred_by_hand():
    a = torch.tensor([[[1.0, 0.0], [3.0, 3.0], [8.0, 0.0]], [[5.0, 5.0], [5.0, 5.0], [5.0, 5.0]]])
    assert adv.centred(a)[0].tolist() == [[-3.0, -1.0], [-1.0, 2.0], [4.0, -1.0]]
    assert (adv.centred(a)[1] == 0).all()
    scored = torch.tensor([[True, True, False], [False, False, False]])
    assert adv.centred(a, scored)[0].tolist() == [[-1.0, -1.5], [1.0, 1.5], [0.0, 0.0]]
    assert (adv.centred(a, scored)[1] == 0).all()


def test_normalized_by_hand():
    everyone = torch.tensor([[[1.0], [3.0]], [[1.0], [99.0]]])
    scored = torch.tensor([[True, True], [True, False]])
    a = torch.tensor([[[2.0], [-1.0]]])
    # 1, 3 and 1 have variance 8/9, or 4/3 with ddof 1
    assert_close(adv.normalized(a, everyone, scored, eps=0.0), a * math.sqrt(9 / 8))
    assert_close(adv.normalized(a, everyone, scored, eps=0.0, ddof=1), a * math.sqrt(3 / 4))
    assert_close(adv.normalized(a, everyone[:1]), a / 1.0001)
    assert_close(adv.normalized(a, everyone[:1], eps=0.0, ddof=1), a / math.sqrt(2))
    assert_close(adv.normalized(a, everyone[:1], eps=1.0), a / 2)


@pytest.mark.parametrize("ddof", [0, 1])
def test_normalized_without_anything_to_measure_leaves_zeros_zero(ddof):
    nothing = torch.zeros(1, 1, 1)
    for scored in (None, torch.zeros(1, 1, dtype=torch.bool)):
        assert adv.normalized(nothing, nothing, scored, ddof=ddof).tolist() == [[[0.0]]]


def test_raw_sum_by_hand():
    rewards = torch.tensor([[[1.0, 10.0], [2.0, 30.0], [3.0, 20.0]]])
    # equal weights: 5.5, 16, 11.5 -> mean 11, unbiased std sqrt(27.75)
    expected = torch.tensor([-5.5, 5.0, 0.5]) / math.sqrt(27.75)
    assert_close(adv.raw_sum(rewards, torch.tensor([[0.5, 0.5]]))[0, :, 0], expected)


def test_log_tamed_keeps_sign_and_tames_outliers():
    rewards = torch.tensor([[[-1000.0, 0.0], [0.0, 0.0], [1.0, 0.0]]])
    weights = torch.tensor([[1.0, 1.0]])
    tamed, raw = (f(rewards, weights)[0, :, 0] for f in (adv.log_tamed, adv.raw_sum))
    assert tamed[0] < tamed[1] < tamed[2]
    assert tamed[2] - tamed[1] > 50 * (raw[2] - raw[1])
    logs = torch.tensor([-math.log(1001), 0.0, math.log(2)])
    assert_close(tamed, (logs - logs.mean()) / logs.std())


def test_identity_gate_by_hand():
    rewards = torch.tensor([[[0.3, 0.9], [0.3, 0.5], [0.8, 0.1], [0.9, 0.3]]])
    # gated: 0.3, 0.3, 0.8 - 5 * 0.4^2 = 0, 0.9 - 5 * 0.2^2 = 0.7
    gated = torch.tensor([0.3, 0.3, 0.0, 0.7])
    expected = (gated - gated.mean()) / gated.std()
    assert_close(GATE(rewards, torch.tensor([[0.9, 0.1]]))[0, :, 0], expected)


def test_cme_by_hand():
    # e = 0, 1/2, 1, 1 (of 3) and c = 1, 1/2, 0, 1: R = 0, 0.4, 0.6, 1
    rewards = torch.tensor([[[0.2, 2.0], [0.5, 1.0], [0.8, -1.0], [3.0, 5.0]]])
    even = torch.ones(2, 2)
    a = adv.cme(rewards, even, zero=[0.2, 0.0], one=[0.8, 2.0])
    expected = torch.tensor([0.0, 0.4, 0.6, 1.0])
    assert_close(a, ((expected - 0.5) / expected.std()).view(1, 4, 1).expand(-1, -1, 2))
    other = adv.cme(rewards, even, zero=[0.2, 0.0], one=[0.8, 2.0], base=0.2)[0, :, 0]
    expected = torch.tensor([0.0, 0.3, 0.2, 1.0])
    assert_close(other, (expected - expected.mean()) / expected.std())
    swapped = adv.cme(rewards.flip(-1), even, execution=(-1,), zero=[0.0, 0.2], one=[2.0, 0.8])
    assert_close(swapped, a)


def test_cme_of_more_rewards_multiplies_execution_and_averages_consistency():
    rewards = torch.tensor([[[0.5, 0.8, 0.0, 1.0], [0.5, 0.4, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]]])
    a = adv.cme(rewards, torch.ones(1, 4), execution=(0, 1), base=0.5, zero=0.0)
    expected = torch.tensor([0.4 * 0.75, 0.2, 0.0])
    assert_close(a.flatten(), (expected - expected.mean()) / expected.std())


def test_a_consistent_copy_is_never_better_than_the_worst_edit():
    copies = torch.tensor([[[0.25, 1.0], [0.2, 0.9], [0.26, 0.0], [0.5, 0.2]]])
    a = adv.cme(copies, torch.ones(1, 2), zero=[0.25, 0.0])[0, :, 0]
    assert a[0] == a[1] == a.min()
    assert a[2] > a[1]


def test_cme_drops_an_image_that_a_constant_reward_could_not_score():
    rewards = torch.tensor([[[0.2, 0.5], [0.4, 0.5], [0.9, math.nan]]])
    assert_close(adv.cme(rewards, torch.ones(1, 2), zero=0.0).flatten().tolist(), [-S, S, 0.0], atol=1e-6, rtol=0)


def test_the_ends_of_cme_do_not_magnify_rounding():
    rounding = 1 + torch.tensor([0.0, 1.0, 2.0]) * torch.finfo(torch.float32).eps
    rewards = torch.stack([rounding, torch.ones(3)], dim=-1).unsqueeze(0)
    assert (adv.cme(rewards, TWO_STEPS, zero=[0.999, 0.0], one=[1.001, 1.0]) == 0).all()
    rewards[..., 1] = torch.tensor([0.0, 0.5, 1.0])
    assert_close(adv.cme(rewards, TWO_STEPS, zero=[0.999, 0.0], one=[1.001, 1.0])[0, :, 0], torch.tensor([-1.0, 0, 1]))


def test_unit_rewards_may_have_ends_of_their_own_for_each_example():
    rewards = torch.tensor([[[1.0, 5.0], [3.0, math.nan]], [[1.0, 5.0], [3.0, 9.0]]])
    low, high = torch.tensor([[[1.0, 0.0]], [[2.0, 4.0]]]), torch.tensor([[[5.0, 10.0]], [[4.0, 8.0]]])
    unit = adv.unit_rewards(rewards, low, high)
    assert_close(unit, torch.tensor([[[0, 0.5], [0.5, math.nan]], [[0, 0.25], [0.5, 1.0]]]), equal_nan=True)
    assert adv.unit_rewards(rewards[1:], 1.0, 3.0).tolist() == [[[0.0, 1.0], [1.0, 1.0]]]
    assert adv.unit_rewards(torch.tensor([[[-1.0], [0.25], [2.0]]])).flatten().tolist() == [0, 0.25, 1]
    door = adv.advantages(adv.cme, rewards[1:], torch.ones(1, 2), zero=low[1:], one=high[1:])
    assert_close(door, adv.cme(rewards[1:], torch.ones(1, 2), zero=low[1:], one=high[1:]))


def test_difficulty_weights_by_hand():
    # means 0, 1/4, 1 and nobody: 1, 9/16, 0 -> 1/2; mean 11/16
    nan = math.nan
    rewards = torch.tensor([[0.0, 0.0], [0.25, nan], [1.0, 1.0], [nan, nan]])
    assert_close(adv.difficulty_weights(rewards), torch.tensor([16.0, 9.0, 8.0, 11.0]) / 11)
    # without the power 1, 3/4, 0 -> 1/4; mean 2/3
    weights = adv.difficulty_weights(rewards, power=1.0, low=0.25)
    assert_close(weights, torch.tensor([12.0, 9.0, 3.0, 8.0]) / 8)
    assert_close(adv.difficulty_weights(torch.tensor([[-2.0], [0.0]])), torch.tensor([5.0, 1.0]) / 3)
    assert_close(adv.difficulty_weights(torch.tensor([[0.0], [-1.0]]), high=2.0), torch.tensor([1.0, 2.0]) / 1.5)


@pytest.mark.parametrize("aggregation", ON_Z + ON_REWARDS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_aggregation_through_the_door(aggregation, dtype):
    rewards = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    rewards[0, 1, 0] = math.nan
    rewards[1, 4] = math.nan
    rewards[2] = 1.7
    a = adv.advantages(aggregation, rewards, TWO_STEPS.to(dtype))
    assert a.shape == (3, 6, 2)
    assert a.dtype == dtype
    assert a.isfinite().all()
    assert (a[1, 4] == 0).all()
    assert a.abs().max() > 0
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert_close(adv.advantages(aggregation, rewards[:, order], TWO_STEPS.to(dtype)), a[:, order])


@pytest.mark.parametrize("aggregation", WITHIN_GROUPS, ids=name)
def test_a_constant_group_has_no_advantage(aggregation):
    rewards = torch.full((1, 12, 2), 12.118589401245117)
    assert (adv.advantages(aggregation, rewards, TWO_STEPS) == 0).all()


@pytest.mark.parametrize("aggregation", WITHIN_GROUPS, ids=name)
def test_prompts_do_not_touch_each_other(aggregation):
    rewards = torch.rand(3, 6, 2, generator=torch.Generator().manual_seed(1))
    together = adv.advantages(aggregation, rewards, TWO_STEPS)
    apart = torch.cat([adv.advantages(aggregation, r[None], TWO_STEPS) for r in rewards])
    assert_close(together, apart)


def test_the_door_closes_on_images_nobody_scored_whatever_the_aggregation_says():
    rewards = torch.tensor([[[1.0, 4.0], [3.0, math.nan], [math.nan, math.inf]]])
    a = adv.advantages(lambda z, weights: torch.ones(1, 3, 2), rewards, TWO_STEPS)
    assert a[0, :, 0].tolist() == [1.0, 1.0, 0.0]


def test_an_aggregation_is_told_what_is_scored_if_it_asks():
    def mine(z: Tensor, weights: Tensor, *, scored: Tensor) -> Tensor:
        return scored.sum(dim=-1, keepdim=True).to(z).expand(-1, -1, len(weights))

    a = adv.advantages(mine, UNSCORED, TWO_STEPS)
    assert a[0, :, 0].tolist() == [1, 2, 2, 0]


def test_raw_values_that_cannot_be_combined_drop_the_image():
    whole = torch.tensor([[[1.0, 4.0], [3.0, math.inf]]])
    expected = {"drops": [5.0, 0.0], "knows better": [5.0, 3.0]}
    for name, total in {"drops": Tensor.sum, "knows better": Tensor.nansum}.items():
        a = adv.advantages(
            lambda rewards, weights, total=total: total(rewards, -1, True).expand(-1, -1, 2), whole, TWO_STEPS
        )
        assert a[0, :, 1].tolist() == expected[name]


@pytest.mark.parametrize("aggregation", [lambda z, weights: z / z, lambda rewards, weights: rewards * math.nan])
def test_nan_for_a_scored_image_is_refused(aggregation):
    with pytest.raises(ValueError, match="returned NaN for an image that was scored"):
        adv.advantages(aggregation, torch.ones(1, 3, 2), TWO_STEPS)


UNSCORED = torch.tensor([[[1.0, math.nan], [3.0, 4.0], [2.0, 6.0], [math.nan, math.nan]]])
"""One image that the second reward could not score, and one that nobody could: z is (-1, 0), (1, -s), (0, s), (0, 0)
with s = 1 / sqrt 2."""
S, T = math.sqrt(0.5), math.tanh(math.sqrt(0.5))
SOFTPLUS = [math.log1p(math.exp(x)) for x in (-1.0, 1.0, 0.0, -S, S)]


def standard(values: list[float]) -> list[float]:
    x = torch.tensor(values, dtype=torch.float64)
    return ((x - x.mean()) / x.std()).tolist()


BY_HAND = [
    (adv.weighted_sum, [-0.7, 0.7 - 0.3 * S, 0.3 * S]),
    (adv.sars, [-0.7, 0.7 - 0.3 * S - 0.4 * T, 0.3 * S]),
    # The bonus of the second and third image is -t and 0, with mean -t/2. Half of the two are in conflict.
    (adv.sars_recentred, [-0.7, 0.7 - 0.3 * S - 0.2 * T, 0.3 * S + 0.2 * T]),
    (adv.sars_by_conflict, [-0.7, 0.7 - 0.3 * S - 0.2 * T, 0.3 * S + 0.2 * T]),
    (adv.gdpo, standard([-0.7, 0.7 - 0.3 * S, 0.3 * S])),
    (adv.minimum, [-1.0, -S, 0.0]),
    (adv.maximum, [-1.0, 1.0, S]),
    (adv.harmonic, [-0.7, 0.7 - 0.3 * S - 0.4 * S / (1 - S + 1e-6), 0.3 * S]),
    (partial(adv.harmonic, punish_conflict=True), [-0.7, 0.7 - 0.3 * S - 0.4 * S / (1 + S), 0.3 * S]),
    (
        adv.product,
        standard(
            [
                SOFTPLUS[0] ** 1.4 * SOFTPLUS[2] ** 0.6,
                SOFTPLUS[1] ** 1.4 * SOFTPLUS[3] ** 0.6,
                SOFTPLUS[2] ** 1.4 * SOFTPLUS[4] ** 0.6,
            ]
        ),
    ),
    (adv.conflict_drop, [-0.7, 0.0, 0.3 * S]),
    # What combines raw values has only the second and third image: 3.3 and 3.2, the same order in logs and at the gate.
    (adv.raw_sum, [0.0, S, -S]),
    (adv.log_tamed, [0.0, S, -S]),
    (GATE, [0.0, S, -S]),
    (CME, [0.0, -S, S]),  # 12/16 (0.6 + 0.4 * 11/16) and 14/16 (0.6 + 0.4 * 10/16)
]


def test_every_aggregation_is_worked_by_hand():
    assert {name(f) for f, _ in BY_HAND} == {name(f) for f in ON_Z + ON_REWARDS}


@pytest.mark.parametrize(("aggregation", "expected"), BY_HAND, ids=[name(f) for f, _ in BY_HAND])
def test_an_image_that_one_reward_cannot_score_by_hand(aggregation, expected):
    a = adv.advantages(aggregation, UNSCORED, torch.tensor([[0.7, 0.3]]))
    assert_close(a.flatten(), torch.tensor([*expected, 0.0]), atol=1e-5, rtol=0)
    if aggregation in (*ON_Z, adv.gdpo):  # 2e38 and 3e38, whose squares and sums are no float32
        huge = adv.advantages(aggregation, UNSCORED * torch.tensor([1.0, 0.5e38]), torch.tensor([[0.7, 0.3]]))
        assert_close(huge, a)


def test_raw_values_near_the_largest_float():
    huge = UNSCORED * 0.5e38
    for aggregation, rewards in (
        (adv.raw_sum, huge),
        (adv.log_tamed, huge * torch.tensor([1.0, -1.0])),
        (GATE, huge * torch.tensor([1.0, -1.0])),
    ):
        a = adv.advantages(aggregation, rewards, torch.tensor([[7.0, 3.0]]))
        assert_close(a.flatten(), torch.tensor([0.0, S, -S, 0.0]))


@pytest.mark.parametrize("aggregation", ON_Z + ON_REWARDS, ids=name)
def test_images_that_nobody_scored_leave_the_statistics(aggregation):
    rewards = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(5))
    nobody = torch.full((2, 3, 2), math.nan)
    a = adv.advantages(aggregation, torch.cat([rewards, nobody], dim=1), TWO_STEPS)
    assert_close(a[:, :5], adv.advantages(aggregation, rewards, TWO_STEPS))
    assert (a[:, 5:] == 0).all()
    assert (adv.advantages(aggregation, nobody, TWO_STEPS) == 0).all()


@pytest.mark.parametrize("aggregation", [f for f in ON_Z if f is not adv.product], ids=name)
@pytest.mark.parametrize("known", [0, 1])
def test_a_reward_with_at_most_one_scored_image_leaves_the_other_as_it_is(aggregation, known):
    rewards = torch.tensor([[[1.0, math.nan], [3.0, math.nan], [2.0, math.nan]]])
    rewards[0, :known, 1] = 7.0
    a = adv.advantages(aggregation, rewards, torch.tensor([[0.7, 0.3]]))
    share = 1.0 if aggregation in (adv.minimum, adv.maximum) else 0.7
    expected = torch.tensor([-share, share, 0.0])
    if known and aggregation is adv.maximum:
        expected[0] = 0.0  # its one scored image is neither better nor worse
    assert_close(a.flatten(), expected)


def test_the_door_clamps_and_passes_settings_on():
    def ten_times(z: Tensor, weights: Tensor, *, factor: float) -> Tensor:
        return factor * adv.weighted_sum(z, weights)

    rewards = torch.rand(1, 8, 2, generator=torch.Generator().manual_seed(0))
    a = adv.advantages(ten_times, rewards, TWO_STEPS, 2.0, factor=10.0)
    assert a.max() == 2.0
    assert a.min() == -2.0
    assert adv.advantages(ten_times, rewards, TWO_STEPS, factor=10.0).max() == 5.0


def test_the_door_reads_the_name_of_the_first_parameter():
    rewards = torch.tensor([[[1.0, 4.0], [3.0, 4.5]]])
    got = adv.advantages(lambda rewards, weights: rewards[..., :1].expand(-1, -1, 2), rewards, TWO_STEPS)
    assert_close(got[0, :, 0], torch.tensor([1.0, 3.0]))
    with pytest.raises(ValueError, match="named z or rewards, got 'scores'"):
        adv.advantages(lambda scores, weights: scores, rewards, TWO_STEPS)
    with pytest.raises(ValueError, match="named z or rewards, got None"):
        adv.advantages(lambda: rewards, rewards, TWO_STEPS)


def test_an_aggregation_that_is_an_object_works():
    class Mine:
        def __call__(self, z: Tensor, weights: Tensor) -> Tensor:
            return adv.weighted_sum(z, weights)

    rewards = torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(0))
    assert_close(adv.advantages(Mine(), rewards, TWO_STEPS), adv.advantages(adv.weighted_sum, rewards, TWO_STEPS))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adv.standardize(torch.rand(2, 1, 2)), "G >= 2"),
        (lambda: adv.standardize(torch.rand(4, 2)), "P, G, K"),
        (lambda: adv.standardize(torch.rand(1, 4, 2), eps_to="mean"), "std, variance or floor, got 'mean'"),
        (lambda: adv.centred(torch.rand(4, 2)), "P, G, S"),
        (lambda: adv.cme(torch.rand(4, 2), TWO_STEPS), "P, G, K"),
        (lambda: adv.cme(torch.rand(1, 4, 2), torch.rand(2)), "S, K"),
        (lambda: adv.cme(torch.rand(1, 4, 2), TWO_STEPS, execution=()), r"columns \[\] of 2"),
        (lambda: adv.cme(torch.rand(1, 4, 2), TWO_STEPS, execution=(0, 1)), r"columns \[0, 1\] of 2"),
        (lambda: adv.unit_rewards(torch.rand(1, 4, 2), [0.0, 1.0], 1.0), r"got zero=\[0.0, 1.0\] and one=1.0"),
        (lambda: adv.difficulty_weights(torch.rand(1, 4, 2)), "P, G"),
        (lambda: adv.normalized(torch.rand(4, 2), torch.rand(4, 2)), "P, G, S"),
        (lambda: adv.sars(torch.rand(1, 4, 2), torch.rand(2)), "S, K"),
        (lambda: adv.advantages(lambda z, weights: z, torch.rand(1, 4, 2), torch.rand(2)), "S, K"),
        (lambda: adv.product(torch.rand(1, 4, 2), torch.rand(2)), "S, K"),
        (lambda: adv.minimum(torch.rand(1, 4, 2), torch.rand(2)), "S, K"),
        (lambda: adv.synergy(torch.rand(4, 2)), "P, G, K"),
        (lambda: adv.synergy(torch.rand(1, 4, 1)), "K >= 2"),
        (lambda: adv.advantages(adv.sars, torch.rand(1, 4, 3), TWO_STEPS), "3 rewards but 2 weights"),
        (lambda: adv.advantages(lambda z, weights: z, torch.rand(1, 4, 2), torch.rand(3, 2)), "returned shape"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_conflict_statistics_by_hand():
    z = torch.tensor(
        [[[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], [[0.0, 1.0], [0.0, 0.0], [0.0, -1.0], [0.0, 0.0]]]
    )
    s = adv.conflict_statistics(z)  # the second group has no spread in the first reward
    assert [float(x) for x in s] == [0.5, 0.25, 0.25, 0.0]


def test_conflict_statistics_know_good_from_bad():
    z = torch.tensor([[[1.0, 1.0], [2.0, 1.0], [-3.0, -2.0]]])
    assert_close(torch.stack(adv.conflict_statistics(z)[:3]), torch.tensor([0.0, 2 / 3, 1 / 3]))


def test_exactly_average_images_count_in_no_share():
    z = torch.tensor([[[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]]])
    assert [float(x) for x in adv.conflict_statistics(z)] == [0.0, 0.0, 0.0, 0.0]


def test_conflict_statistics_correlation_is_pearsons():
    rewards = torch.randn(1, 9, 2, generator=torch.Generator().manual_seed(3))
    s = adv.conflict_statistics(adv.standardize(rewards))
    assert_close(s.correlation, torch.corrcoef(rewards[0].T)[0, 1])


def test_conflict_statistics_leave_unscored_images_out():
    rewards = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [math.nan, 1.0]]])
    z = adv.standardize(rewards)
    assert_close(adv.conflict_statistics(z, rewards.isfinite()).correlation, torch.tensor(1.0))
    assert [float(x) for x in adv.conflict_statistics(z, rewards.isfinite())[:3]] == [0.0, 0.5, 0.5]


def test_conflict_statistics_of_a_pair_are_of_the_images_that_both_scored():
    rewards = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(6))
    rewards[0, :3, 2] = math.nan
    rewards[1, 5:, 1] = math.nan
    got = adv.conflict_statistics(adv.standardize(rewards), rewards.isfinite()).correlation
    pairs = [(rewards[p, :, i], rewards[p, :, j]) for i, j in ((0, 1), (0, 2), (1, 2)) for p in (0, 1)]
    kept = [(a[~(a + b).isnan()], b[~(a + b).isnan()]) for a, b in pairs]
    assert_close(got, torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in kept]).mean())
    two = rewards.masked_fill(torch.arange(8).view(1, 8, 1) > 0, math.nan)  # nothing left to compare
    assert all(x.isnan() for x in adv.conflict_statistics(adv.standardize(two), two.isfinite()))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_group_in_which_one_reward_has_no_spread_counts_in_no_conflict(order):
    rewards = torch.tensor([[[1.0, 7.0], [2.0, 7.0]], [[1.0, 2.0], [2.0, 1.0]]])[..., list(order)]
    alone, both = (adv.conflict_statistics(adv.standardize(some)) for some in (rewards[:1], rewards))
    assert all(value.isnan() for value in alone)
    assert both.conflict == 1


def test_conflict_statistics_without_any_group():
    assert all(x.isnan() for x in adv.conflict_statistics(torch.zeros(2, 4, 2)))


def test_conflict_statistics_of_three_rewards_are_means_over_pairs():
    z = adv.standardize(torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(4)))
    pairs = [adv.conflict_statistics(z[..., list(p)]) for p in ((0, 1), (0, 2), (1, 2))]
    for got, each in zip(adv.conflict_statistics(z), zip(*pairs, strict=True), strict=True):
        assert_close(got, torch.stack(each).mean())


# ---- statistics of groups


def test_variance_is_unbiased_within_groups_and_skips_what_is_unscored() -> None:
    groups = [
        [[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]],  # variance 1; constant
        [[10.0, 0.0], [14.0, math.nan], [math.nan, 2.0]],  # of 10, 14: 8; of 0, 2: 2
        [[1.0, 1.0], [math.nan, 1.0 + 1e-7], [math.nan, 1.0]],  # one value has no variance; rounding is none
    ]
    expected = torch.tensor([[1.0, 0.0], [8.0, 2.0], [math.nan, 0.0]], dtype=torch.float64)
    assert_close(adv.group_variance(torch.tensor(groups)), expected, equal_nan=True)


def test_a_narrow_variance_far_from_zero_keeps_its_digits() -> None:
    rewards = torch.tensor([[[1000.0], [1000.5], [1001.0]]])
    assert float(adv.group_variance(rewards)) == pytest.approx(0.25, rel=1e-12)


def test_correlation_within_groups() -> None:
    groups = [
        [[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]],
        [[1.0, -2.0], [2.0, -4.0], [math.nan, 9.0]],
        [[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]],
    ]
    expected = torch.tensor([1.0, -1.0, math.nan], dtype=torch.float64)
    assert_close(adv.group_correlation(torch.tensor(groups)), expected, equal_nan=True)


def test_the_average_of_small_groups_is_the_true_variance() -> None:
    values = 3.0 * torch.randn(40_000, 2, 1, generator=torch.Generator().manual_seed(0))
    assert float(adv.group_variance(values).mean()) == pytest.approx(9.0, rel=0.03)


def test_modulation_of_cme_follows_the_weights():
    rewards = torch.tensor([[[0.5, 1.0], [1.0, 0.0], [0.25, 0.5]]])
    # weights 0.75 and 0.25: m = 0.4 * 0.25 / 0.5 = 0.2
    a = adv.cme(rewards, torch.tensor([[0.75, 0.25]]), zero=0.0)[0, :, 0]
    expected = torch.tensor([0.5, 0.8, 0.25 * 0.9])
    assert_close(a, (expected - expected.mean()) / expected.std())
    execution_alone = adv.cme(rewards, torch.tensor([[1.0, 0.0]]), zero=0.0)[0, :, 0]
    e = rewards[0, :, 0]
    assert_close(execution_alone, (e - e.mean()) / e.std())


def test_zeros_of_cme_are_measured_for_each_example_where_none_is_given():
    rewards = torch.tensor([[[0.2, 1.0], [0.6, 0.5], [1.0, 0.0]]] * 3)
    copies = torch.tensor([[[0.2, 1.0]], [[0.95, 1.0]], [[math.nan, 1.0]]])
    a = adv.cme(rewards, torch.ones(1, 2), copies=copies)
    for row, zero in enumerate((0.2, 0.9, (0.2 + 0.95) / 2)):  # 0.95 is too near to 1; the last is the mean
        assert_close(a[row], adv.cme(rewards[:1], torch.ones(1, 2), zero=[zero, 0.0])[0])
    with pytest.raises(ValueError, match="give zero, or copies"):
        adv.cme(rewards, torch.ones(1, 2))


@pytest.mark.parametrize("aggregation", WITHIN_GROUPS, ids=name)
def test_examples_may_have_weights_of_their_own(aggregation):
    rewards = torch.rand(2, 6, 2, generator=torch.Generator().manual_seed(1))
    own = torch.stack([TWO_STEPS, TWO_STEPS.flip(-1)])
    apart = [adv.advantages(aggregation, rewards[n : n + 1], own[n]) for n in range(2)]
    assert_close(adv.advantages(aggregation, rewards, own), torch.cat(apart))
