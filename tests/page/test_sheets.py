import time

from PIL import Image

from customized_grpo.page.sheets import CELL, fit, grid


def test_any_shape_fits_a_cell_with_its_aspect_kept() -> None:
    wide = fit(Image.new("RGB", (400, 100), "red"))
    assert wide.size == (CELL, CELL)
    assert wide.getpixel((CELL // 2, CELL // 2)) == (255, 0, 0)
    assert wide.getpixel((CELL // 2, 2)) == (255, 255, 255)


def test_any_text_can_be_drawn() -> None:
    row = [Image.new("RGB", (8, 8), "blue")]
    text = "a\nred\tdog\r\x00\x1b[31m\u2028\x85\u202e[bold] \ud800 🦄"
    assert grid([row], [text], [text]).size == grid([row], ["a"], ["a"]).size


def test_a_prompt_of_any_length_is_drawn_at_once() -> None:
    row = [Image.new("RGB", (8, 8), "blue")]
    started = time.monotonic()
    grid([row], ["reference"], ["w" * 1_000_000])
    assert time.monotonic() - started < 5


def test_a_long_prompt_is_shortened_to_the_sheet() -> None:
    row = [Image.new("RGB", (8, 8), "blue")]
    sheet = grid([row, row], ["reference"], ["word " * 100, "short"])
    assert sheet.width < 2 * CELL
