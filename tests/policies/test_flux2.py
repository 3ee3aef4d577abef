from typing import Any

import pytest
import torch

from customized_grpo.errors import UserError
from customized_grpo.policies import Flux2DevPolicy, Flux2KleinKVPolicy, Flux2KleinPolicy, PipelinePolicy
from customized_grpo.policies.lora import LoraSettings
from customized_grpo.train.rollout import sample_ode

from . import tiny


def make(kind: type[PipelinePolicy], pipeline: Any, **settings: Any) -> Any:
    arguments = {"lora": LoraSettings(rank=2), "device": "cpu", "max_text_tokens": tiny.MAX_TOKENS, **settings}
    made = kind(pipeline, **arguments)
    tiny.disturb(made)
    return made


def policy(pipeline: Any = None, **settings: Any) -> Flux2KleinPolicy:
    return make(Flux2KleinPolicy, pipeline or tiny.klein_pipeline(), **settings)


def kv(**settings: Any) -> Flux2KleinKVPolicy:
    return make(Flux2KleinKVPolicy, tiny.kv_pipeline(), **settings)


def dev(**settings: Any) -> Flux2DevPolicy:
    return make(Flux2DevPolicy, tiny.dev_pipeline(), **settings)


def theirs(ours: PipelinePolicy, example, noise, steps=3):
    width, height = ours.picture_size(example)
    rows, columns = ours.grid((width, height))
    guidance = {"guidance_scale": getattr(ours, ours.GUIDED_BY)} if ours.GUIDED_BY else {}
    return ours.pipeline(
        image=list(example.references), prompt=example.prompt, width=width, height=height, num_inference_steps=steps,
        latents=noise.mT.unflatten(2, (rows, columns)), max_sequence_length=ours.text_limit, output_type="pt",
        **guidance,
    ).images  # fmt: skip


@pytest.mark.parametrize(
    ("make", "settings", "sizes"),
    [
        (policy, {}, ((64, 64),)),
        (policy, {"true_cfg_scale": 1.0, "resolution": 32}, ((64, 64),)),
        (policy, {"width": 24, "height": 12, "true_cfg_scale": 2.0}, ((64, 66), (75, 64), (64, 64))),
        (kv, {}, ((64, 64),)),
        (kv, {"width": 24, "height": 12}, ((64, 66), (75, 64), (64, 64))),
        (dev, {}, ((64, 64),)),
        (dev, {"width": 24, "height": 12, "guidance_scale": 2.5}, ((64, 66), (75, 64), (64, 64))),
    ],
)
def test_sampling_is_the_pipelines_own(make, settings, sizes):
    ours, example = make(**settings), tiny.example(sizes=sizes)
    conditioning = ours.encode([example])
    noise = tiny.noise(ours, conditioning)
    torch.testing.assert_close(
        sample_ode(ours, conditioning, noise, 3), theirs(ours, example, noise), atol=1e-5, rtol=0
    )


def test_the_distilled_model_runs_without_guidance():
    ours, example = policy(tiny.klein_pipeline(is_distilled=True)), tiny.example(sizes=((64, 64),))
    assert ours.true_cfg_scale == 1
    assert ours.step_distilled
    assert not policy(tiny.klein_pipeline()).step_distilled
    conditioning = ours.encode([example])
    noise = tiny.noise(ours, conditioning)
    torch.testing.assert_close(
        sample_ode(ours, conditioning, noise, 2), theirs(ours, example, noise, 2), atol=1e-5, rtol=0
    )
    with pytest.raises(UserError, match="is distilled and runs without classifier-free guidance"):
        policy(tiny.klein_pipeline(is_distilled=True), true_cfg_scale=4.0)
    assert kv().step_distilled
    with pytest.raises(UserError, match="is distilled and runs without classifier-free guidance"):
        kv(true_cfg_scale=4.0)


def test_dev_takes_no_classifier_free_guidance_and_counts_its_system_message():
    assert not dev().step_distilled
    with pytest.raises(UserError, match=r"evaluation.true_cfg_scale is 2, but"):
        dev().sampled_with(true_cfg_scale=2.0).__enter__()
    with pytest.warns(UserWarning, match=r"A prompt has 16 tokens and the encoder takes 15"):
        dev(max_text_tokens=15).encode([tiny.example()])


def test_a_large_reference_is_scaled_down_as_the_pipeline_does():
    ours = policy()
    assert ours.reference_sizes(tiny.example(sizes=((640, 480),))) == [(640, 480)]
    processor, image = ours.pipeline.image_processor, tiny.picture((2000, 1500))
    scaled = processor._resize_to_target_area(image, 1024 * 1024)
    expected = tuple(side // 4 * 4 for side in scaled.size)
    assert ours.reference_sizes(tiny.example(sizes=((2000, 1500),))) == [expected]
    small = policy(reference_resolution=16)
    (pixels,) = small._reference_pixels(tiny.example(sizes=((64, 64),)))
    assert pixels.shape == (1, 3, 16, 16)


def test_the_gradient_flows_through_both_passes_of_the_guidance():
    """The velocity that is trained is the guided one: v- + s (v - v-)."""
    ours, example = policy(true_cfg_scale=3.0), tiny.example(sizes=((16, 16),))
    plain = policy(true_cfg_scale=1.0)
    conditioning = ours.encode([example])
    noise, sigma = tiny.noise(ours, conditioning), torch.tensor([0.5])
    swapped = {**conditioning, "text": conditioning["negative_text"]}
    positive, negative = (plain.velocity(noise, sigma, c) for c in (conditioning, swapped))
    torch.testing.assert_close(ours.velocity(noise, sigma, conditioning), negative + 3 * (positive - negative))
    ours.velocity(noise, sigma, conditioning).sum().backward()
    (negative + 3 * (positive - negative)).sum().backward()
    for a, b in zip(ours.trainable_parameters(), plain.trainable_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
