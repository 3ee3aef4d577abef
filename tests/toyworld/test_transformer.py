import torch
from diffusers import FluxTransformer2DModel

from customized_grpo.toyworld.transformer import PictureTransformer

SMALL = {"patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
         "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4),
}  # fmt: skip


def test_its_velocity_leads_to_the_picture_that_the_transformer_predicts(tmp_path) -> None:
    torch.manual_seed(0)
    PictureTransformer(**SMALL).save_pretrained(tmp_path)
    model, plain = PictureTransformer.from_pretrained(tmp_path), FluxTransformer2DModel.from_pretrained(tmp_path)
    latents, sigma = torch.randn(2, 4, 8), torch.tensor([0.5, 0.01])
    given = {"encoder_hidden_states": torch.randn(2, 3, 8), "pooled_projections": torch.randn(2, 8), "timestep": sigma,
             "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}  # fmt: skip
    velocity, picture = model(latents, **given).sample, plain(latents, **given).sample
    torch.testing.assert_close(latents[0] - 0.5 * velocity[0], picture[0])
    torch.testing.assert_close(latents[1] - 0.05 * velocity[1], picture[1])  # the least noise level it divides by
    assert torch.equal(model(latents, **given, return_dict=False)[0], velocity)
