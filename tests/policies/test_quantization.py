from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from customized_grpo import policies
from customized_grpo.config import load_config
from customized_grpo.errors import UserError
from customized_grpo.policies import quantization
from customized_grpo.train.memory import size_of

from . import runs, tiny


@pytest.fixture
def torchao() -> None:
    pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny.kontext_pipeline().save_pretrained(folder)
    return folder


def load(folder: Path, **settings) -> policies.FluxKontextPolicy:
    return policies.FluxKontextPolicy.from_pretrained(folder, device="cpu", **settings)


def weight(policy: policies.FluxKontextPolicy, layer: str = "transformer_blocks.0.attn.to_q") -> torch.Tensor:
    return policy.transformer.get_submodule(layer).base_layer.weight


@pytest.mark.usefixtures("torchao")
def test_the_base_is_stored_in_eight_bits_and_the_adapter_in_float32(folder: Path) -> None:
    quantised, plain = load(folder, quantize="int8"), load(folder)
    assert parts(weight(quantised))[0].dtype == torch.int8
    assert 0 <= size_of([weight(quantised)]) - 32 * 32 <= 32 * 8  # a byte each; of each row a scale and a zero point
    assert size_of([weight(plain)]) == 32 * 32 * 4
    assert all(p.dtype == torch.float32 for p in quantised.trainable_parameters())
    step = plain.transformer.transformer_blocks[0].attn.to_q.base_layer.weight.abs().amax(1, keepdim=True) / 127
    error = (weight(quantised).dequantize() - weight(plain)).abs()
    assert bool((error <= 0.51 * step).all())


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    names = tensor.__tensor_flatten__()[0]  # pyright: ignore[reportAttributeAccessIssue]
    return [getattr(tensor, name) for name in names]


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:There are modules in")
def test_its_velocity_is_close_and_obeys_the_contract(folder: Path, dtype: str) -> None:
    quantised, plain = load(folder, quantize="int8", dtype=dtype), load(folder, dtype=dtype)
    examples = [tiny.example("a"), tiny.example("b")]
    policies.check_policy(quantised, examples)
    conditioning = plain.encode(examples)
    latents, sigma = tiny.noise(plain, conditioning), torch.full((2,), 0.7)
    with torch.no_grad():
        wanted = plain.velocity(latents, sigma, conditioning)
        error = quantised.velocity(latents, sigma, quantised.encode(examples)) - wanted
    assert 1e-4 < float(error.norm() / wanted.norm()) < 0.03


@pytest.mark.usefixtures("torchao")
def test_the_adapter_trains_and_the_base_stays(tmp_path: Path) -> None:
    file = runs.write_run(tiny.FAMILIES[0], tmp_path, quantize="int8")
    run = runs.train(file)
    trained = load_file(run.checkpoints / "iteration-000002" / "trainable.safetensors")
    assert trained
    assert all("lora_" in name for name in trained)
    assert any(bool(tensor.abs().sum() > 0) for name, tensor in trained.items() if "lora_B" in name)


@pytest.mark.usefixtures("torchao")
def test_uno_lies_beneath_ours_on_a_quantised_base(tmp_path: Path) -> None:
    uno, settings = tiny.FAMILIES[1], tiny.FAMILIES[1].settings
    uno.pipeline().save_pretrained(tmp_path)
    files = uno.files(tmp_path)
    made = policies.UnoPolicy.from_pretrained(
        tmp_path, **files, **settings, fuse=False, quantize="int8", device="cpu"
    )  # fmt: skip
    policies.check_policy(made, uno.examples())
    with pytest.raises(UserError, match=r"set policy.fuse to false"):
        policies.UnoPolicy.from_pretrained(tmp_path, **files, quantize="int8")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quantize": "int9"}, r"'int9'; it must be none, int8 or nf4"),
        ({"quantize": "int8", "trainable": "full"}, r"no weight is frozen; train a LoRA"),
    ],
)
def test_what_cannot_be_quantised_is_one_sentence(settings: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        policies.FluxKontextPolicy.from_pretrained("nowhere", **settings)


def test_a_missing_library_and_a_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes; .*pip install -e '.*\[quantized\]'"):
        quantization.check_quantize("nf4", "lora")
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"on GPUs only"):
        quantization.check_quantize("nf4", "lora")


def test_nf4_is_handed_to_diffusers_as_qlora_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot run without a GPU; what diffusers is told can be read."""
    pytest.importorskip("bitsandbytes")
    made = quantization.quantization("nf4", torch.bfloat16)["quantization_config"].quant_mapping["transformer"]
    assert (made.load_in_4bit, made.bnb_4bit_quant_type, made.bnb_4bit_compute_dtype) == (True, "nf4", torch.bfloat16)


def test_the_setting_is_known_to_configurations() -> None:
    from customized_grpo.config import check_names

    check_names(load_config(None, ["policy={use: UnoPolicy, path: a/b, adapter: c/d, quantize: int8, fuse: false}"]))
    check_names(load_config(None, ["policy={use: FluxKontextPolicy, path: a/b, quantize: int8}"]))
    check_names(load_config(None, ["policy={use: Flux2KleinPolicy, path: a/b, quantize: nf4}"]))
