import itertools
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from customized_grpo.functional.sde import (
    Gaussian,
    cps,
    cps_step,
    dance_grpo_diffusion,
    dance_sde,
    flow_grpo_diffusion,
    flow_sde,
    log_prob,
    ode_step,
    sample,
    sde_step,
)

VECTORS = Path(__file__).parents[1] / "vectors"
FLUX = json.loads((VECTORS / "flux_step.json").read_text())["cases"]
FLOW = json.loads((VECTORS / "flow_grpo_step.json").read_text())["cases"]
LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
CLOSE = {torch.float64: {"atol": 1e-10, "rtol": 0}, torch.float32: {"atol": 2e-5, "rtol": 2e-5}}
STOCHASTIC = [dance_sde, flow_sde, cps]


def flux_id(case: dict) -> str:
    i = case["inputs"]
    kind = i.get("kind", "sde" if i["sde_solver"] else "ode")
    return f"{kind}-{i['dtype']}-{i['model_output_dtype']}-{i['index']}-{i['eta']}"


def flux_inputs(case: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    i = case["inputs"]
    dtype = getattr(torch, i["dtype"])
    latents, velocity = (torch.tensor(i[k], dtype=dtype) for k in ("latents", "model_output"))
    return latents, velocity, *(torch.full((len(latents),), i[k], dtype=dtype) for k in ("sigma", "sigma_next"))


@pytest.mark.parametrize(
    "case",
    [c for c in FLUX if "kind" not in c["inputs"] and c["inputs"]["model_output_dtype"] != "bfloat16"],
    ids=flux_id,
)
def test_published_dance_step(case):
    i, o = case["inputs"], case["outputs"]
    inputs = flux_inputs(case)
    dtype = inputs[0].dtype
    step = dance_sde(*inputs, noise_level=i["eta"])
    if not i["sde_solver"]:  # the published code gives its ODE mean the SDE's std
        step = Gaussian(ode_step(*inputs).mean, step.std)
    assert_close(step.mean, torch.tensor(o["prev_sample_mean"], dtype=dtype), **CLOSE[dtype])
    assert_close(step.std.flatten(), torch.full((4,), o["std"], dtype=dtype), **CLOSE[dtype])
    ours = log_prob(step, torch.tensor(i["prev_sample"], dtype=dtype)).float()
    assert_close(ours, torch.tensor(o["log_prob_dancegrpo_with_constants"]), atol=2e-5, rtol=0)
    constants = -math.log(o["std"]) - LOG_SQRT_2PI
    assert_close(ours - constants, torch.tensor(o["log_prob_official_no_constants"]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", [c for c in FLUX if c["inputs"].get("kind") == "sampling"], ids=flux_id)
def test_published_sampling(case):
    i, o = case["inputs"], case["outputs"]
    inputs = flux_inputs(case)
    drawn = torch.tensor(o["prev_sample"])
    if not i["sde_solver"]:
        assert_close(sample(ode_step(*inputs), noise=torch.zeros_like(drawn)), drawn, atol=2e-5, rtol=0)
        return
    step = dance_sde(*inputs, noise_level=i["eta"])
    noise = (drawn - step.mean) / step.std
    assert_close(sample(step, noise=noise), drawn)
    constants = -step.std.flatten().log() - LOG_SQRT_2PI
    published = torch.tensor(o["log_prob_official_no_constants"])
    assert_close(log_prob(step, drawn) - constants, published, atol=2e-5, rtol=0)


def flow_id(case: dict) -> str:
    i = case["inputs"]
    return f"{i['dynamics']}-{i['num_steps']}-{i['step_index'][0]}-{i['noise_level']}"


def flow_inputs(case: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    i = case["inputs"]
    sigmas, index = torch.tensor(i["sigmas"]), torch.tensor(i["step_index"])
    keys = ("sample", "model_output") if "sample" in i else ("latents", "noise_pred")
    # (B, C, H, W) to tokens: the formulas are elementwise, so the order does not matter.
    latents, velocity = (torch.tensor(i[k]).flatten(2).mT for k in keys)
    return latents, velocity, sigmas[index], sigmas[index + 1]


@pytest.mark.parametrize("case", FLOW, ids=flow_id)
def test_published_flow_steps(case):
    i, o = case["inputs"], case["outputs"]
    latents, velocity, sigma, sigma_next = flow_inputs(case)
    dynamics = {
        "flow_sde": partial(flow_sde, noise_level=i["noise_level"]),
        "Flow-SDE": partial(flow_sde, noise_level=i["noise_level"]),
        "Dance-SDE": partial(dance_sde, noise_level=i["noise_level"]),
        "CPS": partial(cps, noise_level=i["noise_level"]),
        "ODE": ode_step,
    }[i["dynamics"]]
    step = dynamics(latents, velocity, sigma, sigma_next)
    mean = torch.tensor(o["prev_sample_mean" if "prev_sample_mean" in o else "next_latents_mean"]).flatten(2).mT
    std_key = "step_std" if "step_std" in o else "std_dev_t"
    published_std = torch.tensor(o[std_key]) * (1 if "step_std" in o else (sigma - sigma_next).sqrt())
    assert_close(step.mean, mean, atol=2e-5, rtol=2e-5)
    assert_close(step.std.flatten(), published_std, atol=2e-5, rtol=2e-5)

    next_latents = torch.tensor(i["prev_sample" if "prev_sample" in i else "next_latents"]).flatten(2).mT
    published = torch.tensor(o["log_prob"])
    if i["dynamics"] == "CPS":  # published without variance and constants
        ours = -((next_latents - step.mean) ** 2).flatten(1).mean(1)
        noisy = step.std.flatten() > 0
        full = log_prob(Gaussian(step.mean[noisy], step.std[noisy]), next_latents[noisy])
        std = step.std.flatten()[noisy]
        assert_close((full + std.log() + LOG_SQRT_2PI) * 2 * std**2, published[noisy], atol=2e-5, rtol=0)
    elif i["dynamics"] == "ODE":  # published as 0; here it has none
        ours = torch.zeros(len(latents))
        with pytest.raises(ValueError, match="deterministic"):
            log_prob(step, next_latents)
    else:
        ours = log_prob(step, next_latents)
    assert_close(ours, published, atol=2e-5, rtol=0)


def step_inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    latents, velocity = (torch.randn(3, 5, 2, generator=g, dtype=dtype) for _ in range(2))
    return latents, velocity, torch.tensor([1.0, 0.6, 0.2], dtype=dtype), torch.tensor([0.9, 0.5, 0.1], dtype=dtype)


def test_sde_step_by_hand():
    one = torch.ones(1, 1, 1)
    step = sde_step(2 * one, one, torch.tensor([0.5]), torch.tensor([0.25]), torch.tensor([2.0]))
    # drift = 1 + 4 / (2 * 0.5) * (2 + 0.5 * 1) = 11; mean = 2 - 0.25 * 11; std = 2 * sqrt(0.25)
    assert_close(step.mean, -0.75 * one)
    assert_close(step.std, one)


def test_cps_step_by_hand():
    one = torch.ones(1, 1, 1)
    step = cps_step(2 * one, one, torch.tensor([0.5]), torch.tensor([0.25]), 1 / 3)
    # image 1.5, noise 2.5; sin 30 deg = 1/2, cos 30 deg
    assert_close(step.mean, (0.75 * 1.5 + 0.25 * math.sqrt(0.75) * 2.5) * one)
    assert_close(step.std, 0.125 * one)


def test_diffusion_coefficients_by_hand():
    sigma = torch.tensor([1.0, 0.5, 0.2])
    assert_close(flow_grpo_diffusion(sigma, 0.7, 0.96), 0.7 * torch.tensor([25.0, 1.0, 0.25]).sqrt())
    assert_close(dance_grpo_diffusion(sigma, 0.4), torch.full((3,), 0.4))


def test_flow_sde_takes_the_schedules_second_sigma_where_sigma_is_one():
    latents, velocity, sigma, sigma_next = step_inputs()
    by_default = flow_sde(latents, velocity, sigma, sigma_next)
    assert_close(by_default.mean, flow_sde(latents, velocity, sigma, sigma_next, sigma_max=0.9).mean)
    assert by_default.std.isfinite().all()
    # 0.7 sqrt(1 / (1 - 0.75)) sqrt(1 - 0.9)
    given = flow_sde(latents, velocity, sigma, sigma_next, sigma_max=0.75)
    assert given.std[0].item() == pytest.approx(1.4 * math.sqrt(0.1))


@pytest.mark.parametrize(("dynamics", "published"), [(dance_sde, 0.4), (flow_sde, 0.7), (cps, 0.7)])
def test_the_published_noise_level_is_the_default(dynamics, published):
    inputs = step_inputs()
    assert torch.equal(dynamics(*inputs).std, dynamics(*inputs, noise_level=published).std)


@pytest.mark.parametrize("dynamics", STOCHASTIC)
def test_without_noise_every_dynamics_is_the_ode(dynamics):
    inputs = step_inputs()
    step = dynamics(*inputs, noise_level=0.0)
    assert_close(step.mean, ode_step(*inputs).mean)
    assert (step.std == 0).all()


@given(sigma=st.floats(0.1, 1.0), share=st.floats(0.0, 0.95), noise_level=st.floats(0.0, 1.0))
def test_cps_keeps_the_marginal(sigma, share, noise_level):
    """Started on the true path, the next latents have exactly (1 - sigma') of image and variance sigma'^2."""
    sigma_next = sigma * share
    image, noise = torch.tensor([[[3.0]]], dtype=torch.float64), torch.tensor([[[1.0]]], dtype=torch.float64)
    s, s_next = (torch.tensor([x], dtype=torch.float64) for x in (sigma, sigma_next))
    of_image = cps_step((1 - s) * image, -image, s, s_next, noise_level)
    of_noise = cps_step(s * noise, noise, s, s_next, noise_level)
    assert_close(of_image.mean.item(), (1 - sigma_next) * 3.0, atol=1e-9, rtol=0)
    assert_close(of_noise.mean.item() ** 2 + of_noise.std.item() ** 2, sigma_next**2, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dynamics", [dance_sde, flow_sde])
def test_sde_keeps_the_marginal_of_the_flow(dynamics):
    """Data N(0, 1): the exact velocity is linear, so the variance can be followed without drawing; dt to 0."""
    steps = 4000
    sigmas = torch.linspace(0.999, 0.3, steps + 1, dtype=torch.float64)
    variance = (1 - sigmas[0]) ** 2 + sigmas[0] ** 2
    for s, s_next in itertools.pairwise(sigmas):
        slope = (2 * s - 1) / ((1 - s) ** 2 + s**2)  # velocity = E[noise - image | x] = slope * x
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        step = dynamics(one, slope * one, s.view(1), s_next.view(1))
        variance = step.mean.squeeze() ** 2 * variance + step.std.squeeze() ** 2
    assert_close(variance.item(), 0.7**2 + 0.3**2, atol=2e-3, rtol=0)


def test_rows_are_independent():
    latents, velocity, sigma, sigma_next = step_inputs()
    whole = flow_sde(latents, velocity, sigma, sigma_next)
    for b in range(3):
        row = flow_sde(latents[b : b + 1], velocity[b : b + 1], sigma[b : b + 1], sigma_next[b : b + 1])
        assert torch.equal(row.mean[0], whole.mean[b])
        assert torch.equal(row.std[0], whole.std[b])


def test_log_prob_is_the_mean_normal_log_density():
    step = dance_sde(*step_inputs())
    x = sample(step, torch.Generator().manual_seed(1))
    reference = torch.distributions.Normal(step.mean, step.std).log_prob(x).mean(dim=(1, 2))
    assert_close(log_prob(step, x), reference)


def test_log_prob_has_a_gradient_in_the_policy_but_not_in_the_sample():
    latents, velocity, sigma, sigma_next = step_inputs()
    velocity.requires_grad_()
    step = dance_sde(latents, velocity, sigma, sigma_next)
    x = sample(step, torch.Generator().manual_seed(1))
    log_prob(step, x).sum().backward()
    noise = (x - step.mean) / step.std
    with torch.no_grad():
        mean_slope = (step.mean - dance_sde(latents, 0 * velocity, sigma, sigma_next).mean) / velocity
    assert_close(velocity.grad, noise.detach() / step.std.detach() * mean_slope / 10)


def test_sample_uses_the_generator_or_the_noise():
    step = dance_sde(*step_inputs())
    noise = torch.randn(step.mean.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(sample(step, torch.Generator().manual_seed(5)), sample(step, noise=noise))
    assert_close(sample(step, noise=0 * noise), step.mean)


def test_noise_is_drawn_on_the_device_of_the_step():
    step = Gaussian(torch.zeros(1, 2, 3, device="meta"), torch.ones(1, 1, 1, device="meta"))
    assert sample(step, torch.Generator()).device.type == "meta"


def test_sampling_has_the_stated_mean_and_std():
    step = Gaussian(torch.full((1, 100, 100), 2.0), torch.full((1, 1, 1), 0.5))
    x = sample(step, torch.Generator().manual_seed(0))
    assert abs(x.mean().item() - 2.0) < 0.02
    assert abs(x.std().item() - 0.5) < 0.01


def test_half_precision_velocity_is_promoted():
    latents, velocity, sigma, sigma_next = step_inputs(dtype=torch.float32)
    assert dance_sde(latents, velocity.bfloat16(), sigma, sigma_next).mean.dtype == torch.float32


@pytest.mark.parametrize("dynamics", [*STOCHASTIC, ode_step])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, v, s, n: (x, v[:1], s, n), "one shape"),
        (lambda x, v, s, n: (x[0], v[0], s, n), "B, N, C"),
        (lambda x, v, s, n: (x, v, s[:1], n[:1]), "one sigma per sample"),
        (lambda x, v, s, n: (x.bfloat16(), v, s, n), "float32 latents"),
    ],
)
def test_wrong_inputs_are_named(dynamics, spoil, message):
    with pytest.raises(ValueError, match=message):
        dynamics(*spoil(*step_inputs()))


def test_other_errors():
    step = dance_sde(*step_inputs())
    with pytest.raises(ValueError, match="got neither"):
        sample(step)
    with pytest.raises(ValueError, match="expected noise of shape"):
        sample(step, noise=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="expected next latents"):
        log_prob(step, torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match="deterministic step"):
        log_prob(ode_step(*step_inputs()), step.mean)
