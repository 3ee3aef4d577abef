"""What every family must prove, on small random weights."""

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from customized_grpo import policies
from customized_grpo.errors import UserError
from customized_grpo.policies import PipelinePolicy, check_policy, pipeline
from customized_grpo.policies.lora import ADAPTER_FILE, LoraSettings, fuse
from customized_grpo.policies.mixed_precision import MixedPrecision
from customized_grpo.structures import Example
from customized_grpo.train.rollout import sample_ode

from . import tiny
from .runs import train, train_from_the_command_line, write_run


def make(family: tiny.Family, **settings) -> PipelinePolicy:
    kind = getattr(policies, family.policy)
    arguments = {"lora": LoraSettings(rank=2), "device": "cpu", **family.settings, **settings}
    return kind(family.pipeline(), **arguments)


def sample(policy: PipelinePolicy, family: tiny.Family) -> torch.Tensor:
    conditioning = policy.encode(family.examples())
    return sample_ode(policy, conditioning, tiny.noise(policy, conditioning), 2)


@pytest.fixture(params=tiny.FAMILIES, ids=lambda family: family.policy)
def family(request) -> tiny.Family:
    return request.param


def test_the_contract_holds(family):
    check_policy(make(family), family.examples())


def test_a_pass_reads_no_value_from_the_device(family):
    """A fake tensor has a shape and no value, so reading one is an error."""
    policy = make(family)
    conditioning = policy.encode(family.examples())
    noise = tiny.noise(policy, conditioning)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        conditioning = {name: fake.from_tensor(value) for name, value in conditioning.items()}
        velocity = policy.velocity(fake.from_tensor(noise), torch.ones(len(noise)), conditioning)
        images = policy.decode(velocity, conditioning)
    assert (velocity.shape, images.ndim) == (noise.shape, 4)


def test_the_saved_adapter_draws_the_same_picture_in_the_families_own_pipeline(family, tmp_path):
    policy = make(family, lora=LoraSettings(rank=2, alpha=5))
    untrained = sample(policy, family)
    tiny.disturb(policy)
    trained = sample(policy, family)
    policy.save(tmp_path)
    fresh = family.pipeline()
    fresh.load_lora_weights(tmp_path)
    assert float((trained - untrained).abs().max()) > 1e-3
    blind = family.pipeline()  # read by one who knows nothing of an alpha
    state = load_file(tmp_path / ADAPTER_FILE)
    fuse(blind.transformer, {name.removeprefix("transformer."): tensor for name, tensor in state.items()})
    carrier = make(family)
    for reader in (fresh, blind):
        carrier.module = carrier.transformer = reader.transformer
        torch.testing.assert_close(sample(carrier, family), trained, atol=2e-5, rtol=0)


def test_the_saved_adapter_can_be_taken_up_again(family, tmp_path):
    policy, larger = make(family, lora=LoraSettings(rank=2, alpha=4)), make(family, lora=LoraSettings(rank=3))
    other = make(family, seed=9, lora=LoraSettings(rank=2, alpha=1))
    tiny.disturb(policy)
    policy.save(tmp_path)
    other.load(tmp_path)
    assert torch.equal(sample(other, family), sample(policy, family))
    with pytest.raises(UserError, match=r"of shape \(2, .*, the model has \(3, "):
        larger.load(tmp_path)
    kontext, _, klein, *_ = tiny.FAMILIES
    stranger = make(kontext if family.policy.startswith("Flux2") else klein)
    with pytest.raises(UserError, match="is of another model or adapter"):
        stranger.load(tmp_path)


def test_the_base_policy_is_the_one_before_training(family):
    policy = make(family)
    before = sample(policy, family)
    tiny.disturb(policy)
    with policy.base():
        assert torch.equal(sample(policy, family), before)
    assert not torch.equal(sample(policy, family), before)


def gradients(policy: PipelinePolicy, examples: list[Example]) -> list[torch.Tensor]:
    conditioning = policy.encode(examples)
    latents = tiny.noise(policy, conditioning)
    policy.velocity(latents, torch.full((len(latents),), 0.6), conditioning).square().mean().backward()
    found = [p.grad for p in policy.trainable_parameters() if p.grad is not None]
    policy.module.zero_grad()
    return found


def check_recomputation(policy: PipelinePolicy, examples: list[Example]) -> None:
    """Gradients with and without recomputed activations are equal bit for bit, so the operations are the same."""
    assert policy.transformer.is_gradient_checkpointing
    recomputed = gradients(policy, examples)
    policy.transformer.disable_gradient_checkpointing()
    plain = gradients(policy, examples)
    assert any(bool(gradient.any()) for gradient in plain)
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))


PATHS = [("float32", "cpu"), ("bfloat16", "cpu"), ("bfloat16", "cuda")]
"""The dtype, and the device whose operations `MixedPrecision` chooses; all of them run on a CPU."""


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize(("dtype", "device"), PATHS)
def test_recomputed_activations_give_the_same_gradient(family, dtype, device, trainable, monkeypatch):
    monkeypatch.setattr(pipeline, "MixedPrecision", lambda _: MixedPrecision(device))
    policy = make(family, gradient_checkpointing=True, dtype=dtype, trainable=trainable)
    tiny.disturb(policy)
    check_recomputation(policy, family.examples())


def test_recomputed_activations_of_the_embedded_model_and_of_a_pipeline_that_came_with_them():
    embedded = policies.FluxKontextPolicy.from_pretrained(
        gradient_checkpointing=True, trainable="full", dtype="bfloat16", device="cpu"
    )
    check_recomputation(embedded, [tiny.example()])
    loaded = tiny.kontext_pipeline()
    loaded.transformer.enable_gradient_checkpointing()
    policy = policies.FluxKontextPolicy(loaded, dtype="bfloat16", device="cpu")
    tiny.disturb(policy)
    check_recomputation(policy, [tiny.example()])


def test_half_precision_keeps_latents_and_trained_weights_whole(family):
    policy = make(family, dtype="bfloat16")
    tiny.disturb(policy)
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    assert policy.pipeline.vae.dtype == torch.float32
    check_policy(policy, family.examples())
    whole = make(family)
    tiny.disturb(whole)
    assert float((sample(policy, family) - sample(whole, family)).abs().mean()) < 0.06


@pytest.mark.parametrize("offload", ["cpu", "swap"])
def test_offloading_changes_nothing_in_the_picture(family, offload):
    here, away = make(family), make(family, offload=offload)
    assert torch.equal(sample(here, family), sample(away, family))


def test_two_iterations_from_the_command_line_change_the_adapter(family, tmp_path):
    file = write_run(family, tmp_path)
    run = train_from_the_command_line(file) if family.on_disk else train(file, policy=make(family))
    assert [record["iteration"] for record in run.records()] == [1, 2]
    assert all(record["update/first_ratio_error"] < 1e-5 for record in run.records())
    trained = make(family)
    (saved,) = (run.path / "checkpoints").rglob("pytorch_lora_weights.safetensors")
    trained.load(saved)
    updates = [tensor for name, tensor in trained.trainable_state().items() if "lora_B" in name]
    assert any(bool((tensor != 0).any()) for tensor in updates)


def test_it_is_used_with_other_guidance_and_another_size_and_then_as_before(family):
    policy = make(family)
    before = sample(policy, family)
    for guidance in {policy.GUIDED_BY} - {None}:
        with policy.sampled_with(**{guidance: 1.5}):
            assert not torch.equal(sample(policy, family), before)
    side = 2 * policy.resolution
    with policy.sampled_with(resolution=side):
        larger = sample(policy, family)
    assert larger.shape[-2:] == (side, side)
    assert torch.equal(larger, sample(make(family, **{**family.settings, "resolution": side}), family))
    with policy.sampled_with():
        assert torch.equal(sample(policy, family), before)


def test_guidance_and_sizes_that_it_cannot_take_name_their_setting(family):
    policy = make(family)
    with pytest.raises(UserError, match=r"evaluation.resolution is 17; it must be a multiple"):
        policy.sampled_with(resolution=17).__enter__()
    if policy.GUIDED_BY != "guidance_scale":
        with pytest.raises(UserError, match=r"evaluation.guidance_scale is 2, but this model has no embedded guidance"):
            policy.sampled_with(guidance_scale=2.0).__enter__()
