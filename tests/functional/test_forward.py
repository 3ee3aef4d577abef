import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from customized_grpo.functional.advantages import centred, normalized, standardize
from customized_grpo.functional.forward import (
    add_noise,
    awm_log_prob,
    awm_loss,
    draw_levels,
    elbo_weight,
    level_sigmas,
    nft_loss,
    old_policy_decay,
    optimality,
    select_advantages,
    unit_advantages,
    velocity_kl,
)
from customized_grpo.functional.schedule import shifted_sigmas

VECTORS = Path(__file__).parents[1] / "vectors"
NFT = json.loads((VECTORS / "nft.json").read_text())["cases"]
AWM = json.loads((VECTORS / "awm.json").read_text())["cases"]
CLOSE = {torch.float64: {"atol": 1e-10, "rtol": 1e-10}, torch.float32: {"atol": 1e-6, "rtol": 1e-5}}
WEIGHTINGS = {"Uniform": "uniform", "t": "sigma", "t**2": "sigma_squared", "huber": "huber", "ghuber": "ghuber"}


def of_kind(cases: list[dict], *kinds: str) -> list[dict]:
    return [case for case in cases if case["inputs"]["kind"] in kinds]


def tensors(case: dict, *names: str) -> list[Tensor]:
    return [torch.tensor(case["inputs"][name], dtype=getattr(torch, case["inputs"]["dtype"])) for name in names]


def check(ours: Tensor, case: dict, name: str) -> None:
    expected = torch.tensor(case["outputs"][name], dtype=torch.float64)
    assert_close(ours.detach().double(), expected, **CLOSE[getattr(torch, case["inputs"]["dtype"])])


def test_every_published_case_is_used():
    decays = {"old_policy_decay", "old_policy_update", "ema_anchor_decay", "ema_anchor_update"}
    assert {case["inputs"]["kind"] for case in NFT + AWM} == {"loss", "r_mapping", "rewards_to_r"} | decays


@pytest.mark.parametrize("case", of_kind(NFT, "loss"))
def test_published_nft_loss_and_gradient(case):
    i = case["inputs"]
    x0, eps, v, v_old, v_ref, sigma, advantages = tensors(
        case, "x0", "eps", "v", "v_old", "v_ref", "sigma", "advantages"
    )
    v.requires_grad_()
    chosen = select_advantages(advantages, i["adv_mode"])
    check(optimality(chosen, i["adv_clip_max"]), case, "r")
    x = add_noise(x0, eps, sigma)
    nft = nft_loss(v, v_old, x, x0, sigma, chosen, mix=i["beta"], advantage_clip=i["adv_clip_max"])
    assert nft.losses.dtype == v.dtype
    check(nft.positive, case, "positive_loss")
    check(nft.negative, case, "negative_loss")
    check(nft.losses / i["adv_clip_max"], case, "policy_loss_per_row")
    check(nft.losses.mean(), case, "policy_loss")
    kl = velocity_kl(v, v_ref).mean()
    check(kl, case, "kl")
    total = nft.losses.mean() + i["kl_coefficient"] * kl
    check(total, case, "total")
    total.backward()
    check(v.grad, case, "grad_v")


@pytest.mark.parametrize("case", of_kind(NFT, "r_mapping"))
def test_published_optimality(case):
    (advantages,) = tensors(case, "advantages")
    check(
        optimality(select_advantages(advantages, case["inputs"]["adv_mode"]), case["inputs"]["adv_clip_max"]), case, "r"
    )


@pytest.mark.parametrize("case", of_kind(NFT, "rewards_to_r"))
def test_published_rewards_to_optimality(case):
    rewards = tensors(case, "rewards")[0].unsqueeze(-1)
    whole = case["inputs"]["global_std"]
    ours = normalized(centred(rewards), rewards) if whole else standardize(rewards, 1e-4, ddof=0)
    check(ours[..., 0], case, "advantages")
    check(optimality(ours[..., 0], case["inputs"]["adv_clip_max"]), case, "r")
    other = iter(case["others"].values())
    variants = (
        {"ddof": 1, "eps": 1e-4},
        {"ddof": 1, "eps": 1e-8} if whole else {"ddof": 0, "eps": 1e-8, "eps_to": "variance"},
        {"ddof": 1, "eps": 1e-8},
    )
    for settings in variants:
        ours = normalized(centred(rewards), rewards, **settings) if whole else standardize(rewards, **settings)
        expected = torch.tensor(next(other)["advantages"], dtype=torch.float64)
        assert_close(ours[..., 0], expected, **CLOSE[torch.float32])


def schedule(inputs: dict) -> dict:
    by_type = {0: {"top": 0.0}, 1: {"rate": 0.001, "top": 0.5}, 2: {"rate": 0.0075, "top": 0.999, "start": 75}}
    return by_type.get(inputs["decay_type"]) or {"constant": {}, "linear": {"rate": 0.001}}[inputs["decay_type"]]


@pytest.mark.parametrize("case", of_kind(NFT + AWM, "old_policy_decay", "ema_anchor_decay"))
def test_published_decay(case):
    for step, expected in case["outputs"]["decay_by_step"].items():
        assert old_policy_decay(int(step), **schedule(case["inputs"])) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("case", of_kind(NFT + AWM, "old_policy_update", "ema_anchor_update"))
def test_published_moves_of_the_old_policy(case):
    start = "old_at_start" if "old_at_start" in case["inputs"] else "anchor_at_start"
    old, theta = tensors(case, start, "theta")
    published = torch.tensor(next(iter(case["outputs"].values())), dtype=torch.float64)
    for step, new, expected in zip(case["inputs"]["global_step"], theta, published, strict=True):
        old = old.lerp(new, 1 - old_policy_decay(step, **schedule(case["inputs"])))
        assert_close(old, expected, **CLOSE[torch.float64])


@pytest.mark.parametrize("case", of_kind(AWM, "loss"))
def test_published_awm_loss_and_gradient(case):
    i = case["inputs"]
    x0, eps, v, v_old, v_ref, v_ema, sigma, advantages = tensors(
        case, "x0", "eps", "v", "v_old", "v_ref", "v_ema", "sigma", "advantages"
    )
    v.requires_grad_()
    levels, rows = i["timesteps_per_row"], i["rows"]
    settings = {"weighting": WEIGHTINGS[i["weighting"]], "power": i["power"]}
    new, old = (awm_log_prob(u, x0.repeat(levels, 1, 1), eps, sigma, **settings) for u in (v, v_old))
    assert new.dtype == v.dtype
    check(new, case, "log_prob")
    check(new if i["old_is_current"] else old, case, "old_log_prob")
    old = new if i["old_is_current"] else old
    if i["loss_type"] == "sum_first":
        new, old = (log_prob.view(levels, rows).mean(0) for log_prob in (new, old))
    else:
        advantages = advantages.repeat(levels)
    check((new - old).exp(), case, "ratio")
    clip = i["adv_clip_max"]
    scale = clip if i["advantage_max"] is None else i["advantage_max"]
    check(scale * unit_advantages(advantages, clip), case, "advantages_used")
    policy = scale * awm_loss(new, old, advantages, advantage_clip=clip, clip_range=i["clip_range"]).losses.mean()
    check(policy, case, "policy_loss")
    elbo = elbo_weight(sigma)
    check((2 * elbo) ** -0.5, case, "std_dev_t")
    kl = ((elbo if i["kl_weight"] == "ELBO" else 1) * velocity_kl(v, v_ref)).mean()
    ema_kl = ((elbo if i["kl_ema_weight"] == "ELBO" else 1) * velocity_kl(v, v_ema)).mean()
    check(kl, case, "kl")
    check(ema_kl, case, "ema_kl")
    total = policy + i["kl_coefficient"] * kl + i["ema_kl_coefficient"] * ema_kl
    check(total, case, "total")
    total.backward()
    check(v.grad, case, "grad_v")


@pytest.mark.parametrize("case", [c for c in of_kind(AWM, "loss") if any("rescaled" in name for name in c["others"])])
def test_flow_factorys_awm_is_ours_on_advantages_that_it_only_clips(case):
    i = case["inputs"]
    x0, eps, v, v_old, sigma, advantages = tensors(case, "x0", "eps", "v", "v_old", "sigma", "advantages")
    x0, advantages = x0.repeat(i["timesteps_per_row"], 1, 1), advantages.repeat(i["timesteps_per_row"])
    settings = {"weighting": WEIGHTINGS[i["weighting"]], "power": i["power"]}
    new, old = (awm_log_prob(u, x0, eps, sigma, **settings) for u in (v, v_old))
    theirs = case["others"]["X-GenGroup/Flow-Factory"]
    assert_close(new.double(), torch.tensor(theirs["log_prob"], dtype=torch.float64), **CLOSE[torch.float32])
    clip = i["adv_clip_max"]
    policy = clip * awm_loss(new, old, advantages, advantage_clip=clip, clip_range=i["clip_range"]).losses.mean()
    kls = i["kl_coefficient"] * case["outputs"]["kl"] + i["ema_kl_coefficient"] * case["outputs"]["ema_kl"]
    assert float(policy) + kls == pytest.approx(theirs["total"], rel=1e-5)


def one_row(v: list[float], v_old: list[float], advantage: float, **settings: float) -> tuple[float, list[float]]:
    """x0 = 0, eps = 1, sigma = 1/2: the loss of one row with two elements, and its gradient."""
    velocity = torch.tensor(v, dtype=torch.float64).view(1, 2, 1).requires_grad_()
    old, x0 = torch.tensor(v_old, dtype=torch.float64).view(1, 2, 1), torch.zeros(1, 2, 1, dtype=torch.float64)
    sigma = torch.tensor([0.5], dtype=torch.float64)
    x = add_noise(x0, torch.ones_like(x0), sigma)
    nft = nft_loss(velocity, old, x, x0, sigma, torch.tensor([advantage], dtype=torch.float64), **settings)
    nft.losses.sum().backward()
    assert velocity.grad is not None
    return float(nft.losses.detach()), velocity.grad.flatten().tolist()


def test_nft_by_hand():
    # v+ = v, v- = 2 v_old - v; residuals (1 - v+-) / 2: (0, -1) and (1, 1). L+ = (1/2) / (1/2), L- = 1 / 1.
    # r = 1 / 2.5 * 0.5 + 0.5 = 0.7; dL+/dv = -(0, -1) / 2 / (1/2) = (0, 1), dL-/dv = (1, 1) / 2 / 1.
    loss, gradient = one_row([1.0, 3.0], [0.0, 1.0], 0.5)
    assert loss == pytest.approx(1.25)
    assert gradient == pytest.approx([1.25 * 0.3 * 0.5, 1.25 * (0.7 + 0.3 * 0.5)])


def test_nft_with_another_mix_by_hand():
    # v+ = (v + v_old) / 2 = (1, 2), v- = (3 v_old - v) / 2 = (-1, 0): residuals (0, -1/2) and (1, 1/2).
    # L+ = (1/8) / (1/4), L- = (5/8) / (3/4); r = 1 with A = c = 2. The factor is 2 / (1/2).
    loss, gradient = one_row([2.0, 3.0], [0.0, 1.0], 7.0, mix=0.5, advantage_clip=2.0)
    assert loss == pytest.approx(4 * 0.5)
    # d residual / dv = -sigma mix = -1/4: residual * -1/4 / (1/4).
    assert gradient == pytest.approx([0.0, 4 * 0.5])
    loss, gradient = one_row([2.0, 3.0], [0.0, 1.0], -7.0, mix=0.5, advantage_clip=2.0)
    assert loss == pytest.approx(4 * 5 / 6)
    assert gradient == pytest.approx([4 * 0.25 / 0.75, 4 * 0.125 / 0.75])


def test_the_denominator_of_an_exact_prediction_is_limited():
    loss, gradient = one_row([1.0, 1.0 + 2e-6], [1.0, 1.0], 5.0)
    assert loss == pytest.approx(1.25 * 0.5e-12 / 1e-5, rel=1e-6)
    assert gradient == pytest.approx([0.0, 1.25 * 0.5e-6 / 1e-5], rel=1e-6)


def rows(random: torch.Generator, count: int = 4) -> dict[str, Tensor]:
    x0, eps, v = (torch.randn(count, 6, 3, generator=random, dtype=torch.float64) for _ in range(3))
    sigma = torch.linspace(0.2, 1.0, count, dtype=torch.float64)
    return {"x0": x0, "latents": add_noise(x0, eps, sigma), "sigma": sigma, "old_velocity": v}


@given(advantage=st.floats(-4, 4), mix=st.floats(0.05, 3), clip=st.floats(0.2, 5))
def test_at_the_old_velocity_the_gradient_is_the_clipped_advantage_whatever_mix_and_clip(advantage, mix, clip):
    some = rows(torch.Generator().manual_seed(0))
    v, w = (some["old_velocity"].clone().requires_grad_() for _ in range(2))
    a = torch.full((4,), advantage, dtype=torch.float64)
    nft_loss(v, advantages=a, mix=mix, advantage_clip=clip, **some).losses.sum().backward()
    nft_loss(w, advantages=torch.ones_like(a), advantage_clip=1.0, **some).losses.sum().backward()
    assert_close(v.grad, w.grad * max(-clip, min(advantage, clip)), atol=1e-9, rtol=1e-9)
    r = float(optimality(a, clip)[0])
    assert_close(v.grad, w.grad * clip * (2 * r - 1), atol=1e-9, rtol=1e-9)


def test_an_average_image_has_no_gradient_at_the_old_velocity(random):
    some = rows(random)
    v = some["old_velocity"].clone().requires_grad_()
    nft_loss(v, advantages=torch.zeros(4), **some).losses.sum().backward()
    assert_close(v.grad, torch.zeros_like(v), atol=1e-14, rtol=0)


def test_a_step_against_the_gradient_moves_good_images_closer_and_bad_ones_away(random):
    some = rows(random, 2)
    v = some["old_velocity"].clone().requires_grad_()
    nft_loss(v, advantages=torch.tensor([1.0, -1.0]), **some).losses.sum().backward()

    def error(u: Tensor) -> Tensor:
        return (some["latents"] - some["sigma"].view(-1, 1, 1) * u - some["x0"]).square().mean(dim=(1, 2))

    good, bad = (error(v - 0.01 * v.grad) - error(v)).tolist()
    assert good < 0 < bad


def test_only_the_new_velocity_is_trained(random):
    some = rows(random)
    v, old = (some["old_velocity"].clone().requires_grad_() for _ in range(2))
    nft = nft_loss(v, advantages=torch.ones(4), **{**some, "old_velocity": old})
    (nft.losses.sum() + velocity_kl(v, old).sum()).backward()
    assert old.grad is None
    assert not nft.positive.requires_grad
    assert not nft.negative.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_before_anything_is_subtracted(random, dtype):
    some = rows(random)
    v = (some["old_velocity"] + 0.01).to(dtype)
    some["old_velocity"] = some["old_velocity"].to(dtype)
    exact = nft_loss(v.double(), advantages=torch.ones(4), **{n: t.double() for n, t in some.items()})
    half = {name: t if name == "old_velocity" else t.float() for name, t in some.items()}
    ours = nft_loss(v, advantages=torch.ones(4), **half)
    assert ours.losses.dtype == torch.float32
    assert_close(ours.losses.double(), exact.losses, atol=0, rtol=1e-5)
    kl = velocity_kl(v, some["old_velocity"])
    assert kl.dtype == torch.float32
    assert_close(kl.double(), velocity_kl(v.double(), some["old_velocity"].double()), atol=0, rtol=1e-5)
    log_prob = awm_log_prob(v, some["x0"].float(), some["latents"].float(), some["sigma"].float())
    expected = awm_log_prob(v.double(), some["x0"], some["latents"], some["sigma"])
    assert_close(log_prob.double(), expected, atol=0, rtol=1e-5)


def test_means_that_are_divided_by_or_under_a_root_are_taken_in_float64():
    # In float32 the small values would be rounded as they are added to the large one.
    residual = torch.full((1, 2**13, 1), 1e-3)
    residual[0, 0] = 2.0**13
    zero, one, exact = torch.zeros_like(residual), torch.ones(1), residual.double()
    got = nft_loss(zero, zero, residual, zero, one, one, advantage_clip=1.0).positive
    assert_close(got.double(), exact.square().mean((1, 2)) / exact.abs().mean((1, 2)), atol=0, rtol=2e-7)
    residual[0, 1:] = 1.0
    got = awm_log_prob(residual, zero, zero, one, weighting="uniform")
    assert_close(got.double(), -residual.double().square().mean((1, 2)), atol=0, rtol=7e-8)


def test_unit_advantages_and_optimality_by_hand():
    advantages = torch.tensor([-9.0, -1.25, -0.625, 0.0, 0.3125, 1.25, 9.0])
    assert unit_advantages(advantages).tolist() == [-1, -1, -0.5, 0, 0.25, 1, 1]
    assert optimality(advantages).tolist() == [0, 0, 0.25, 0.5, 0.625, 1, 1]


def log_prob_of(error: float, sigma: float, **settings: object) -> float:
    """Two elements, off by 2 * error and 0: m = 2 error^2."""
    v = torch.tensor([1.0 + 2 * error, 1.0], dtype=torch.float64).view(1, 2, 1)
    zero, level = torch.zeros_like(v), torch.tensor([sigma], dtype=torch.float64)
    return float(awm_log_prob(v, zero, zero + 1, level, **settings))


def test_awm_log_prob_by_hand():
    error = math.sqrt(8)  # m = 16
    assert log_prob_of(error, 0.5) == pytest.approx(-0.5 * (2 - 10**-2.5) / 0.25)
    assert log_prob_of(error, 0.5, power=1.0) == pytest.approx(-8)
    assert log_prob_of(error, 0.5, weighting="huber") == pytest.approx(-0.5 * (4 - 1e-5))
    assert log_prob_of(error, 0.5, weighting="uniform") == pytest.approx(-16)
    assert log_prob_of(error, 0.5, weighting="sigma") == pytest.approx(-8)
    assert log_prob_of(error, 0.5, weighting="sigma_squared") == pytest.approx(-4)
    assert log_prob_of(0.0, 0.5) == 0


def test_awm_by_hand():
    log_prob = torch.tensor([math.log(1.5), math.log(3.0), math.log(3.0), math.log(3.0)]).requires_grad_()
    surrogate = awm_loss(log_prob, torch.zeros(4), torch.tensor([0.625, 5.0, -5.0, -0.625]))
    # A' = 1/2, 1, -1, -1/2; the ratio 3 of a good image is clipped to 2.
    assert_close(surrogate.losses.tolist(), [-0.75, -2.0, 3.0, 1.5])
    surrogate.losses.sum().backward()
    assert_close(log_prob.grad.tolist(), [-0.75, 0.0, 3.0, 1.5])
    assert surrogate.clip_share == 0.25


def test_awm_on_the_policy_is_a_weighted_log_prob():
    log_prob = torch.tensor([-0.3, -2.0]).requires_grad_()
    awm_loss(log_prob, log_prob, torch.tensor([2.5, -0.25])).losses.sum().backward()
    assert_close(log_prob.grad.tolist(), [-1.0, 0.2])


def test_velocity_kl_and_its_weight_by_hand():
    v, u = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[0.0], [1.0]]])
    assert velocity_kl(v, u).tolist() == [2.5]
    # s^2 = 0.49 sigma / (1 - min(sigma, 0.99)): 0.49 at 1/2, 49 at 1
    assert_close(elbo_weight(torch.tensor([0.5, 1.0])), torch.tensor([1 / 0.98, 1 / 98]))
    assert_close(elbo_weight(torch.tensor([0.5]), 1.4), torch.tensor([1 / 3.92]))


def test_noise_by_hand():
    x0, eps = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[5.0]], [[6.0]]])
    assert add_noise(x0, eps, torch.tensor([0.25, 1.0])).flatten().tolist() == [2.0, 6.0]
    assert add_noise(x0.bfloat16(), eps.bfloat16(), torch.tensor([0.25, 1.0])).dtype == torch.float32


def test_select_advantages_refuses_another_name():
    with pytest.raises(ValueError, match="got 'some'"):
        select_advantages(torch.zeros(1), "some")


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_levels_are_steps_of_the_grid_without_replacement():
    drawn = [draw_levels(4, 10, generator=draw(seed)) for seed in range(200)]
    steps = torch.stack(drawn) * 10
    assert_close(steps, steps.round(), atol=1e-12, rtol=0)
    assert (steps.diff(dim=1) > 0.5).all()
    assert steps.unique().round().tolist() == list(range(10))
    assert_close(draw_levels(10, 10, generator=draw()), torch.arange(10, dtype=torch.float64) / 10, atol=0, rtol=0)


def test_the_same_key_draws_the_same_levels():
    for continuous in (False, True):
        first, again, other = (draw_levels(4, 25, generator=draw(s), continuous=continuous) for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_levels_stay_in_the_window():
    assert (draw_levels(4, 10, generator=draw(), window=(0.0, 0.4)) * 10).round().tolist() == [0, 1, 2, 3]
    assert (draw_levels(3, 10, generator=draw(), window=(0.35, 0.7)) * 10).round().tolist() == [4, 5, 6]
    assert (draw_levels(1, 3, generator=draw(), window=(1 / 3, 2 / 3)) * 3).tolist() == [1]


def test_continuous_levels_lie_one_in_each_part_of_the_window():
    drawn = torch.stack([draw_levels(4, 10, generator=draw(s), window=(0.2, 0.6), continuous=True) for s in range(500)])
    assert drawn.dtype == torch.float64
    place = (drawn - 0.2) / 0.1 - torch.arange(4)
    assert place.min() >= 0
    assert place.max() < 1
    assert (place.amin(0) < 0.02).all()
    assert (place.amax(0) > 0.98).all()
    assert_close(place.mean(0), torch.full((4,), 0.5, dtype=torch.float64), atol=0.05, rtol=0)
    assert len(drawn.unique()) == 2000


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_the_largest_draw_still_has_noise(count, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, generator: torch.full(shape, 1 - 2**-24, dtype=dtype))
    progress = draw_levels(count, 10, generator=draw(), continuous=True)
    assert progress[-1] < 1
    assert level_sigmas(progress, shifted_sigmas(10, 3.0))[-1] > 0


@given(num_steps=st.integers(1, 60), shift=st.floats(0.5, 5), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_sigmas_on_the_grid_are_exact(num_steps, shift, dtype):
    sigmas = shifted_sigmas(num_steps, shift)
    progress = torch.arange(num_steps + 1, dtype=dtype) / num_steps
    assert torch.equal(level_sigmas(progress, sigmas), sigmas)


def test_sigmas_between_the_points_by_hand():
    sigmas = torch.tensor([1.0, 0.8, 0.0])
    progress = torch.tensor([0.125, 0.25, 0.75], dtype=torch.float64)
    assert_close(level_sigmas(progress, sigmas), torch.tensor([0.95, 0.9, 0.4]))


@given(st.lists(st.floats(0, 1 - 1e-12), min_size=2, max_size=20))
def test_sigma_falls_with_progress_and_is_never_0(progress):
    ours = level_sigmas(
        torch.tensor(sorted(progress), dtype=torch.float64), shifted_sigmas(9, 3.0, dtype=torch.float64)
    )
    assert (ours.diff() <= 1e-15).all()
    assert (ours > 0).all()


def test_the_decay_by_hand():
    assert old_policy_decay(0) == old_policy_decay(1000) == 0.3
    assert [old_policy_decay(s, rate=0.25, top=0.6, start=1) for s in range(5)] == [0, 0, 0.25, 0.5, 0.6]


LATENTS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add_noise(LATENTS, LATENTS[:1], torch.zeros(2)), r"one shape \(B, N, C\)"),
        (lambda: add_noise(LATENTS[0], LATENTS[0], torch.zeros(3)), r"one shape \(B, N, C\)"),
        (lambda: add_noise(LATENTS, LATENTS, torch.zeros(())), r"one number per row \(B,\)"),
        (lambda: nft_loss(*[LATENTS] * 4, torch.ones(2), torch.ones(3)), r"one number per row \(B,\)"),
        (lambda: nft_loss(*[LATENTS] * 3, LATENTS[:1], torch.ones(2), torch.ones(2)), r"one shape \(B, N, C\)"),
        (lambda: nft_loss(*[LATENTS] * 4, torch.ones(2), torch.ones(2), mix=0.0), "mix > 0, got 0.0"),
        (lambda: nft_loss(*[LATENTS] * 4, torch.ones(2), torch.ones(2), advantage_clip=0.0), "advantage_clip > 0"),
        (lambda: awm_log_prob(LATENTS, LATENTS[:1], LATENTS, torch.ones(2)), r"one shape \(B, N, C\)"),
        (lambda: awm_log_prob(*[LATENTS] * 3, torch.ones(2), weighting="t"), "ghuber, got 't'"),
        (lambda: velocity_kl(LATENTS, LATENTS[:1]), r"one shape \(B, N, C\)"),
        (lambda: awm_loss(torch.zeros(2), torch.zeros(2), torch.zeros(3)), "one shape"),
        (lambda: draw_levels(0, 10, generator=draw()), "at least 1 level, got 0"),
        (lambda: draw_levels(5, 10, generator=draw(), window=(0.0, 0.4)), "4 of 10 steps .* 5 levels"),
        (lambda: draw_levels(1, 10, generator=draw(), window=(0.4, 0.4)), "got 0.4 to 0.4"),
        (lambda: draw_levels(1, 10, generator=draw(), window=(-0.1, 0.4)), "got -0.1 to 0.4"),
        (lambda: draw_levels(1, 10, generator=draw(), window=(0.5, 1.1)), "got 0.5 to 1.1"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
