import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from customized_grpo.functional.sde import Gaussian, flow_sde, log_prob, sample
from customized_grpo.functional.surrogate import (
    approx_kl,
    clipped_surrogate,
    gaussian_kl,
    masked_surrogate,
    normalized_log_ratio,
)

VECTORS = Path(__file__).parents[1] / "vectors"
CASES = json.loads((VECTORS / "loss.json").read_text())["cases"]
DPPO = json.loads((VECTORS / "flow_dppo.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES)
def test_published_loss_and_gradient(case):
    i, o = case["inputs"], case["outputs"]
    dtype = getattr(torch, i["dtype"])
    close = {"atol": 1e-10, "rtol": 0} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 2e-5}

    def tensor(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    new = tensor(i["new_log_probs"]).requires_grad_()
    advantages = tensor(i["advantages_raw"]).clamp(-i["adv_clip_max"], i["adv_clip_max"])
    assert_close(advantages, tensor(o["advantages"]), **close)
    log_ratio = new - tensor(i["old_log_probs"])
    assert_close(log_ratio.exp(), tensor(o["ratio"]), **close)
    result = clipped_surrogate(log_ratio, advantages, i["clip_range"])
    assert_close(result.losses, tensor(o["per_sample_max"]), **close)
    loss = result.losses.mean() / (i["gradient_accumulation_steps"] * i["num_train_timesteps"])
    assert_close(loss, torch.tensor(o["loss"], dtype=dtype), **close)
    loss.backward()
    assert_close(new.grad, tensor(o["grad_new_log_probs"]), **close)

    assert_close(result.clip_share, (tensor(o["grad_new_log_probs"]) == 0).to(dtype).mean(), **close)


def test_surrogate_by_hand():
    log_ratio = torch.tensor([0.3, 0.3, -0.3, -0.3]).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    result = clipped_surrogate(log_ratio, advantages, 0.2)
    up, down = math.exp(0.3), math.exp(-0.3)
    assert_close(result.losses, torch.tensor([-1.2, up, -down, 0.8]))
    assert result.clip_share == 0.5
    assert_close(approx_kl(log_ratio).item(), ((up - 1 - 0.3) + (down - 1 + 0.3)) / 2)


def test_without_advantage_there_is_no_gradient_to_stop():
    assert clipped_surrogate(torch.tensor([0.3, -0.3]), torch.zeros(2), 0.2).clip_share == 0


@given(
    log_ratio=st.lists(st.floats(-1, 1), min_size=1, max_size=8),
    advantage=st.floats(-5, 5),
    clip_range=st.floats(1e-4, 0.5),
)
def test_the_surrogate_is_never_more_optimistic_than_the_ratio(log_ratio, advantage, clip_range):
    log_ratio = torch.tensor(log_ratio, dtype=torch.float64)
    advantages = torch.full_like(log_ratio, advantage)
    result = clipped_surrogate(log_ratio, advantages, clip_range)
    assert (result.losses >= -advantages * log_ratio.exp() - 1e-12).all()
    assert approx_kl(log_ratio) >= 0


def test_on_policy_the_gradient_is_reinforce():
    log_ratio = torch.zeros(3).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5])
    result = clipped_surrogate(log_ratio, advantages, 1e-4)
    result.losses.sum().backward()
    assert_close(log_ratio.grad, -advantages)
    assert result.clip_share == 0
    assert approx_kl(log_ratio) == 0


def test_approx_kl_keeps_its_digits_at_small_ratios():
    small = torch.full((4,), 1e-4)
    assert approx_kl(small).item() == pytest.approx(5e-9, rel=1e-2)


def two_steps(scale: float = 1.0, std: float = 0.5) -> tuple[Gaussian, Gaussian]:
    g = torch.Generator().manual_seed(0)
    old_mean, change = (torch.randn(2, 40, 50, generator=g, dtype=torch.float64) for _ in range(2))
    stds = torch.full((2, 1, 1), std, dtype=torch.float64)
    return Gaussian(old_mean + scale * change, stds), Gaussian(old_mean, stds)


def test_gaussian_kl_is_the_exact_divergence():
    step, base = two_steps()
    exact = torch.distributions.kl_divergence(torch.distributions.Normal(*step), torch.distributions.Normal(*base))
    assert_close(gaussian_kl(step, base), exact.mean(dim=(1, 2)))
    assert (gaussian_kl(base, base) == 0).all()


@pytest.mark.parametrize("std", [0.05, 0.5])
def test_normalized_log_ratio_is_the_noise_times_the_change(std):
    step, old = two_steps(scale=0.01, std=std)
    noise = torch.randn(step.mean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = sample(old, noise=noise)
    ours = normalized_log_ratio(log_prob(step, x) - log_prob(old, x), step, old)
    assert_close(ours, (noise * (step.mean - old.mean)).mean(dim=(1, 2)), atol=1e-12, rtol=1e-6)


def test_normalized_log_ratio_removes_the_bias():
    step, old = two_steps(scale=0.2)
    g = torch.Generator().manual_seed(1)
    plain, guarded = [], []
    for _ in range(200):
        x = sample(old, g)
        log_ratio = log_prob(step, x) - log_prob(old, x)
        plain.append(log_ratio)
        guarded.append(normalized_log_ratio(log_ratio, step, old))
    plain, guarded = torch.stack(plain), torch.stack(guarded)
    assert (plain.mean(0) < -5 * plain.std(0)).all()
    assert (guarded.mean(0).abs() < 0.3 * guarded.std(0)).all()


def dppo(kind: str) -> list[dict]:
    return [case for case in DPPO if case["inputs"]["kind"] == kind]


def rows(values: list) -> torch.Tensor:
    """(B, S, ...) to (B * S, ...) in float64."""
    return torch.tensor(values, dtype=torch.float64).flatten(0, 1)


def check_dppo(case: dict, log_prob: torch.Tensor, old_log_prob: torch.Tensor, kl: torch.Tensor, close: dict) -> None:
    """The mask, loss and gradient of the case, given log-probabilities and divergences per row."""
    i, o = case["inputs"], case["outputs"]
    advantages = torch.tensor(i["advantages"], dtype=log_prob.dtype).repeat_interleave(len(i["trained_steps"]))
    log_prob.retain_grad()
    result = masked_surrogate(log_prob - old_log_prob, advantages, kl, threshold=i["kl_mask_threshold"])
    assert_close(result.losses.double(), rows(o["loss_per_row"]), **close)
    assert_close(result.losses.mean().double(), torch.tensor(o["loss"], dtype=torch.float64), **close)
    assert result.clip_share.item() == pytest.approx(o["metrics"]["masked_fraction"], rel=1e-6)
    result.losses.mean().backward()
    assert_close(log_prob.grad.double(), rows(o["grad_log_prob_new"]), **close)


def test_every_published_case_of_flow_dppo_is_used():
    assert {case["inputs"]["kind"] for case in DPPO} == {"means", "velocity", "std_by_step"}


@pytest.mark.parametrize("case", dppo("means"))
def test_published_mask_loss_and_gradient(case):
    i, o = case["inputs"], case["outputs"]
    dtype = getattr(torch, i["dtype"])
    close = {"atol": 1e-10, "rtol": 0} if dtype == torch.float64 else {"atol": 1e-6, "rtol": 1e-5}
    std = torch.tensor(o["std_used_by_kl"], dtype=dtype).repeat(len(i["mean_new"])).view(-1, 1, 1)
    new, old = (rows(i[name]).to(dtype) for name in ("mean_new", "mean_old"))
    kl = gaussian_kl(Gaussian(new, std), Gaussian(old, std))
    assert_close(kl.double(), rows(o["kl"]), atol=0, rtol=1e-5)
    new_log_prob, old_log_prob = (rows(i[name]).to(dtype) for name in ("log_prob_new", "log_prob_old"))
    check_dppo(case, new_log_prob.requires_grad_(), old_log_prob, kl, close)


@pytest.mark.parametrize("case", dppo("velocity"))
def test_published_mask_with_the_deviation_of_the_step_itself(case):
    i, o = case["inputs"], case["outputs"]
    sigmas, steps, count = torch.tensor(i["sigmas"], dtype=torch.float64), i["trained_steps"], len(i["x"])
    sigma, sigma_next = (sigmas[torch.tensor(steps) + k].repeat(count) for k in (0, 1))
    x, velocity = rows(i["x"]), rows(i["v"]).requires_grad_()
    new, old = (
        flow_sde(x, v, sigma, sigma_next, noise_level=i["eta"], sigma_max=0.99) for v in (velocity, rows(i["v_old"]))
    )
    own = torch.tensor(i["std_of_the_step"], dtype=torch.float64).repeat(count)
    assert_close(new.std.flatten(), own, atol=1e-10, rtol=0)
    x_next = sample(old, noise=rows(i["noise"]))
    # The published divergence has another standard deviation where sigma is between 0.99 and 1.
    theirs = torch.tensor(o["std_used_by_kl"], dtype=torch.float64).repeat(count)
    kl = gaussian_kl(new, old)
    assert_close(kl * (own / theirs) ** 2, rows(o["kl"]), atol=0, rtol=1e-5)
    check_dppo(case, log_prob(new, x_next), log_prob(old, x_next), kl, {"atol": 1e-10, "rtol": 0})
    assert_close(velocity.grad, rows(o["grad_v"]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("case", dppo("std_by_step"))
def test_published_deviations_by_step(case):
    i, o = case["inputs"], case["outputs"]
    sigmas, nothing = torch.tensor(i["sigmas"]), torch.zeros(len(i["sigmas"]) - 1, 1, 1)
    for sigma_max, published in (
        (0.99, o["std_of_unirl_flow_sde_step"]),
        (None, case["others"]["verl-project/verl-omni"]["std_dev_t_times_sqrt_dt"]),
    ):
        step = flow_sde(nothing, nothing, sigmas[:-1], sigmas[1:], noise_level=i["eta"], sigma_max=sigma_max)
        assert_close(step.std.flatten(), torch.tensor(published), atol=0, rtol=1e-5)
    used = torch.tensor(o["std_used_by_kl"])
    same = (sigmas[:-1] <= 0.99) | (sigmas[:-1] == 1)
    own = torch.tensor(o["std_of_unirl_flow_sde_step"])
    assert_close(own[same], used[same], atol=0, rtol=1e-6)
    assert (own[~same] > 1.4 * used[~same]).all()


def test_masked_surrogate_by_hand():
    log_ratio = torch.tensor([0.3, 0.3, -0.3, -0.3, 0.3, 0.0]).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0])
    divergence = torch.tensor([2.0, 2.0, 2.0, 2.0, 0.5, 2.0])
    result = masked_surrogate(log_ratio, advantages, divergence, threshold=1.0)
    up, down = math.exp(0.3), math.exp(-0.3)
    expected = [0.0, up, -down, 0.0, -up, -1.0]
    assert_close(result.losses.tolist(), expected)
    assert result.clip_share.item() == pytest.approx(2 / 6)
    result.losses.sum().backward()
    assert_close(log_ratio.grad.tolist(), expected)
    by_default = masked_surrogate(torch.full((2,), 0.3), torch.ones(2), torch.tensor([0.9e-5, 1.1e-5]))
    assert by_default.clip_share == 0.5


def test_a_dropped_ratio_that_overflows_leaves_no_nan():
    log_ratio = torch.tensor([1e3, 0.0]).requires_grad_()
    result = masked_surrogate(log_ratio, torch.ones(2), torch.ones(2))
    result.losses.sum().backward()
    assert result.losses.tolist() == [0.0, -1.0]
    assert log_ratio.grad.tolist() == [0.0, -1.0]


def test_no_gradient_goes_through_the_divergence():
    step, old = two_steps()
    mean = step.mean.clone().requires_grad_()
    log_ratio = torch.tensor([0.1, -0.1], dtype=torch.float64, requires_grad=True)
    kl = gaussian_kl(Gaussian(mean, step.std), old)
    masked_surrogate(log_ratio, torch.ones(2, dtype=torch.float64), kl).losses.sum().backward()
    assert mean.grad is None


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        clipped_surrogate(torch.zeros(3), torch.zeros(3, 1), 0.1)
    with pytest.raises(ValueError, match=r"got \(3,\), \(3,\) and \(3, 1\)"):
        masked_surrogate(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1))
