import torch
from diffusers import FluxTransformer2DModel

from customized_grpo.toyworld.transformer import PictureTransformer

SMALL = {"patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
         "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip


def test_its_output_is_the_picture(tmp_path) -> None:
    torch.manual_seed(0)
    PictureTransformer(**SMALL).save_pretrained(tmp_path)
    model, plain = PictureTransformer.from_pretrained(tmp_path), FluxTransformer2DModel.from_pretrained(tmp_path)
    latents, sigma = torch.randn(3, 4, 8), torch.tensor([1.0, 0.01, 0.5])
    given = {"encoder_hidden_states": torch.randn(3, 3, 8), "pooled_projections": torch.randn(3, 8), "timestep": sigma,
             "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}  # fmt: skip
    velocity, picture = model(latents, **given).sample, plain(latents, **given).sample
    torch.testing.assert_close(velocity[0], latents[0] - picture[0])  # noise minus picture
    torch.testing.assert_close(velocity[1], (latents[1] - picture[1]) / 0.05)
    torch.testing.assert_close(latents[2] - 0.5 * velocity[2], picture[2])
    assert torch.equal(model(latents, **given, return_dict=False)[0], velocity)
