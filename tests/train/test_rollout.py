from functools import partial

import torch

import fakes
from customized_grpo.functional import sde
from customized_grpo.randomness import normal
from customized_grpo.train.rollout import complete_dynamics, sample_ode


def test_flow_sde_gets_the_largest_sigma_below_one() -> None:
    sigmas = torch.tensor([1.0, 0.9, 0.0])
    completed = complete_dynamics(sde.flow_sde, sigmas)
    x, half = normal((2, 3), [(0,)]), torch.tensor([0.5])  # the step's own end is not the largest sigma below 1
    given = partial(sde.flow_sde, sigma_max=0.9)
    assert torch.equal(completed(x, x, sigmas[:1], half).std, given(x, x, sigmas[:1], half).std)
    dance = partial(sde.dance_sde, noise_level=0.5)
    assert complete_dynamics(dance, sigmas) is dance
    chosen = partial(sde.flow_sde, sigma_max=0.7)
    assert complete_dynamics(chosen, sigmas) is chosen


def test_every_step_is_taken_at_its_own_sigma() -> None:
    class ByTime(fakes.LinearPolicy):
        def velocity(self, latents, sigma, conditioning):
            return sigma.view(-1, 1, 1).expand_as(latents)

    policy, (_, middle, _) = ByTime(), fakes.shifted_sigmas(2, 1.5).tolist()
    noise = normal((fakes.TOKENS, fakes.CHANNELS), [("any",)])
    expected = policy.decode(noise + (middle - 1) - middle**2, {})
    torch.testing.assert_close(sample_ode(policy, policy.encode(fakes.examples(1)), noise, 2), expected)


def test_images_carry_no_gradient_of_a_decoder_with_weights() -> None:
    class Decoding(fakes.LinearPolicy):
        weight = torch.nn.Parameter(torch.ones(()))

        def decode(self, latents, conditioning):
            return self.weight * super().decode(latents, conditioning)

    policy = Decoding()
    images = sample_ode(policy, policy.encode(fakes.examples(1)), normal((fakes.TOKENS, fakes.CHANNELS), [("any",)]), 2)
    assert not images.requires_grad
