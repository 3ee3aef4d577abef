import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from customized_grpo.functional.sde import Gaussian, log_prob, sample
from customized_grpo.functional.surrogate import approx_kl, clipped_surrogate, gaussian_kl, normalized_log_ratio

CASES = json.loads((Path(__file__).parents[1] / "vectors" / "loss.json").read_text())["cases"]


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


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        clipped_surrogate(torch.zeros(3), torch.zeros(3, 1), 0.1)
