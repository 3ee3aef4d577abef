"""Branches of linear policies, whose truth is arithmetic."""

import pytest
import torch

from customized_grpo.errors import UserError
from customized_grpo.functional import sde
from customized_grpo.functional.advantages import standardize
from customized_grpo.functional.surrogate import clipped_surrogate
from customized_grpo.policies.contract import repeat, rows
from customized_grpo.studies.probe import Branches, Probe, ProbeSettings, choose, measure_all
from customized_grpo.studies.probe.findings import group_variance
from studies.probe import linear


@pytest.mark.parametrize("rates", [(-2.0, 2.0), (0.5, 0.5)])
def test_the_variance_of_each_step_is_that_of_the_linear_map_after_it(rates: tuple[float, float]) -> None:
    probe = linear.probe(rates, examples=2, branches=4000)
    measured = [group_variance(branches.rewards).mean(0) for branches in measure_all(probe)]
    expected = linear.variances(rates, probe.num_inference_steps)
    torch.testing.assert_close(torch.stack(measured), expected, rtol=0.06, atol=0)


def test_branches_differ_by_the_noise_of_their_step_alone() -> None:
    probe = linear.probe((0.5, 0.5), examples=2, branches=3, noise_level=0.001)
    first = probe.measure((0,)).rewards
    last = probe.measure((3,)).rewards
    assert float((first.mean(1) - last.mean(1)).abs().max()) < 0.005
    assert not torch.equal(first, last)


def test_a_draw_depends_on_its_key_and_not_on_the_batch() -> None:
    small = linear.probe((-1.0, 1.0), batch=1).measure((1,))
    large = linear.probe((-1.0, 1.0), batch=1000).measure((1,))
    assert torch.equal(small.rewards, large.rewards)
    torch.testing.assert_close(small.gram, large.gram)
    fewer = linear.probe((-1.0, 1.0), examples=3).measure((1,))
    assert torch.equal(fewer.rewards, large.rewards[:3])
    other = linear.probe((-1.0, 1.0), seed=1).measure((1,))
    assert not torch.equal(other.rewards, large.rewards)


def test_the_shared_trajectory_is_computed_once_per_example() -> None:
    probe = linear.probe((1.0, 1.0), examples=4, branches=3, gradients=False)
    probe.policy.rows_seen = 0
    measure_all(probe)
    steps = probe.num_inference_steps
    shared = 4 * (steps - 1)
    branched = sum(4 + 4 * 3 * (steps - 1 - step) for step in [*probe.steps, 0])
    assert probe.policy.rows_seen == shared + branched
    assert probe.policy.encoded == 4


def test_the_gradient_is_that_of_the_surrogate_on_the_same_samples() -> None:
    probe = linear.probe((-1.0, 0.7), examples=4, branches=5)
    step, values = 2, probe.measure((2,)).rewards
    found = probe.subject_gradients(step, values)
    trajectory = probe.trajectories[0]
    z = standardize(values)
    for subject in range(2):  # examples subject and subject + 2 are of this subject
        for k in range(2):
            probe.policy.module.zero_grad()
            for example in (subject, subject + 2):
                one = slice(example, example + 1)
                latents = trajectory.latents[step][one].repeat(5, 1, 1)
                sigma, after = (trajectory.sigmas[i].expand(5) for i in (step, step + 1))
                velocity = probe.policy.velocity(latents, sigma, repeat(rows(trajectory.conditioning, one), 5))
                gaussian = probe.dynamics(latents, velocity, sigma, after)
                taken = sde.sample(gaussian, noise=probe._noise([probe.examples[example]], step, latents)).detach()
                log_probs = sde.log_prob(gaussian, taken)
                clipped_surrogate(log_probs - log_probs.detach(), z[example, :, k], 1e-3).losses.mean().backward()
            expected = torch.cat([p.grad.flatten() for p in probe.policy.trainable_parameters()])
            torch.testing.assert_close(found[subject, k], -expected)


def test_the_gram_matrix_holds_inner_products() -> None:
    probe = linear.probe((-1.0, 0.7), examples=4, branches=5)
    branches = probe.measure((1,))
    gradients = probe.subject_gradients(1, branches.rewards).double()
    torch.testing.assert_close(branches.gram, torch.einsum("ukd,vld->ukvl", gradients, gradients))
    assert all(p.grad is None for p in probe.policy.trainable_parameters())


def test_an_unscored_image_is_nan_and_has_no_gradient() -> None:
    def fails_on_the_first(images, examples):
        scores = linear.late(images, examples)
        scores[0] = torch.nan
        return scores

    probe = linear.probe((-1.0, 0.7), rewards={"a": linear.early, "b": fails_on_the_first})
    branches = probe.measure((1,))
    assert int(branches.rewards.isnan().sum()) == 1
    assert bool(branches.gram.isfinite().all())


def test_finished_steps_are_not_measured_again() -> None:
    probe = linear.probe((1.0, -1.0))
    known = {(0,): Branches((0,), torch.zeros(1), None, 0.0)}
    measured = []
    found = measure_all(probe, known, on_finished=measured.append)
    assert [b.steps for b in found] == [(0,), (1,), (2,), (3,), (0, 1, 2, 3)]
    assert found[0] is known[0,]
    assert [b.name for b in measured] == ["step-001", "step-002", "step-003", "all-steps"]
    assert found[-1].gram is None


def test_the_last_step_is_probed_when_asked() -> None:
    assert linear.probe((1.0, 1.0), include_last=True).steps == (0, 1, 2, 3, 4)


# ---- bad input


def test_one_reward_cannot_be_compared() -> None:
    with pytest.raises(UserError, match="compares rewards, but there is only 'a'"):
        linear.probe((1.0, 1.0), rewards={"a": linear.early})


def test_examples_must_differ() -> None:
    one = linear.examples(1)
    arguments = (linear.POLICY(), {"a": linear.early, "b": linear.late})
    for given, match in ((one * 2, "two different examples or more, got e0"), (one, "got e0"), ([], "got none")):
        with pytest.raises(UserError, match=match):
            Probe(*arguments, given, ProbeSettings(), sde.dance_sde, 5)


def test_a_step_without_noise_is_refused() -> None:
    with pytest.raises(UserError, match="Step 0 has no noise"):
        linear.probe((1.0, 1.0), noise_level=0.0).measure((0,))


def test_a_policy_without_trainable_parameters_has_no_gradient() -> None:
    probe = linear.probe((1.0, 1.0))
    probe.policy.module.requires_grad_(False)
    with pytest.raises(UserError, match=r"no trainable parameter.*--no-gradients"):
        probe.measure((0,))


def test_the_choice_of_examples_is_fixed_and_of_the_seed() -> None:
    data = linear.examples(20)
    chosen = [e.id for e in choose(data, ProbeSettings(examples=5))]
    assert chosen == [e.id for e in choose(data, ProbeSettings(examples=5))]
    assert len(set(chosen)) == 5
    assert chosen != [e.id for e in choose(data, ProbeSettings(examples=5, seed=1))]
    assert len(choose(data, ProbeSettings(examples=50))) == 20
    with pytest.raises(UserError, match="two examples or more, but the training data has 1"):
        choose(data[:1], ProbeSettings())
