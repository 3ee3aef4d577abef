import pytest
import torch
from torch import nn

from customized_grpo.errors import UserError
from customized_grpo.policies import lora
from customized_grpo.policies.lora import LoraSettings

from . import tiny


def transformer(seed: int = 0) -> nn.Module:
    return tiny.flux_parts(seed)["transformer"]


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def test_the_adapter_is_on_every_attention_and_feed_forward_layer_of_the_blocks_and_nothing_else():
    model = transformer()
    count = lora.make_trainable(model, "lora", LoraSettings(rank=3))
    adapted = {name.split(".lora_A")[0] for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name}
    assert {name.split(".")[0] for name in adapted} == {"transformer_blocks", "single_transformer_blocks"}
    assert len(adapted) == 1 * (8 + 4) + 2 * (3 + 2)
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_targets_of_the_users_own_must_all_exist():
    model = transformer()
    lora.make_trainable(model, "lora", LoraSettings(rank=2, targets=("attn.to_q",)))
    assert sum(p.requires_grad for p in model.parameters()) == 3 * 2
    with pytest.raises(UserError, match=r"ends in 'attn\.to_x', which lora\.targets names"):
        lora.make_trainable(transformer(), "lora", LoraSettings(targets=("attn.to_q", "attn.to_x")))


def test_the_seed_decides_the_first_weights_and_leaves_the_global_generator_alone():
    models = [transformer() for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        lora.make_trainable(model, "lora", LoraSettings(rank=2), seed)
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (torch.cat([p.flatten() for p in weights(m)]) for m in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_full_training_opens_everything_in_float32():
    model = transformer().to(torch.bfloat16)
    count = lora.make_trainable(model, "full", LoraSettings())
    assert count == sum(p.numel() for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(UserError, match="full fine-tuning overwrites it"), lora.adapter_off(model, "full"):
        pass


def test_one_transformer_takes_one_adapter_that_trains():
    model = transformer()
    lora.make_trainable(model, "lora", LoraSettings(rank=2))
    with pytest.raises(UserError, match="load a fresh pipeline"):
        lora.make_trainable(model, "lora", LoraSettings(rank=2))


def frozen_beneath() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A model with a frozen adapter under the one that trains, its adapted layer, and an input."""
    model, name = transformer(), "transformer_blocks.0.attn.to_q"
    draw = torch.Generator().manual_seed(0)
    state = {
        f"{name}.lora_A.weight": torch.randn(5, 32, generator=draw),
        f"{name}.lora_B.weight": torch.randn(32, 5, generator=draw),
    }
    x = torch.randn(2, 32, generator=draw)
    expected = model.get_submodule(name)(x) + x @ state[f"{name}.lora_A.weight"].T @ state[f"{name}.lora_B.weight"].T
    lora.add_frozen_adapter(model, state, "beneath")
    lora.make_trainable(model, "lora", LoraSettings(rank=2))
    torch.testing.assert_close(model.get_submodule(name)(x), expected)
    return model, model.get_submodule(name), x


def test_an_adapter_beneath_ours_is_frozen_and_stays_on_in_the_base():
    model, layer, x = frozen_beneath()
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".beneath." in name)
    assert any(p.requires_grad for name, p in model.named_parameters() if ".default." in name)
    base = layer(x)
    for p in layer.parameters():
        p.data += p.requires_grad * 0.1
    trained = layer(x)
    assert not torch.allclose(trained, base)
    with lora.adapter_off(model, "lora"):
        assert torch.equal(layer(x), base)
    assert torch.equal(layer(x), trained)


def test_the_state_goes_out_and_in_exactly():
    model, other = transformer(), transformer()
    for m in (model, other):
        lora.make_trainable(m, "lora", LoraSettings(rank=2))
    for p in model.parameters():
        p.data += p.requires_grad * 0.1
    lora.load_trainable_state(other, lora.trainable_state(model))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.popitem(), "1 tensors missing"),
        (lambda state: state.update(extra=torch.zeros(1)), r"1 left over \(such as extra\)"),
        (lambda state: state.update({next(iter(state)): torch.zeros(7)}), r"of shape \(7,\), the model has"),
    ],
)
def test_a_state_of_another_model_is_refused(change, message):
    model = transformer()
    lora.make_trainable(model, "lora", LoraSettings(rank=2))
    state = {name: tensor.clone() for name, tensor in lora.trainable_state(model).items()}
    change(state)
    with pytest.raises(UserError, match=message):
        lora.load_trainable_state(model, state)


def test_files_that_are_no_adapter(tmp_path):
    with pytest.raises(UserError, match="There is no file"):
        lora.read_adapter(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(UserError, match="is not a safetensors file"):
        lora.read_adapter(tmp_path / "x.safetensors")
