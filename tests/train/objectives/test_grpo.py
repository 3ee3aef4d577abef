import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch

import fakes
from customized_grpo.functional import sde
from customized_grpo.functional.schedule import StepPlan
from customized_grpo.policies.contract import Policy, repeat, rows
from customized_grpo.settings.parse import parse_config
from customized_grpo.train.meters import Meter
from customized_grpo.train.objectives import MicroBatch, Plan, make_objective
from customized_grpo.train.objectives.grpo import Trajectories
from customized_grpo.train.rollout import RowNoise, sample_ode
from customized_grpo.train.settings import TrainerConfig

DYNAMICS = partial(sde.dance_sde, noise_level=0.5)


def collect(
    policy: Policy, stochastic: list[int], trained: list[int], slots: tuple[int, ...] = (0, 1),
    noise_level: float = 0.5, method: dict[str, Any] | None = None, **rollout: Any,
) -> Trajectories:  # fmt: skip
    dynamics = {"use": "dance_sde", "noise_level": noise_level}
    tree = {
        "rollout": {"num_generations": 3, "num_inference_steps": 5, "dynamics": dynamics, **rollout},
        "method": method or {"ratio_norm": False},
    }
    objective = make_objective(policy, parse_config(tree, TrainerConfig))
    steps = StepPlan(torch.tensor(stochastic), torch.tensor(trained))
    conditioning = rows(policy.encode(fakes.examples(2)), torch.tensor(slots))
    noise = RowNoise(0, 1, list(slots), 3)
    found = objective.collect(conditioning, Plan(steps.trained / 5, steps), noise, lambda name: nullcontext())
    assert isinstance(found, Trajectories)
    return found


def test_log_probs_are_those_of_the_kept_steps() -> None:
    policy = fakes.LinearPolicy()
    rollout = collect(policy, [0, 1, 2, 3], [1, 3])
    assert rollout.latents.shape == (6, 2, fakes.TOKENS, fakes.CHANNELS)
    assert len(rollout) == 6
    for column, step in enumerate([1, 3]):
        sigma, sigma_next = (rollout.sigmas[i].expand(6) for i in (step, step + 1))
        with torch.no_grad():
            velocity = policy.velocity(rollout.latents[:, column], sigma, rollout.conditioning)
        gaussian = DYNAMICS(rollout.latents[:, column], velocity, sigma, sigma_next)
        expected = sde.log_prob(gaussian, rollout.next_latents[:, column])
        assert torch.equal(rollout.log_probs[:, column], expected)


def test_a_shared_prefix_costs_one_row_per_prompt_and_changes_nothing() -> None:
    calls: list[int] = []

    class Counting(fakes.LinearPolicy):
        def velocity(self, latents, sigma, conditioning):
            calls.append(len(latents))
            return super().velocity(latents, sigma, conditioning)

    rollout = collect(Counting(), [2, 3], [2, 3])
    assert calls == [2, 2, 2, 6, 6]
    for group in rollout.latents[:, 0].split(3):
        assert torch.equal(group, group[:1].expand_as(group))
    assert not torch.equal(rollout.next_latents[0, 0], rollout.next_latents[1, 0])


def test_noise_that_is_not_shared_differs_within_the_group() -> None:
    rollout = collect(fakes.LinearPolicy(), [0], [0], share_initial_noise=False)
    assert not torch.equal(rollout.latents[0], rollout.latents[1])
    before_the_first_step = RowNoise(0, 1, [0, 1], 3).per_row((fakes.TOKENS, fakes.CHANNELS), -1)
    assert torch.equal(rollout.latents[:, 0], before_the_first_step)


def test_a_row_depends_on_its_slot_not_on_its_neighbours() -> None:
    policy = fakes.LinearPolicy()
    both, alone = collect(policy, [0, 1], [0, 1]), collect(policy, [0, 1], [0, 1], slots=(1,))
    torch.testing.assert_close(both.images[3:], alone.images, rtol=0, atol=1e-6)


def test_without_stochastic_noise_left_a_rollout_ends_where_the_ode_does() -> None:
    policy = fakes.LinearPolicy()
    rollout = collect(policy, [0, 1, 2, 3], [0], noise_level=1e-6)
    noise = RowNoise(0, 1, [0, 1], 3)
    initial = noise.per_prompt((fakes.TOKENS, fakes.CHANNELS)).repeat_interleave(3, dim=0)
    expected = sample_ode(policy, repeat(policy.encode(fakes.examples(2)), 3), initial, 5)
    torch.testing.assert_close(rollout.images, expected, rtol=0, atol=1e-5)


def test_means_are_kept_where_they_are_asked_for() -> None:
    policy = fakes.LinearPolicy()
    assert collect(policy, [0, 1, 2, 3], [1, 3]).means is None
    for method in ({}, {"ratio_norm": True}):
        rollout = collect(policy, [0, 1, 2, 3], [1, 3], method={"clip_range": 1e-3, **method})
        assert rollout.means is not None
        for column, step in enumerate([1, 3]):
            drawn = RowNoise(0, 1, [0, 1], 3).per_row((fakes.TOKENS, fakes.CHANNELS), step)
            std = 0.5 * (rollout.sigmas[step] - rollout.sigmas[step + 1]).sqrt()
            torch.testing.assert_close(rollout.means[:, column] + std * drawn, rollout.next_latents[:, column])


def test_with_a_threshold_the_steps_that_moved_too_far_are_dropped() -> None:
    """Against the formula, row by row, after the weights have moved."""
    policy, threshold = fakes.LinearPolicy(), 2e-4
    config = parse_config(
        {"objective": {"use": "grpo", "divergence_threshold": threshold}, "training": {"micro_batch": None},
         "rollout": {"num_generations": 3, "num_inference_steps": 5, "dynamics": {"use": "dance_sde"}}}, TrainerConfig,
    )  # fmt: skip
    objective, meter = make_objective(policy, config), Meter()
    conditioning, noise, plan = policy.encode(fakes.examples(2)), RowNoise(0, 1, [0, 1], 3), objective.plan(1)
    rollout = objective.collect(conditioning, plan, noise, lambda name: nullcontext())
    assert isinstance(rollout, Trajectories)
    assert rollout.means is not None
    with torch.no_grad():
        policy.module.bias.add_(0.03)
    advantages, expected, dropped = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0]), [], 0
    for row, a in enumerate(advantages.tolist()):
        step = int(rollout.steps[1])
        sigma, after = rollout.sigmas[step], rollout.sigmas[step + 1]
        std = 0.4 * float((sigma - after).sqrt())
        some = slice(row, row + 1)
        with torch.no_grad():
            velocity = policy.velocity(rollout.latents[some, 1], sigma.expand(1), rows(rollout.conditioning, some))
        given = (rollout.latents[some, 1], velocity, sigma.expand(1), after.expand(1))
        mean = sde.dance_sde(*given, noise_level=0.4).mean[0]
        kl = float(((mean - rollout.means[row, 1]) ** 2).mean()) / (2 * std**2)
        x = rollout.next_latents[row, 1]
        ratio = math.exp(float((((x - rollout.means[row, 1]) ** 2 - (x - mean) ** 2) / (2 * std**2)).mean()))
        drop = kl >= threshold and ((ratio > 1 and a > 0) or (ratio < 1 and a < 0))
        dropped += drop
        expected.append(0.0 if drop else -a * ratio)
    batch = MicroBatch(rollout, slice(0, 6), 1, advantages, 1.0, first=False)
    assert float(objective.loss(batch, meter).detach()) == pytest.approx(sum(expected) / 6, abs=1e-5)
    assert 0 < dropped < 6
    assert meter.means()["update/clip_share"] == pytest.approx(dropped / 6)


def test_predicted_images_are_those_before_and_after_the_trained_steps() -> None:
    policy = fakes.LinearPolicy()
    rollout = collect(policy, [0, 1, 2, 3, 4], [0, 3, 4], method={"credit": "stepwise"})
    assert rollout.previews.keys() == {0, 1, 3, 4}
    for step, column in {0: 0, 3: 1, 4: 2}.items():
        latents, sigma = rollout.latents[:, column], rollout.sigmas[step]
        with torch.no_grad():
            velocity = policy.velocity(latents, sigma.expand(6), rollout.conditioning)
        assert torch.equal(rollout.previews[step], policy.decode(latents - sigma * velocity, rollout.conditioning))
    assert not collect(policy, [0, 1], [0, 1]).previews


def test_the_hinge_is_what_the_norm_of_the_velocity_has_too_much() -> None:
    policy = fakes.LinearPolicy()
    rollout = collect(policy, [0, 1], [0, 1])
    with torch.no_grad():
        policy.module.weight.mul_(3.0)
    latents, sigma = rollout.latents[:, 1], rollout.sigmas[1].expand(6)
    with torch.no_grad():
        norms = policy.velocity(latents, sigma, rollout.conditioning).square().mean((1, 2)).sqrt()
        with policy.base():
            norms = norms / policy.velocity(latents, sigma, rollout.conditioning).square().mean((1, 2)).sqrt()
    assert int((norms > 1).sum()) > 0

    def loss(**method: float) -> tuple[float, Meter]:
        tree = {"rollout": {"num_generations": 3, "num_inference_steps": 5, "dynamics": {"use": "dance_sde"}},
                "method": {"ratio_norm": False, **method}}  # fmt: skip
        objective, meter = make_objective(policy, parse_config(tree, TrainerConfig)), Meter()
        batch = MicroBatch(rollout, slice(0, 6), 1, torch.ones(6), 1.0, first=False)
        return float(objective.loss(batch, meter).detach()), meter

    with_hinge, meter = loss(norm_hinge=0.7)
    expected = 0.7 * float((norms - 1).clamp(min=0).mean())
    assert with_hinge - loss()[0] == pytest.approx(expected, rel=1e-3)
    assert meter.means()["update/velocity_norm"] == pytest.approx(float(norms.mean()), rel=1e-5)
