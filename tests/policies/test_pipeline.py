import json
import re
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from customized_grpo.errors import UserError
from customized_grpo.policies import FluxKontextPolicy, pipeline
from customized_grpo.policies.lora import LoraSettings
from customized_grpo.train.rollout import sample_ode

from . import tiny


def policy(**settings) -> FluxKontextPolicy:
    return FluxKontextPolicy(tiny.kontext_pipeline(), **{"lora": LoraSettings(rank=2), "device": "cpu", **settings})


class Count:
    """How often a component's forward pass, or the VAE's encoder, ran."""

    def __init__(self, made: FluxKontextPolicy) -> None:
        self.text = self.pictures = 0
        made.pipeline.text_encoder_2.register_forward_hook(lambda *_: setattr(self, "text", self.text + 1))
        made.pipeline.vae.encoder.register_forward_hook(lambda *_: setattr(self, "pictures", self.pictures + 1))


def test_what_was_encoded_is_kept_by_content():
    made = policy()
    count, example = Count(made), tiny.example("a")
    first = made.encode([example, tiny.example("b", example.prompt)])
    assert (count.text, count.pictures) == (1, 2)
    again = made.encode([tiny.example("b", example.prompt), tiny.example("a", "another prompt")])
    assert (count.text, count.pictures) == (2, 2)
    assert torch.equal(first["reference"], again["reference"].flip(0))
    assert torch.equal(first["text"][0], again["text"][0])


def test_a_row_does_not_depend_on_its_neighbours_or_the_cache():
    examples = [tiny.example("a"), tiny.example("b", "on a beach")]
    alone = [policy().encode([example]) for example in examples]
    kept, forgetful = policy(), policy(cache_mib=0)
    kept.encode(examples[1:])
    count = Count(forgetful)
    for made in (kept, forgetful):
        for name, value in made.encode(examples).items():
            assert torch.equal(value, torch.cat([row[name] for row in alone]))
    assert count.text == 2
    forgetful.encode(examples)
    assert count.text == 4


def test_long_prompts_are_cut_counted_and_warned_about_once():
    made = policy()
    with pytest.warns(UserWarning, match="has 31 tokens and the encoder takes 24") as caught:
        made.encode([tiny.example("a", "x" * 30), tiny.example("b", "y" * 40)])
    assert sum("the encoder takes" in str(warning.message) for warning in caught) == 1
    assert made.truncated_prompts == {"x" * 30, "y" * 40}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "A prompt has")
        made.encode([tiny.example("a", "x" * 30), tiny.example("c", "short")])
    assert made.truncated_prompts == {"x" * 30, "y" * 40}


def test_offloaded_parts_are_on_the_device_only_while_they_work(monkeypatch):
    made = policy(offload="cpu")
    moves: list[tuple[str, str]] = []
    for name in ("text_encoder", "text_encoder_2", "vae"):
        part = getattr(made.pipeline, name)
        monkeypatch.setattr(part, "to", lambda device, name=name: moves.append((name, str(device))))
    made.device = torch.device("cpu", 0)
    conditioning = made.encode([tiny.example()])
    assert [m for m in moves if m[0] == "vae"] == [("vae", "cpu:0"), ("vae", "cpu")]
    assert ("text_encoder_2", "cpu:0") in moves
    moves.clear()
    made.encode([tiny.example()])
    assert moves == []
    made.decode(tiny.noise(made, conditioning), conditioning)
    assert moves == [("vae", "cpu:0"), ("vae", "cpu")]


@pytest.mark.parametrize(("offload", "wakes"), [("cpu", [1, 1]), ("none", [0, 0])])
def test_encoded_ahead_the_encoders_wake_once_for_many_batches(offload, wakes, monkeypatch):
    made, examples = policy(offload=offload), [tiny.example("a", "one"), tiny.example("b", "two")]
    alone, moves = policy().encode(examples[1:]), []
    monkeypatch.setattr(made.pipeline.text_encoder_2, "to", lambda device: moves.append(str(device)))
    made.device, counts = torch.device("cpu", 0), []
    made.encode_ahead(examples)
    counts.append(moves.count("cpu:0"))
    batches = [made.encode([example]) for example in examples]
    counts.append(moves.count("cpu:0"))
    assert counts == wakes
    assert all(torch.equal(batches[1][name], value) for name, value in alone.items())


def test_with_swap_the_transformer_is_away_while_the_text_encoders_work(monkeypatch):
    made, moves = policy(offload="swap"), []
    for name in ("text_encoder", "transformer"):
        part = getattr(made.pipeline, name)
        monkeypatch.setattr(part, "to", lambda device, name=name: moves.append((name, str(device))))
    made.device = torch.device("cpu", 0)
    conditioning = made.encode([tiny.example()])
    away, back = ("transformer", "cpu"), ("transformer", "cpu:0")
    assert moves == [away, ("text_encoder", "cpu:0"), ("text_encoder", "cpu"), back]
    made.decode(tiny.noise(made, conditioning), conditioning)
    assert moves[4:] == []


def passes(made: FluxKontextPolicy) -> list[torch.Tensor]:
    """The velocity with gradient, the gradients, and the velocity without gradient."""
    tiny.disturb(made, scale=0.05)
    conditioning = made.encode([tiny.example("a"), tiny.example("b")])
    latents, sigma = tiny.noise(made, conditioning), torch.full((2,), 0.5)
    velocity = made.velocity(latents, sigma, conditioning)
    velocity.square().mean().backward()
    with torch.no_grad():
        return [
            velocity,
            *(p.grad for p in made.trainable_parameters() if p.grad is not None),
            made.velocity(latents, sigma, conditioning),
        ]


@pytest.mark.filterwarnings("ignore")  # the compiler warns itself
def test_compiled_blocks_give_the_same_bits_if_the_compiler_changes_no_operation():
    from torch._dynamo.utils import counters

    counters.clear()
    plain, compiled = passes(policy(dtype="bfloat16")), passes(policy(dtype="bfloat16", compile="aot_eager"))
    assert counters["stats"]["unique_graphs"] > 0
    assert all(map(torch.equal, plain, compiled))
    assert torch.equal(compiled[0], compiled[-1])


def test_an_attention_backend_computes_sampling_and_training_of_this_policy_alone():
    math, native = passes(policy(attention="_native_math")), passes(policy())
    assert torch.equal(math[0], math[-1])
    assert not torch.equal(math[0], native[0])
    torch.testing.assert_close(math, native, rtol=1e-4, atol=1e-5)


def test_an_attention_backend_without_gradient_is_refused(monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    def sample(query, **rest):
        return query.detach()

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.SAGE, sample)
    with pytest.raises(UserError, match=r"policy\.attention is 'sage', which gives no gradient"):
        policy(attention="sage")


def test_many_pictures_are_decoded_a_few_at_a_time(monkeypatch):
    made = policy()
    conditioning = made.encode([tiny.example("a"), tiny.example("b"), tiny.example("c")])
    latents, sizes = tiny.noise(made, conditioning), []
    whole = made.decode(latents, conditioning)
    made.pipeline.vae.decoder.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    monkeypatch.setattr(pipeline, "PIXELS_PER_DECODE", 2 * 16 * 16)
    torch.testing.assert_close(made.decode(latents, conditioning), whole)
    assert sizes == [2, 1]


def test_full_training_saves_the_whole_transformer(tmp_path):
    from diffusers import FluxTransformer2DModel

    made = policy(trainable="full")
    tiny.disturb(made, scale=0.05)
    made.save(tmp_path)
    parts = {**tiny.flux_parts(), "transformer": FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")}
    from diffusers import FluxKontextPipeline

    again = FluxKontextPolicy(FluxKontextPipeline(**parts), trainable="full", device="cpu")
    conditioning = made.encode([tiny.example()])
    noise = tiny.noise(made, conditioning)
    assert torch.equal(sample_ode(again, conditioning, noise, 2), sample_ode(made, conditioning, noise, 2))
    with pytest.raises(UserError, match="takes an adapter"):
        made.load(tmp_path)


def test_the_pipeline_loads_from_a_folder_with_settings_as_in_yaml(tmp_path):
    tiny.kontext_pipeline().save_pretrained(tmp_path)
    made = FluxKontextPolicy.from_pretrained(tmp_path, lora={"rank": 2}, dtype="bfloat16", device="cpu")
    assert made.pipeline.transformer.dtype == torch.bfloat16
    assert made.pipeline.vae.dtype == torch.float32


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, "'policy.lora.rank' is 0: expected 1 or more."),
        ({"alpha": 0}, "'policy.lora.alpha' is 0: expected more than 0."),
        ({"alpha": float("inf")}, "'policy.lora.alpha' is Infinity: expected a finite number."),
        ({"targets": []}, "'policy.lora.targets' is []: expected at least 1."),
        ({"rnk": 1}, "There is no setting 'policy.lora.rnk'. Did you mean 'rank'?"),
        (0, "'policy.lora' is 0: expected a mapping of settings."),
    ],
)
def test_a_wrong_adapter_is_refused_before_the_pipeline_is_loaded(lora, message):
    with pytest.raises(UserError, match=re.escape(message)):
        FluxKontextPolicy.from_pretrained("nowhere", lora=lora)


def test_device_zero_is_a_gpu_and_not_the_default(monkeypatch):
    """YAML gives `device: 0` as a number; the default is another GPU in every process but the first."""
    asked = []
    monkeypatch.setattr(pipeline, "default_device", lambda: asked.append("default") or torch.device("cpu"))
    with suppress(RuntimeError):  # where there is no GPU
        policy(device=0)
    assert asked == []
    assert policy(device=None).device.type == "cpu"
    assert asked == ["default"]


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(UserError, match="Could not load a FluxKontextPipeline"):
        FluxKontextPolicy.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="holds a FluxPipeline, and FluxKontextPolicy takes a FluxKontextPipeline"):
        FluxKontextPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink(),
        lambda folder: (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off"),
        lambda folder: (folder / "text_encoder" / "model.safetensors").write_bytes(b"cut off"),
        lambda folder: (folder / "vae" / "config.json").unlink(),
        lambda folder: [file.unlink() for file in (folder / "tokenizer").iterdir()],
        lambda folder: (folder / "model_index.json").write_text("{"),
    ],
    ids=["no weights", "cut weights", "cut encoder", "no configuration", "no tokenizer", "cut index"],
)
def test_a_pipeline_that_is_not_whole(damage, tmp_path):
    tiny.kontext_pipeline().save_pretrained(tmp_path)
    damage(tmp_path)
    said = r"Could not load a FluxKontextPipeline|'.*transformer' holds no weights|model_index.json': not JSON"
    with pytest.raises(UserError, match=said) as caught:
        FluxKontextPolicy.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_each_process_of_a_launcher_has_its_own_gpu(monkeypatch):
    assert pipeline.default_device().type == "cpu" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pipeline.default_device() == torch.device("cuda", 3)
    monkeypatch.delenv("LOCAL_RANK")
    assert pipeline.default_device() == torch.device("cuda", 0)


@pytest.mark.parametrize("library", ["evil", "subprocess", "customized_grpo", "customized_grpo.toyworld"])
def test_a_model_folder_brings_no_code_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    tiny.kontext_pipeline().save_pretrained(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    named = json.loads(index.read_text())
    index.write_text(json.dumps({**named, "text_encoder": [library, "Anything"]}))
    for place in (tmp_path, tmp_path / "model" / "text_encoder"):
        (place / "evil.py").write_text(f"open({str(tmp_path / 'MARK')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"takes its text_encoder from '{library}'"):
        FluxKontextPolicy.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "MARK").exists()


def test_full_training_compares_with_a_copy_of_its_base_weights() -> None:
    policy = FluxKontextPolicy(tiny.kontext_pipeline(), trainable="full", device="cpu")
    with pytest.raises(UserError, match="full fine-tuning overwrites it"), policy.base():
        pass
    assert policy.keep_base()
    conditioning = policy.encode([tiny.example()])
    given = (tiny.noise(policy, conditioning), torch.tensor([0.5]), conditioning)
    with torch.no_grad():
        before = policy.velocity(*given)
        tiny.disturb(policy)
        after = policy.velocity(*given)
        assert policy.keep_base()  # a second time takes no other
        with policy.base():
            assert torch.equal(policy.velocity(*given), before)
        assert torch.equal(policy.velocity(*given), after)
    assert not torch.equal(after, before)
    assert not FluxKontextPolicy(tiny.kontext_pipeline(), device="cpu").keep_base()
