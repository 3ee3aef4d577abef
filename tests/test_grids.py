import torch
from PIL import Image

from customized_grpo.grids import CELL, fit, grid, to_image


def test_pixels_become_a_picture() -> None:
    pixels = torch.zeros(3, 2, 4)
    pixels[0] = 1
    image = to_image(pixels)
    assert image.size == (4, 2)
    assert image.getpixel((3, 1)) == (255, 0, 0)


def test_any_shape_fits_a_cell_with_its_aspect_kept() -> None:
    wide = fit(Image.new("RGB", (400, 100), "red"))
    assert wide.size == (CELL, CELL)
    assert wide.getpixel((CELL // 2, CELL // 2)) == (255, 0, 0)
    assert wide.getpixel((CELL // 2, 2)) == (255, 255, 255)


def test_a_long_prompt_is_shortened_to_the_sheet() -> None:
    row = [Image.new("RGB", (8, 8), "blue")]
    sheet = grid([row, row], ["reference"], ["word " * 100, "short"])
    assert sheet.width < 2 * CELL
