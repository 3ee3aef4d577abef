from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from customized_grpo.cli.main import app
from customized_grpo.errors import UserError
from customized_grpo.policies import export_kohya
from customized_grpo.policies.export import export_adapter, to_kohya
from customized_grpo.policies.lora import ADAPTER_FILE, read_adapter
from customized_grpo.store.scores import write_scores
from store.tables import BASE, table

from . import tiny

WIDTH = 3072
"""diffusers' reader of kohya files knows the real model's width only."""


def adapter(layers: dict[str, tuple[int, int]], rank: int = 2) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    state = {}
    for name, (width, height) in layers.items():
        state[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=draw)
        state[f"{name}.lora_B.weight"] = torch.randn(height, rank, generator=draw)
    return state


def update(state: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """What the adapter adds to the layer's output for three inputs."""
    down, up = state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]
    inputs = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(1))
    return up.double() @ (down.double() @ inputs.double())


FLUX1 = {
    **{f"transformer_blocks.0.attn.{part}": (WIDTH, WIDTH) for part in ("to_q", "to_k", "to_v", "to_out.0")},
    "transformer_blocks.0.attn.add_k_proj": (WIDTH, WIDTH),
    "transformer_blocks.0.ff_context.net.0.proj": (WIDTH, 64),
    **{f"single_transformer_blocks.3.attn.{part}": (WIDTH, WIDTH) for part in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.3.proj_mlp": (WIDTH, 4 * WIDTH),
    "single_transformer_blocks.3.proj_out": (64, WIDTH),
    "single_transformer_blocks.4.attn.to_k": (WIDTH, WIDTH),
}
FLUX2 = {
    **{f"transformer_blocks.0.attn.{part}": (8, 8) for part in ("to_q", "to_k", "to_v", "to_add_out")},
    "transformer_blocks.0.ff.linear_in": (8, 48),
    "single_transformer_blocks.1.attn.to_qkv_mlp_proj": (8, 72),
    "single_transformer_blocks.1.attn.to_out": (32, 8),
}


@pytest.mark.parametrize(("pipeline", "layers"), [("FluxPipeline", FLUX1), ("Flux2KleinPipeline", FLUX2)])
def test_diffusers_reads_the_same_update_back(pipeline, layers, tmp_path):
    import diffusers

    state = adapter(layers)
    save_file(to_kohya(state), tmp_path / "kohya.safetensors")
    read = getattr(diffusers, pipeline).lora_state_dict(str(tmp_path / "kohya.safetensors"))
    read = read[0] if isinstance(read, tuple) else read
    back = {name.removeprefix("transformer."): tensor for name, tensor in read.items()}
    for layer in layers:
        torch.testing.assert_close(update(back, layer), update(state, layer), atol=1e-4, rtol=1e-4)
    silent = {name.split(".lora_")[0] for name in back} - layers.keys()
    assert all(bool((update(back, layer) == 0).all()) for layer in silent)


def test_the_file_has_kohyas_names_and_alpha(tmp_path):
    state = adapter({f"transformer_blocks.5.attn.{part}": (4, 4) for part in ("to_q", "to_v")})
    save_file({f"transformer.{name}": tensor for name, tensor in state.items()}, tmp_path / "a.safetensors")
    written = load_file(export_kohya(tmp_path / "a.safetensors", tmp_path / "out" / "b.safetensors"))
    name = "lora_unet_double_blocks_5_img_attn_qkv"
    assert sorted(written) == [f"{name}.alpha", f"{name}.lora_down.weight", f"{name}.lora_up.weight"]
    assert float(written[f"{name}.alpha"]) == 4.0
    assert written[f"{name}.lora_down.weight"].shape == (4, 4)
    renamed = {
        "x.lora_A.weight": written[f"{name}.lora_down.weight"],
        "x.lora_B.weight": written[f"{name}.lora_up.weight"],
    }
    whole = update(renamed, "x")
    torch.testing.assert_close(whole[:4], update(state, "transformer_blocks.5.attn.to_q"))
    assert bool((whole[4:8] == 0).all())
    torch.testing.assert_close(whole[8:], update(state, "transformer_blocks.5.attn.to_v"))


SCALED: list[dict[str, Any]] = [
    {"lora_alpha": 3},
    {"lora_alpha": 3, "use_rslora": True},
    {"lora_alpha": 3, "alpha_pattern": {"attn.to_q": 7}, "rank_pattern": {"attn.to_out.0": 1, "attn.to_q": 4}},
]


@pytest.mark.parametrize("settings", SCALED)
def test_every_export_has_the_scale_in_its_matrices_and_no_other(settings, tmp_path):
    """So a reader that knows alpha and one that does not see the update that peft computes."""
    from diffusers import FluxPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model, block = tiny.flux_parts()["transformer"], "transformer_blocks.0.attn"
    model.add_adapter(LoraConfig(r=2, target_modules=[f"{block}.to_q", f"{block}.to_out.0"], **settings))
    draw, x = torch.Generator().manual_seed(0), torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw)
    layers = [model.get_submodule(f"{block}.{part}") for part in ("to_q", "to_out.0")]
    wanted = torch.cat([layer(x) - layer.base_layer(x) for layer in layers], dim=1)
    FluxPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )  # fmt: skip

    (tmp_path / "training.json").write_text('{"iteration": 20, "worst_reward_gain": 0.5}')
    written = export_adapter(tmp_path, tmp_path / "diffusers.safetensors")
    state, updates = load_file(written), []
    for part in ("to_q", "to_out.0"):
        down, up = (state[f"transformer.{block}.{part}.lora_{letter}.weight"] for letter in "AB")
        updates.append(x @ (up @ down).T)
    torch.testing.assert_close(torch.cat(updates, dim=1), wanted)
    with safe_open(written, "pt") as opened:
        assert not any("alpha" in name for name in [*opened.keys(), *opened.metadata()])
        assert opened.metadata() == {"format": "pt", "iteration": "20", "worst_reward_gain": "0.5"}

    state = load_file(export_kohya(tmp_path, tmp_path / "kohya.safetensors"))
    updates = []
    for layer in ("qkv", "proj"):
        name = f"lora_unet_double_blocks_0_img_attn_{layer}"
        down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
        assert float(state[f"{name}.alpha"]) == len(down)
        updates.append((x @ (up @ down).T)[:, :32])
    torch.testing.assert_close(torch.cat(updates, dim=1), wanted)


def test_an_alpha_beside_the_matrices_counts_and_other_tensors_are_refused(tmp_path):
    state = adapter({"transformer_blocks.0.attn.to_q": (4, 4)})
    name, file = "transformer_blocks.0.attn.to_q", tmp_path / "a.safetensors"
    save_file({**state, f"{name}.alpha": torch.tensor(6.0)}, file)
    torch.testing.assert_close(update(read_adapter(file), name), 3 * update(state, name))
    save_file({**state, f"{name}.lora_magnitude_vector": torch.ones(4)}, file)
    with pytest.raises(UserError, match=r"not a plain LoRA.*to_q\.lora_magnitude_vector is left over or missing"):
        read_adapter(file)


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(UserError, match=r"changes 'transformer_blocks.0.img_mlp.net.2', which FLUX does not have"):
        to_kohya(adapter({"transformer_blocks.0.img_mlp.net.2": (4, 4)}))
    save_file(adapter({"transformer_blocks.0.attn.to_q": (4, 4)}), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="already there; nothing was overwritten"):
        export_kohya(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"should end in \.safetensors"):
        export_kohya(tmp_path / "a.safetensors", tmp_path / "b.ckpt")


def run(folder: Path, use: str = "FluxKontextPolicy", **files: dict[str, torch.Tensor]) -> Path:
    """A run with two checkpoints, the newest of which holds `files`."""
    for iteration, scale in ((1, 1.0), (2, 2.0)):
        for name, state in files.items():
            file = folder / "checkpoints" / f"iteration-{iteration:06d}" / "adapter" / name
            file.parent.mkdir(parents=True)
            save_file({key: scale * tensor for key, tensor in state.items()}, file)
            (file.parents[len(Path(name).parts)] / "state.json").write_text(f'{{"iteration": {iteration}}}')
    (folder / "config.yaml").write_text(yaml.safe_dump({"policy": {"use": use, "path": "a/b"}}))
    return folder


def cgrpo(*words: object) -> Result:
    result = CliRunner().invoke(app, ["export", *map(str, words)])
    assert result.exit_code == 0 or isinstance(result.exception, UserError), result.output
    return result


TRAINED = {f"transformer.{name}": tensor for name, tensor in adapter(FLUX2).items()}


def test_the_command_writes_the_newest_or_the_named_adapter(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", **{ADAPTER_FILE: TRAINED})
    result = cgrpo("--run", folder, "--output", tmp_path / "out" / "new.safetensors")
    assert "new.safetensors  (iteration-000002)" in result.output
    written = load_file(tmp_path / "out" / "new.safetensors")
    assert all(torch.equal(written[name], 2 * tensor) for name, tensor in TRAINED.items())
    cgrpo("--run", folder, "--iteration", 1, "--format", "kohya", "--output", tmp_path / "old.safetensors")
    wanted = to_kohya({name.removeprefix("transformer."): tensor for name, tensor in TRAINED.items()})
    written = load_file(tmp_path / "old.safetensors")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    for iteration, gain in enumerate((0, 0.1, 0)):
        scores = table(iteration, BASE + gain, BASE + 0.2 * iteration)
        write_scores(folder / "evaluations" / f"iteration-{iteration:06d}.json", scores)
    for which, name in (("best", "iteration-000001"), ("last", "iteration-000002")):
        file = tmp_path / f"{which}.safetensors"
        assert f"({name})" in cgrpo("--run", folder, "--checkpoint", which, "--output", file).output


def test_the_command_never_overwrites_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    def said(folder: Path, *words: object) -> str:
        return str(cgrpo("--run", folder, "--output", tmp_path / "out.safetensors", *words).exception)

    folder = run(tmp_path / "kontext", **{ADAPTER_FILE: TRAINED})
    qwen = run(tmp_path / "qwen", "QwenImageEditPolicy", **{ADAPTER_FILE: TRAINED})
    full = run(tmp_path / "full", **{"transformer/diffusion_pytorch_model.safetensors": TRAINED})
    other = run(tmp_path / "other", **{"mosaic.safetensors": TRAINED})
    assert "no checkpoint of iteration 7" in said(folder, "--iteration", 7)
    assert "no checkpoint that was evaluated" in said(folder, "--checkpoint", "best")
    assert "--checkpoint is 'first'; give best, last, or" in said(folder, "--checkpoint", "first")
    assert "adapter is of a QwenImageEditPlusPipeline; export it with --format diffusers" in said(
        qwen, "--format", "kohya"
    )
    whole = full / "checkpoints" / "iteration-000002" / "adapter" / "transformer"
    assert f"trained all weights, so it has no adapter; its transformer in diffusers' layout is '{whole}'" in said(full)
    assert f"holds no {ADAPTER_FILE}" in said(other)
    assert not (tmp_path / "out.safetensors").exists()
    (tmp_path / "out.safetensors").write_text("mine")
    for words in ((), ("--format", "kohya")):
        assert "already there; nothing was overwritten" in said(folder, *words)
    assert (tmp_path / "out.safetensors").read_text() == "mine"
