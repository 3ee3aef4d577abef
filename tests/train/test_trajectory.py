import itertools
import math

import pytest
import torch

import fakes
from customized_grpo.functional import sde
from customized_grpo.functional.schedule import shifted_sigmas
from customized_grpo.policies.contract import rows
from customized_grpo.randomness import normal
from customized_grpo.train.trajectory import last, trajectory

SIGMAS = shifted_sigmas(4, 1.5)
ROWS, GROUP = 2, 3
SHAPE = fakes.TOKENS, fakes.CHANNELS


def noise_of(steps, count=ROWS * GROUP):
    return lambda index: normal(SHAPE, [(index, row) for row in range(count)]) if index in steps else None


@pytest.fixture
def start():
    policy = fakes.LinearPolicy()
    latents = normal(SHAPE, [("initial", row) for row in range(ROWS)])

    def velocity(latents, sigma, conditioning):
        return policy.velocity(latents, sigma, conditioning) * (1 + sigma.view(-1, 1, 1))

    with torch.no_grad():
        yield velocity, policy.encode(fakes.examples(ROWS)), latents, SIGMAS


def test_each_step_leads_from_its_sigma_to_the_next(start):
    velocity, conditioning, latents, sigmas = start
    for index, step in enumerate(trajectory(*start)):
        assert step.index == index
        assert torch.equal(step.latents, latents)
        assert torch.equal(step.sigma, sigmas[index].expand(ROWS))
        assert torch.equal(step.velocity, velocity(latents, step.sigma, conditioning))
        latents = latents + (sigmas[index + 1] - sigmas[index]) * step.velocity
        assert torch.equal(step.next_latents, latents)
    assert index == 3


def test_steps_with_noise_are_drawn_from_the_dynamics(start):
    noise = noise_of({0, 2}, ROWS)
    for step in trajectory(*start, dynamics=sde.dance_sde, noise=noise):
        ends = SIGMAS[step.index].expand(ROWS), SIGMAS[step.index + 1].expand(ROWS)
        dynamics = sde.ode_step if step.index in (1, 3) else sde.dance_sde
        expected = dynamics(step.latents, step.velocity, *ends)
        assert torch.equal(step.gaussian.mean, expected.mean)
        assert torch.equal(step.gaussian.std, expected.std)
        drawn = noise(step.index)
        assert torch.equal(step.next_latents, expected.mean if drawn is None else sde.sample(expected, noise=drawn))


def test_a_group_is_one_row_until_its_first_noise(start):
    velocity, conditioning, latents, sigmas = start
    computed = []

    def counting(x, sigma, c):
        computed.append(len(x))
        return velocity(x, sigma, c)

    noise = noise_of({1, 2})
    steps = list(trajectory(counting, conditioning, latents, sigmas, dynamics=sde.dance_sde, noise=noise))
    assert computed == [2, 2, 6, 6]
    assert [len(step.latents) for step in steps] == [2, 6, 6, 6]
    assert [len(step.conditioning["colour"]) for step in steps] == [2, 6, 6, 6]
    for row in range(ROWS * GROUP):  # each row is what it is alone
        of, one = slice(row // GROUP, row // GROUP + 1), slice(row, row + 1)
        own = trajectory(
            velocity, rows(conditioning, of), latents[of], sigmas, dynamics=sde.dance_sde,
            noise=lambda i, one=one: None if (drawn := noise(i)) is None else drawn[one],
        )  # fmt: skip
        torch.testing.assert_close(last(own).next_latents, steps[-1].next_latents[one], rtol=0, atol=1e-6)


def test_it_goes_on_from_any_step(start):
    velocity, conditioning, _, sigmas = start
    whole = list(trajectory(*start, noise=noise_of({2}), dynamics=sde.dance_sde))
    rest = trajectory(
        velocity, conditioning, whole[2].latents[::GROUP], sigmas, noise=noise_of({2}), dynamics=sde.dance_sde, start=2
    )
    for a, b in zip(whole[2:], rest, strict=True):
        assert a.index == b.index
        assert torch.equal(a.next_latents, b.next_latents)


def test_heun_takes_the_steps_without_noise(start):
    velocity, _, _, sigmas = start
    steps = list(trajectory(*start, solver="heun", noise=noise_of({1}), dynamics=sde.dance_sde))
    for step, (sigma, after) in zip(steps, itertools.pairwise(sigmas.tolist()), strict=True):
        euler = step.latents + (after - sigma) * step.velocity
        ahead = velocity(euler, torch.full((len(euler),), after), step.conditioning)
        expected = step.latents + (after - sigma) * (step.velocity + ahead) / 2 if after else euler
        assert torch.allclose(step.next_latents, expected, rtol=0, atol=1e-6) == (step.index != 1)


def test_heun_errs_less_than_euler():
    """dx / dsigma = x from sigma 1 to 0: the image is noise / e."""
    sigmas, noise = torch.linspace(1, 0, 9, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    ends = [
        float(last(trajectory(lambda x, sigma, _: x, {}, noise, sigmas, solver=solver)).next_latents)
        for solver in ("euler", "heun")
    ]
    errors = [abs(end - math.exp(-1)) for end in ends]
    assert errors[1] < 0.5 * errors[0]


def test_noise_for_other_rows_is_refused(start):
    for count in (1, 5):
        with pytest.raises(ValueError, match="expected noise of shape"):
            last(trajectory(*start, dynamics=sde.dance_sde, noise=noise_of({1}, count)))


def test_the_last_step_has_the_end(start):
    assert torch.equal(last(trajectory(*start)).next_latents, list(trajectory(*start))[-1].next_latents)


def test_gradients_are_the_callers_choice(start):
    assert not last(trajectory(*start)).next_latents.requires_grad
    with torch.enable_grad():
        assert last(trajectory(*start)).next_latents.requires_grad
