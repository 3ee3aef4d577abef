import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from customized_grpo.data.images import to_tensor
from customized_grpo.errors import UserError
from customized_grpo.policies import UnoPolicy, lora
from customized_grpo.policies.flux_names import convert_transformer, load_transformer
from customized_grpo.policies.lora import LoraSettings
from customized_grpo.policies.uno import add_uno, convert_uno
from customized_grpo.train.rollout import sample_ode

from . import tiny

VECTORS = Path(__file__).parents[1] / "vectors"
CASES = ("uno_one_reference", "uno_two_references")


class Case:
    """A tiny model, its adapter, inputs and exact outputs, made with UNO's own code."""

    def __init__(self, name: str) -> None:
        with safe_open(VECTORS / f"{name}.safetensors", "pt") as file:
            self.config = json.loads(file.metadata()["config"])
        tensors = load_file(VECTORS / f"{name}.safetensors")
        self.parts = {
            kind: {k.removeprefix(kind + "."): v for k, v in tensors.items() if k.startswith(kind + ".")}
            for kind in ("base", "lora", "in", "out")
        }

    def files(self, folder: Path) -> tuple[Path, Path]:
        save_file(self.parts["base"], folder / "flux.safetensors")
        save_file(self.parts["lora"], folder / "uno.safetensors")
        return folder / "flux.safetensors", folder / "uno.safetensors"

    def transformer(self, folder: Path):
        return load_transformer(self.files(folder)[0], tuple(self.config["axes_dim"])).eval()

    def velocity(self, transformer, positions: list[torch.Tensor] | None = None) -> torch.Tensor:
        given = self.parts["in"]
        count = len(self.config["reference_tokens_hw"])
        ids = positions or [given["img_ids"][0], *(given[f"ref_img_ids.{n}"][0] for n in range(count))]
        with torch.no_grad():
            velocity = transformer(
                hidden_states=torch.cat([given["img"], *(given[f"ref_img.{n}"] for n in range(count))], dim=1),
                encoder_hidden_states=given["txt"],
                pooled_projections=given["vec"],
                timestep=given["timesteps"],
                guidance=given["guidance"],
                img_ids=torch.cat(ids),
                txt_ids=torch.zeros(given["txt"].shape[1], 3),
                return_dict=False,
            )[0]
        return velocity[:, : given["img"].shape[1]]


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return Case(request.param)


def test_the_original_model_converts_exactly(case, tmp_path):
    expected = case.parts["out"]["velocity_without_lora"]
    torch.testing.assert_close(case.velocity(case.transformer(tmp_path)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fuse", [True, False])
def test_the_adapter_converts_exactly(case, fuse, tmp_path):
    transformer = case.transformer(tmp_path)
    add_uno(transformer, tmp_path / "uno.safetensors", fuse=fuse)
    torch.testing.assert_close(case.velocity(transformer), case.parts["out"]["velocity"], atol=1e-5, rtol=0)


def test_the_frozen_adapter_stays_on_in_the_base_of_ours(case, tmp_path):
    transformer = case.transformer(tmp_path)
    add_uno(transformer, tmp_path / "uno.safetensors", fuse=False)
    lora.make_trainable(transformer, "lora", LoraSettings(rank=2))
    assert not any(p.requires_grad for name, p in transformer.named_parameters() if ".uno." in name)
    for p in transformer.parameters():
        p.data += p.requires_grad * 0.1
    expected = case.parts["out"]["velocity"]
    assert float((case.velocity(transformer) - expected).abs().max()) > 1e-3
    with lora.adapter_off(transformer, "lora"):
        torch.testing.assert_close(case.velocity(transformer), expected, atol=1e-5, rtol=0)


def test_positions_run_along_the_diagonal(case, tmp_path):
    given, config = case.parts["in"], case.config
    grids = [tuple(grid) for grid in config["reference_tokens_hw"]]
    positions = policy().positions(tuple(config["image_tokens_hw"]), grids)
    for n, ids in enumerate(positions):
        assert torch.equal(ids, given[f"ref_img_ids.{n}"][0])


def test_a_converted_model_and_adapter_save_and_reload(case, tmp_path):
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = case.transformer(tmp_path)
    transformer.save_pretrained(tmp_path / "converted")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "converted").eval()
    assert torch.equal(case.velocity(again), case.velocity(transformer))

    blocks = (case.config["depth"], case.config["depth_single_blocks"])
    FluxPipeline.save_lora_weights(tmp_path / "adapter", convert_uno(case.parts["lora"], blocks))
    pipeline = FluxPipeline(**tiny.flux_parts(transformer=again))
    pipeline.load_lora_weights(tmp_path / "adapter")
    torch.testing.assert_close(case.velocity(pipeline.transformer), case.parts["out"]["velocity"], atol=1e-5, rtol=0)


# ---- what cannot be


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("single_blocks.0.processor.qkv_lora.up.weight"), "1 keys are missing .*single_blocks.0"),
        (lambda s: s.update({"double_blocks.7.processor.qkv_lora1.up.weight": torch.zeros(1)}), "1 left over"),
        (
            lambda s: s.update({"single_blocks.0.processor.proj_lora.up.weight": torch.zeros(48, 9)}),
            r"one rank, .*\[4, 9\]",
        ),
    ],
)
def test_an_adapter_that_is_not_whole(change, message, tmp_path):
    state = dict(Case(CASES[0]).parts["lora"])
    change(state)
    with pytest.raises(UserError, match=message):
        convert_uno(state, (1, 2))


def test_an_adapter_of_another_family_or_size(tmp_path):
    one, two = Case(CASES[0]), Case(CASES[1])
    transformer = one.transformer(tmp_path)
    save_file(
        {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(UserError, match="This is not UNO's adapter for 1 double and 2 single blocks"):
        add_uno(transformer, tmp_path / "x.safetensors")
    save_file(two.parts["lora"], tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="not UNO's adapter"):
        add_uno(transformer, tmp_path / "two.safetensors")
    wide = {k: torch.cat([v, v], dim=1) if ".down." in k else v for k, v in one.parts["lora"].items()}
    save_file(wide, tmp_path / "wide.safetensors")
    for fuse in (True, False):
        with pytest.raises(UserError, match="The adapter is of another model"):
            add_uno(transformer, tmp_path / "wide.safetensors", fuse=fuse)


def test_an_original_file_that_is_not_flux(tmp_path):
    base = dict(Case(CASES[0]).parts["base"])
    with pytest.raises(UserError, match=r"'x' is no tensor of FLUX\.1"):
        convert_transformer({**base, "x": torch.zeros(1)})
    del base["single_blocks.1.linear2.weight"]
    save_file(base, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 tensors of FLUX\.1, such as single_transformer_blocks\.1\.proj_out"):
        load_transformer(tmp_path / "part.safetensors", (8, 8, 8))


# ---- the policy


def policy(**settings) -> UnoPolicy:
    arguments = {"lora": LoraSettings(rank=2), "device": "cpu", "reference_resolution": 16, **settings}
    return UnoPolicy(tiny.flux_pipeline(), **arguments)


def test_sizes_of_references_are_unos():
    ours = policy(reference_resolution=None)
    assert ours.reference_sizes(tiny.example(sizes=((1000, 600),))) == [(512, 304)]
    assert ours.reference_sizes(tiny.example(sizes=((600, 1000), (70, 70)))) == [(192, 320), (320, 320)]


def test_a_reference_is_scaled_then_cropped_at_the_centre():
    ours = policy()
    (pixels,) = ours._reference_pixels(tiny.example(sizes=((32, 28),)))
    assert pixels.shape == (1, 3, 12, 16)
    scaled = tiny.example(sizes=((32, 28),)).references[0].resize((16, 14), 1).crop((0, 1, 16, 13))
    torch.testing.assert_close(pixels[0] / 2 + 0.5, to_tensor(scaled))


@pytest.mark.parametrize("sizes", [((16, 16),), ((16, 8), (12, 16), (16, 16))])
def test_sampling_is_the_pipelines_own_with_references_appended(sizes):
    """diffusers has no UNO pipeline: FluxPipeline draws, and a hook appends what UNO's code appends."""
    ours, example = policy(width=24, height=16), tiny.example(sizes=sizes)
    tiny.disturb(ours)
    conditioning = ours.encode([example])
    noise = tiny.noise(ours, conditioning)
    tokens = noise.shape[1]

    def append(module, args, kwargs):
        kwargs["hidden_states"] = torch.cat([kwargs["hidden_states"], conditioning["reference"]], dim=1)
        kwargs["img_ids"] = torch.cat([kwargs["img_ids"], conditioning["ids"][0, tokens:]])
        return args, kwargs

    hooks = [
        ours.transformer.register_forward_pre_hook(append, with_kwargs=True),
        ours.transformer.register_forward_hook(lambda module, args, out: (out[0][:, :tokens],)),
    ]
    theirs = ours.pipeline(
        prompt=example.prompt, width=24, height=16, num_inference_steps=3, latents=noise, guidance_scale=4.0,
        max_sequence_length=tiny.MAX_TOKENS, output_type="pt",
    ).images  # fmt: skip
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(sample_ode(ours, conditioning, noise, 3), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("count", "seen"), [(0, "no reference,"), (5, "5 references,")])
def test_it_takes_one_to_four_references(count, seen):
    with pytest.raises(UserError, match=f"Example 'a' has {seen} and UnoPolicy takes one to 4"):
        policy().shape_key(tiny.example(sizes=((16, 16),) * count))


def test_loading_base_and_adapter_from_disk(tmp_path):
    base, adapter = tiny.flux_pipeline(), tiny.uno_adapter()
    base.save_pretrained(tmp_path / "base")
    save_file(adapter, tmp_path / "dit_lora.safetensors")
    fused, frozen = (
        UnoPolicy.from_pretrained(
            tmp_path / "base", adapter=tmp_path, fuse=fuse, lora={"rank": 2}, device="cpu", reference_resolution=16
        )
        for fuse in (True, False)
    )
    plain = UnoPolicy(base, lora=LoraSettings(rank=2), device="cpu", reference_resolution=16)
    conditioning = plain.encode([tiny.example()])
    noise = tiny.noise(plain, conditioning)
    pictures = [sample_ode(p, conditioning, noise, 2) for p in (plain, fused, frozen)]
    assert float((pictures[0] - pictures[1]).abs().max()) > 1e-3
    torch.testing.assert_close(pictures[1], pictures[2], atol=1e-5, rtol=0)


def test_loading_what_is_not_there(tmp_path):
    base = tiny.flux_pipeline()
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"policy\.fuse is false"):
        UnoPolicy.from_pretrained(tmp_path / "base", adapter=tmp_path, fuse=False, trainable="full")
    with pytest.raises(UserError, match="There is no file"):
        UnoPolicy.from_pretrained(tmp_path / "base", adapter=tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="is neither an existing folder nor a hub id"):
        UnoPolicy.from_pretrained(tmp_path / "nothing", adapter=tmp_path)
    with pytest.raises(UserError, match="Could not load a FluxPipeline"):
        UnoPolicy.from_pretrained(tmp_path, adapter=tmp_path)
    tiny.kontext_pipeline().save_pretrained(tmp_path / "kontext")
    with pytest.raises(UserError, match="holds a FluxKontextPipeline, and UnoPolicy takes a FluxPipeline"):
        UnoPolicy.from_pretrained(tmp_path / "kontext", adapter=tmp_path)
