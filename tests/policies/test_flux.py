import pytest
import torch

from customized_grpo.errors import TrainingError, UserError
from customized_grpo.functional import sde
from customized_grpo.policies import FluxKontextPolicy
from customized_grpo.policies.contract import repeat, rows
from customized_grpo.policies.lora import LoraSettings
from customized_grpo.policies.pipeline import as_dtype
from customized_grpo.train.rollout import sample_ode

from . import tiny
from .runs import train, write_run


def policy(pipeline=None, **settings) -> FluxKontextPolicy:
    made = FluxKontextPolicy(pipeline or tiny.kontext_pipeline(), lora=LoraSettings(rank=2), device="cpu", **settings)
    tiny.disturb(made)
    return made


def theirs(pipeline, example, noise, size, steps=3, **arguments):
    width, height = size
    return pipeline(
        image=example.references[0], prompt=example.prompt, width=width, height=height, max_area=width * height,
        num_inference_steps=steps, latents=noise, max_sequence_length=tiny.MAX_TOKENS, output_type="pt", **arguments,
    ).images  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, (16, 16)),
        ({"resolution": 32, "reference_resolution": 16, "guidance_scale": 2.0}, (32, 32)),
        ({"width": 24, "height": 12, "reference_resolution": 16}, (24, 12)),
        ({"true_cfg_scale": 2.5, "negative_prompt": "a blue hat"}, (16, 16)),
    ],
)
def test_sampling_is_the_pipelines_own(settings, size):
    """Shift, guidance, positions, text, VAE: any difference would show; the references' size is the next test's."""
    ours, example = policy(**settings), tiny.example()
    conditioning = ours.encode([example])
    assert ours.picture_size(example) == size
    noise = tiny.noise(ours, conditioning)
    guidance = {k: v for k, v in settings.items() if k in ("true_cfg_scale", "negative_prompt")}
    expected = theirs(
        ours.pipeline, example, noise, size, guidance_scale=ours.guidance_scale, _auto_resize=False, **guidance
    )
    torch.testing.assert_close(sample_ode(ours, conditioning, noise, 3), expected, atol=1e-5, rtol=0)


def test_a_fresh_pipeline_with_the_saved_adapter_draws_what_the_policy_draws(tmp_path):
    ours, example, fresh = policy(), tiny.example(), tiny.kontext_pipeline()
    conditioning = ours.encode([example])
    noise = tiny.noise(ours, conditioning)
    ours.save(tmp_path)
    fresh.load_lora_weights(tmp_path)
    expected = theirs(fresh, example, noise, (16, 16), guidance_scale=3.5, _auto_resize=False)
    torch.testing.assert_close(sample_ode(ours, conditioning, noise, 3), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("reference", "seen"), [((20, 50), (12, 28)), ((19, 16), (16, 16)), ((61, 20), (28, 12))])
def test_a_reference_is_resized_as_the_pipeline_does(monkeypatch, reference, seen):
    """The pipeline takes the nearest of a list of sizes; ours is that list at 1024, scaled elsewhere."""
    listed = "diffusers.pipelines.flux.pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS"
    monkeypatch.setattr(listed, [(12, 28), (16, 16), (28, 12)])
    ours = policy(reference_resolution=1024, aspect="reference")
    example = tiny.example(sizes=(reference,))
    assert ours.reference_sizes(example) == [seen]
    conditioning = ours.encode([example])
    noise = tiny.noise(ours, conditioning)
    expected = theirs(ours.pipeline, example, noise, ours.picture_size(example))
    torch.testing.assert_close(sample_ode(ours, conditioning, noise, 3), expected, atol=1e-5, rtol=0)


def test_sizes_of_the_real_model():
    ours = policy(resolution=1024)
    assert ours.reference_sizes(tiny.example(sizes=((1000, 1000),))) == [(1024, 1024)]
    assert ours.reference_sizes(tiny.example(sizes=((672, 1568),))) == [(672, 1568)]
    half = policy(resolution=512, aspect="reference")
    assert half.reference_sizes(tiny.example(sizes=((672, 1568),))) == [(336, 784)]
    assert half.picture_size(tiny.example(sizes=((672, 1568),))) == (336, 784)


def test_the_shift_grows_with_the_resolution_unless_it_is_fixed():
    small, large, fixed = (policy(**settings) for settings in ({}, {"resolution": 64}, {"shift": 3.0}))
    example = tiny.example()
    values = [float(p.sigmas(4, p.encode([example]))[2]) for p in (small, large, fixed)]
    assert values[0] < values[1]
    assert values[2] == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 18}, "policy.resolution is 18; it must be a multiple of 4 pixels."),
        ({"width": 16}, "give width and height, or resolution alone"),
        ({"width": 16, "height": 16, "resolution": 16}, "give width and height, or resolution alone"),
        ({"resolution": 0}, "policy.resolution is 0; it must be more than 0 pixels."),
        ({"width": 0, "height": 0}, "policy.width is 0; it must be more than 0 pixels."),
        ({"reference_resolution": 0}, "policy.reference_resolution is 0; it must be more than 0."),
        ({"shift": 0}, "policy.shift is 0; it must be more than 0."),
        ({"max_text_tokens": 0}, "policy.max_text_tokens is 0; it must be more than 0."),
        ({"dtype": "float16"}, "policy.dtype is 'float16'; it must be float32, bfloat16 or auto."),
        ({"offload": "disk"}, "policy.offload is 'disk'; it must be none or cpu or swap."),
        ({"aspect": "references"}, "policy.aspect is 'references'; it must be square or reference. Did you mean"),
        ({"attention": "flash_hub"}, "policy.attention is 'flash_hub'; it must be native or"),
        ({"attention": "sage"}, "policy.attention is 'sage', which does not run here"),
        ({"compile": "induct"}, "policy.compile is 'induct'; it must be none or inductor or aot_eager."),
        ({"trainable": "LoRA"}, "policy.trainable is 'LoRA'; it must be lora or full."),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        policy(**settings)


@pytest.mark.parametrize(("count", "seen"), [(0, "no reference,"), (2, "2 references,")])
def test_it_takes_exactly_one_reference(count, seen):
    example = tiny.example(sizes=((16, 16),) * count)
    with pytest.raises(UserError, match=f"Example 'a' has {seen} and FluxKontextPolicy takes exactly one"):
        policy().encode([example])
    with pytest.raises(UserError, match=seen):
        policy().shape_key(example)


SIGMA, NEXT = 0.7, 0.5


def step(ours: FluxKontextPolicy, latents, conditioning, some: slice) -> sde.Gaussian:
    sigma, sigma_next = (torch.full((len(latents[some]),), value) for value in (SIGMA, NEXT))
    velocity = ours.velocity(latents[some], sigma, rows(conditioning, some))
    return sde.dance_sde(latents[some], velocity, sigma, sigma_next, noise_level=0.4)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_drift_of_log_probs_with_the_batch(dtype, bound):
    """The log-prob of a row in a batch of eight against that of the row alone, and against itself.

    In its own batch a row gives the same number bit for bit, which is what old_log_probs: recompute relies on.
    """
    ours = policy(dtype=dtype)
    conditioning = repeat(ours.encode([tiny.example("a"), tiny.example("b", "a cat")]), 4)
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 16, 16, generator=draw)

    def log_probs(size: int) -> torch.Tensor:
        parts = [slice(i, i + size) for i in range(0, 8, size)]
        return torch.cat([sde.log_prob(step(ours, latents, conditioning, p), following[p]) for p in parts]).detach()

    with torch.no_grad():
        following = sde.sample(step(ours, latents, conditioning, slice(0, 8)), draw)
        together = log_probs(8)
    assert torch.equal(together, log_probs(8))
    assert float((together - log_probs(1)).abs().max()) <= bound


class RoundsByBatch(FluxKontextPolicy):
    """Rounds otherwise in a smaller batch, as products in bfloat16 do on a GPU; on one CPU core they do not."""

    def velocity(self, latents, sigma, conditioning):
        rounding = 0.02 * torch.sin(1e4 * latents) * (len(latents) < 4)
        return super().velocity(latents, sigma, conditioning) + rounding


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (("training.micro_batch=2",), "old_log_probs"),
        (("training.micro_batch=2", "training.old_log_probs=recompute"), None),
        ((), None),
    ],
)
def test_the_rule_for_a_micro_batch_smaller_than_the_chunk(tmp_path, overrides, error):
    """Rounding alone must not move the first ratio: stop and say what to do, or recompute in the update's batches."""
    family = tiny.FAMILIES[0]
    file = write_run(family, tmp_path, use=f"{__name__}:RoundsByBatch", dtype="bfloat16")
    overrides = (*overrides, "rollout.dynamics={use: dance_sde, noise_level: 0.4}")
    if error:
        with pytest.raises(TrainingError, match=error):
            train(file, *overrides)
    else:
        records = train(file, *overrides).records()
        assert [record["update/first_ratio_error"] for record in records] == [0, 0]


@pytest.mark.parametrize(
    ("name", "instruction", "matrix_units", "expected"),
    [
        ("AMD EPYC", True, False, torch.bfloat16),
        ("AMD EPYC", False, False, torch.float32),
        ("Intel Xeon", True, True, torch.bfloat16),
        ("Intel Xeon", True, False, torch.float32),
    ],
)
def test_auto_takes_what_the_hardware_is_faster_in(
    name: str, instruction: bool, matrix_units: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instruction)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units)
    assert as_dtype("auto") is expected
