import torch
from diffusers import AutoencoderKL

from customized_grpo.toyworld.autoencoder import PatchAutoencoder


def test_it_folds_pixels_and_loads_with_its_settings(tmp_path) -> None:
    saved = PatchAutoencoder(block_out_channels=(12, 8, 8, 16), latent_channels=4, scaling_factor=2.0).eval()
    saved.save_pretrained(tmp_path)
    loaded = PatchAutoencoder.from_pretrained(tmp_path)
    assert isinstance(loaded, AutoencoderKL)
    assert tuple(loaded.config.block_out_channels) == (12, 8, 8, 16)  # pipelines count the levels: 8 pixels a latent
    assert (loaded.config.latent_channels, loaded.config.scaling_factor, loaded.config.sample_size) == (4, 2.0, 128)
    images = torch.rand(2, 3, 128, 128)
    latents = loaded.encode(images).latent_dist.mode()
    assert latents.shape == (2, 4, 16, 16)
    assert loaded.decode(latents).sample.shape == images.shape
    assert torch.equal(loaded.decode(latents).sample, saved.decode(latents, return_dict=False)[0])
