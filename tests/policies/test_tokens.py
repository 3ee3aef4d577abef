import torch

from customized_grpo.policies.tokens import fit_area, floor_to, grid_positions, pack, unpack


def test_a_token_is_two_by_two_latent_pixels_channel_by_channel():
    latents = torch.arange(16.0).view(1, 2, 2, 4)
    assert pack(latents).tolist() == [[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]]


def test_unpack_inverts_pack():
    latents = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(latents), 2, 3), latents)


def test_positions_count_rows_then_columns():
    assert grid_positions(2, 2, plane=1).tolist() == [[1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    assert grid_positions(1, 2, row=5, column=7).tolist() == [[0, 5, 7], [0, 5, 8]]


def test_sizes():
    assert fit_area((100, 100), 64, 16) == (64, 64)
    assert fit_area((400, 100), 64, 16) == (128, 32)
    assert fit_area((1, 1000), 64, 16) == (16, 2016)
    assert floor_to((47, 12), 16) == (32, 16)
