"""`check_policy` passes a good policy and names what is wrong with a bad one."""

import pytest
import torch

import fakes
from customized_grpo.errors import UserError
from customized_grpo.policies import check_policy
from customized_grpo.policies.contract import repeat, rows


def test_a_good_policy_passes_and_is_left_as_it_was():
    policy = fakes.LinearPolicy()
    before = {name: tensor.clone() for name, tensor in policy.trainable_state().items()}
    check_policy(policy, fakes.examples(3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.trainable_state().items())
    assert all(p.grad is None for p in policy.module.parameters())


class ListedConditioning(fakes.LinearPolicy):
    def encode(self, examples):
        return {"colour": [1] * len(examples)}


class WrongEnd(fakes.LinearPolicy):
    def sigmas(self, num_inference_steps, conditioning):
        return torch.linspace(1, 0.1, num_inference_steps + 1)


class Dropout(fakes.LinearPolicy):
    def velocity(self, latents, sigma, conditioning):
        return torch.nn.functional.dropout(super().velocity(latents, sigma, conditioning))


class LooksAtNeighbours(fakes.LinearPolicy):
    def velocity(self, latents, sigma, conditioning):
        velocity = super().velocity(latents, sigma, conditioning)
        return velocity - velocity.mean(0)


class OtherInTraining(fakes.LinearPolicy):
    def velocity(self, latents, sigma, conditioning):
        return super().velocity(latents, sigma, conditioning) * (1.01 if torch.is_grad_enabled() else 1)


class HalfVelocity(fakes.LinearPolicy):
    def velocity(self, latents, sigma, conditioning):
        return super().velocity(latents, sigma, conditioning).half()


class Detached(fakes.LinearPolicy):
    def velocity(self, latents, sigma, conditioning):
        return super().velocity(latents, sigma, conditioning).detach() + 0 * self.unused

    unused = torch.nn.Parameter(torch.zeros(()))


class Overexposed(fakes.LinearPolicy):
    def decode(self, latents, conditioning):
        return super().decode(latents, conditioning) * 2 + 0.5


class Frozen(fakes.LinearPolicy):
    def trainable_parameters(self):
        return []


class Forgetful(fakes.LinearPolicy):
    def load_trainable_state(self, state):
        pass


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ListedConditioning, "must be a tensor with leading axis 3, got list"),
        (WrongEnd, "falling values that end in 0"),
        (Dropout, "differs between two equal calls"),
        (LooksAtNeighbours, "with its neighbours in the batch"),
        (OtherInTraining, r"with gradients differs from velocity without by 1\.0e-02"),
        (HalfVelocity, "must be float32 of shape"),
        (Detached, "reaches none of the trainable parameters"),
        (Overexposed, r"images in \[0, 1\]"),
        (Frozen, "nothing would train"),
        (Forgetful, "does not bring back"),
    ],
)
def test_a_bad_policy_is_told_what_is_wrong(policy, message):
    with pytest.raises(UserError, match=f"{policy.__name__} breaks the policy contract: .*{message}"):
        check_policy(policy(), fakes.examples(3))


def test_the_check_needs_two_examples():
    with pytest.raises(UserError, match="two examples or more, got 1"):
        check_policy(fakes.LinearPolicy(), fakes.examples(1))


def test_rows_are_repeated_next_to_each_other():
    repeated = repeat({"x": torch.tensor([[1], [2]])}, 2)
    assert repeated["x"].flatten().tolist() == [1, 1, 2, 2]
    assert rows(repeated, slice(1, 3))["x"].flatten().tolist() == [1, 2]
