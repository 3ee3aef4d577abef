import torch
from diffusers import FluxTransformer2DModel

from customized_grpo.toyworld.transformer import PictureTransformer

SMALL = {"patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
         "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip


def test_its_output_is_the_picture_in_noise_and_the_noise_in_a_picture(tmp_path) -> None:
    torch.manual_seed(0)
    PictureTransformer(**SMALL).save_pretrained(tmp_path)
    model, plain = PictureTransformer.from_pretrained(tmp_path), FluxTransformer2DModel.from_pretrained(tmp_path)
    latents, sigma = torch.randn(3, 4, 8), torch.tensor([1.0, 0.0, 0.5])
    given = {"encoder_hidden_states": torch.randn(3, 3, 8), "pooled_projections": torch.randn(3, 8), "timestep": sigma,
             "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}  # fmt: skip
    velocity, output = model(latents, **given).sample, plain(latents, **given).sample
    torch.testing.assert_close(velocity[0], latents[0] - output[0])  # noise minus picture
    torch.testing.assert_close(velocity[1], -output[1] - latents[1])
    torch.testing.assert_close(velocity[2], -output[2] * 2**0.5)
    assert torch.equal(model(latents, **given, return_dict=False)[0], velocity)


def test_without_an_output_no_other_multiple_of_the_latents_errs_less() -> None:
    torch.manual_seed(0)
    model = PictureTransformer(**SMALL)
    torch.nn.init.zeros_(model.proj_out.weight)
    picture, noise, sigma = torch.randn(1, 4000, 8), torch.randn(1, 4000, 8), torch.tensor([0.3])
    latents = torch.lerp(picture, noise, 0.3)
    given = {"encoder_hidden_states": torch.randn(1, 3, 8), "pooled_projections": torch.randn(1, 8), "timestep": sigma,
             "img_ids": torch.zeros(4000, 3), "txt_ids": torch.zeros(3, 3)}  # fmt: skip
    with torch.no_grad():
        torch.nn.init.zeros_(model.proj_out.bias)
        velocity = model(latents, **given).sample
    best = (latents * (noise - picture)).mean() / latents.square().mean()
    torch.testing.assert_close((velocity / latents).mean(), best, atol=0.02, rtol=0)
