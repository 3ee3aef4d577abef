import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as source

from customized_grpo.errors import UserError
from customized_grpo.policies import QwenImageEditPolicy
from customized_grpo.policies.lora import LoraSettings
from customized_grpo.train.rollout import sample_ode

from . import tiny


def policy(zero_cond_t: bool = False, **settings) -> QwenImageEditPolicy:
    size = {} if "width" in settings else {"resolution": 16}
    arguments = {"lora": LoraSettings(rank=2), "device": "cpu", **size, **settings}
    made = QwenImageEditPolicy(tiny.qwen_pipeline(zero_cond_t=zero_cond_t), **arguments)
    tiny.disturb(made)
    return made


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, ((64, 64),)),
        ({"true_cfg_scale": 1.0, "resolution": 32}, ((64, 64),)),
        ({"negative_prompt": "a blue hat", "true_cfg_scale": 2.0}, ((90, 40), (64, 70), (64, 64))),
        ({"width": 24, "height": 12}, ((64, 64), (40, 90))),
        ({"zero_cond_t": True}, ((64, 64), (40, 90))),
    ],
)
def test_sampling_is_that_of_the_pipeline_with_the_saved_adapter(monkeypatch, tmp_path, settings, sizes):
    """The schedule ends at shift_terminal, and guidance keeps each token's length."""
    monkeypatch.setattr(source, "VAE_IMAGE_SIZE", 32 * 32)
    ours, example = policy(**settings), tiny.example(sizes=sizes)
    conditioning = ours.encode([example])
    noise = tiny.noise(ours, conditioning)
    width, height = ours.picture_size(example)
    guided = {"negative_prompt": ours.negative_prompt} if ours.true_cfg_scale > 1 else {}
    stock = tiny.qwen_pipeline(zero_cond_t=settings.get("zero_cond_t", False))
    ours.save(tmp_path)
    stock.load_lora_weights(tmp_path)
    theirs = stock(
        image=list(example.references), prompt=example.prompt, true_cfg_scale=ours.true_cfg_scale, **guided,
        width=width, height=height, num_inference_steps=3, latents=noise, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(sample_ode(ours, conditioning, noise, 3), theirs, atol=1e-5, rtol=0)


def test_pictures_follow_the_last_reference_as_in_the_pipeline():
    ours = policy(resolution=64, aspect="reference")
    assert ours.picture_size(tiny.example(sizes=((64, 64), (400, 100)))) == (128, 32)


def test_prompts_of_different_lengths_share_a_batch():
    """Padding is masked, so a row does not change with the longest prompt beside it."""
    ours = policy(reference_resolution=32)
    short, long = tiny.example("a", "hat"), tiny.example("b", "a red hat on a beach")
    both, alone = ours.encode([short, long]), ours.encode([short])
    assert both["text"].shape[1] > alone["text"].shape[1]
    noise, sigma = tiny.noise(ours, both), torch.full((2,), 0.5)
    together = ours.velocity(noise, sigma, both)[:1]
    torch.testing.assert_close(together, ours.velocity(noise[:1], sigma[:1], alone), atol=1e-5, rtol=1e-4)


def test_it_takes_one_to_three_references():
    with pytest.raises(UserError, match="4 references, and QwenImageEditPolicy takes one to 3"):
        policy().encode([tiny.example(sizes=((16, 16),) * 4)])


def test_embedded_guidance_is_refused_where_there_is_none():
    with pytest.raises(UserError, match="this model has no embedded guidance; leave it out, or use true_cfg_scale"):
        policy(guidance_scale=3.5)
