from functools import partial

import torch

import fakes
from customized_grpo.functional import sde
from customized_grpo.functional.schedule import StepPlan
from customized_grpo.policies.contract import repeat, rows
from customized_grpo.randomness import normal
from customized_grpo.train.rollout import RowNoise, collect, complete_dynamics, sample_ode
from customized_grpo.train.settings import RolloutSettings

SETTINGS = RolloutSettings(num_generations=3, num_inference_steps=5)
DYNAMICS = partial(sde.dance_sde, noise_level=0.5)


def plan(stochastic: list[int], trained: list[int]) -> StepPlan:
    return StepPlan(torch.tensor(stochastic), torch.tensor(trained))


def gather(policy, steps: StepPlan, settings: RolloutSettings = SETTINGS, slots=(0, 1), iteration=1):
    conditioning = policy.encode(fakes.examples(len(slots)))
    noise = RowNoise(0, iteration, list(slots), settings.num_generations)
    return collect(policy, conditioning, steps, noise, settings, DYNAMICS)


def test_log_probs_are_those_of_the_kept_steps() -> None:
    policy = fakes.LinearPolicy()
    rollout = gather(policy, plan([0, 1, 2, 3], [1, 3]))
    assert rollout.latents.shape == (6, 2, fakes.TOKENS, fakes.CHANNELS)
    for column, step in enumerate([1, 3]):
        sigma, sigma_next = (rollout.sigmas[i].expand(6) for i in (step, step + 1))
        with torch.no_grad():
            velocity = policy.velocity(rollout.latents[:, column], sigma, rollout.conditioning)
        gaussian = DYNAMICS(rollout.latents[:, column], velocity, sigma, sigma_next)
        expected = sde.log_prob(gaussian, rollout.next_latents[:, column])
        assert torch.equal(rollout.log_probs[:, column], expected)
    assert rollout.progress.tolist() == [1 / 5, 3 / 5] or torch.allclose(rollout.progress, torch.tensor([0.2, 0.6]))


def test_a_shared_prefix_costs_one_row_per_prompt_and_changes_nothing() -> None:
    calls: list[int] = []

    class Counting(fakes.LinearPolicy):
        def velocity(self, latents, sigma, conditioning):
            calls.append(len(latents))
            return super().velocity(latents, sigma, conditioning)

    rollout = gather(Counting(), plan([2, 3], [2, 3]))
    assert calls == [2, 2, 2, 6, 6]
    for group in rollout.latents[:, 0].split(3):
        assert torch.equal(group, group[:1].expand_as(group))
    assert not torch.equal(rollout.next_latents[0, 0], rollout.next_latents[1, 0])


def test_noise_that_is_not_shared_differs_within_the_group() -> None:
    own = SETTINGS.model_copy(update={"share_initial_noise": False})
    rollout = gather(fakes.LinearPolicy(), plan([0], [0]), own)
    assert not torch.equal(rollout.latents[0], rollout.latents[1])
    before_the_first_step = RowNoise(0, 1, [0, 1], 3).per_row((fakes.TOKENS, fakes.CHANNELS), -1)
    assert torch.equal(rollout.latents[:, 0], before_the_first_step)


def test_a_row_depends_on_its_slot_not_on_its_neighbours() -> None:
    policy = fakes.LinearPolicy()
    both = gather(policy, plan([0, 1], [0, 1]), slots=(0, 1))
    conditioning = rows(policy.encode(fakes.examples(2)), slice(1, 2))
    noise = RowNoise(0, 1, [1], 3)
    alone = collect(policy, conditioning, plan([0, 1], [0, 1]), noise, SETTINGS, DYNAMICS)
    torch.testing.assert_close(both.images[3:], alone.images, rtol=0, atol=1e-6)


def test_without_stochastic_noise_left_a_rollout_ends_where_the_ode_does() -> None:
    policy, settings = fakes.LinearPolicy(), SETTINGS
    tiny = partial(sde.dance_sde, noise_level=1e-6)
    conditioning = policy.encode(fakes.examples(2))
    noise = RowNoise(0, 1, [0, 1], 3)
    rollout = collect(policy, conditioning, plan([0, 1, 2, 3], [0]), noise, settings, tiny)
    initial = noise.per_prompt((fakes.TOKENS, fakes.CHANNELS)).repeat_interleave(3, dim=0)
    expected = sample_ode(policy, repeat(conditioning, 3), initial, 5)
    torch.testing.assert_close(rollout.images, expected, rtol=0, atol=1e-5)


def test_flow_sde_gets_the_largest_sigma_below_one() -> None:
    sigmas = torch.tensor([1.0, 0.9, 0.0])
    completed = complete_dynamics(sde.flow_sde, sigmas)
    x, half = normal((2, 3), [(0,)]), torch.tensor([0.5])  # the step's own end is not the largest sigma below 1
    given = partial(sde.flow_sde, sigma_max=0.9)
    assert torch.equal(completed(x, x, sigmas[:1], half).std, given(x, x, sigmas[:1], half).std)
    assert complete_dynamics(DYNAMICS, sigmas) is DYNAMICS
    chosen = partial(sde.flow_sde, sigma_max=0.7)
    assert complete_dynamics(chosen, sigmas) is chosen


def test_means_are_kept_where_they_are_asked_for() -> None:
    policy, steps = fakes.LinearPolicy(), plan([0, 1, 2, 3], [1, 3])
    conditioning, noise = policy.encode(fakes.examples(2)), RowNoise(0, 1, [0, 1], 3)
    assert collect(policy, conditioning, steps, noise, SETTINGS, DYNAMICS).means is None
    rollout = collect(policy, conditioning, steps, noise, SETTINGS, DYNAMICS, keep_means=True)
    assert rollout.means is not None
    for column, step in enumerate([1, 3]):
        drawn = noise.per_row((fakes.TOKENS, fakes.CHANNELS), step)
        std = 0.5 * (rollout.sigmas[step] - rollout.sigmas[step + 1]).sqrt()
        torch.testing.assert_close(rollout.means[:, column] + std * drawn, rollout.next_latents[:, column])


def test_every_step_is_taken_at_its_own_sigma() -> None:
    class ByTime(fakes.LinearPolicy):
        def velocity(self, latents, sigma, conditioning):
            return sigma.view(-1, 1, 1).expand_as(latents)

    policy, (_, middle, _) = ByTime(), fakes.shifted_sigmas(2, 1.5).tolist()
    noise = normal((fakes.TOKENS, fakes.CHANNELS), [("any",)])
    expected = policy.decode(noise + (middle - 1) - middle**2, {})
    torch.testing.assert_close(sample_ode(policy, policy.encode(fakes.examples(1)), noise, 2), expected)
