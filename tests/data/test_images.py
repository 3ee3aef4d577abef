"""Preprocess against the image processors of transformers, which work picture by picture on PIL and numpy."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from customized_grpo.data.images import Preprocess, png, segmented, to_pil, to_tensor
from customized_grpo.errors import UserError
from customized_grpo.structures import Example
from rewards import tiny

GREY_LEVELS = 3
"""The processors round to 8 bits after resizing, on PIL's own fixed-point filters: off by a grey level or two."""

PROCESSORS = {"clip": tiny.clip_processor(), "dinov2": tiny.bit_processor(), "vit": tiny.vit_processor()}


@pytest.mark.parametrize("size", [(32, 32), (40, 40), (97, 61), (61, 97), (20, 24), (33, 150)], ids=str)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_equals_the_processors_own_output(kind, size, tmp_path):
    processor = PROCESSORS[kind]
    processor.save_pretrained(tmp_path)
    image = tiny.picture(*size)
    theirs = torch.from_numpy(np.asarray(processor(image)["pixel_values"][0]))
    ours = Preprocess.from_pretrained(tmp_path).pil(image)[0]
    assert ours.shape == theirs.shape
    tolerance = GREY_LEVELS / 255 / min(processor.image_std)
    assert (ours - theirs).abs().max() < tolerance
    assert (ours - theirs).abs().mean() < tolerance / 4


def test_pictures_smaller_than_the_crop_are_padded_like_theirs(tmp_path):
    processor = type(tiny.clip_processor())(size={"shortest_edge": 20}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    image = tiny.picture(40, 40)
    theirs = torch.from_numpy(np.asarray(processor(image)["pixel_values"][0]))
    assert (Preprocess.from_pretrained(tmp_path).pil(image)[0] - theirs).abs().max() < 0.06


def test_a_batch_is_what_its_pictures_are_one_by_one():
    preprocess = Preprocess(crop=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, shortest_edge=36)
    batch = torch.stack([to_tensor(tiny.picture(60, 44, seed=n)) for n in range(3)])
    assert torch.equal(preprocess(batch), torch.cat([preprocess(row[None]) for row in batch]))


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (3, 400)])
def test_a_very_long_image_is_not_resized_only_to_be_cropped_away(size, monkeypatch):
    made = []

    def resize(images, size, real=torch.nn.functional.interpolate, **options):
        made.append(size[0] * size[1])
        return real(images, size, **options)

    monkeypatch.setattr("customized_grpo.data.images.interpolate", resize)
    image = tiny.picture(*size)
    for fit in ("cover", "contain", "stretch"):
        preprocess = Preprocess(crop=(56, 56), mean=(0.0,) * 3, std=(1.0,) * 3, shortest_edge=56, fit=fit)
        assert preprocess.pil(image).shape == (1, 3, 56, 56)
    assert max(made) <= 56 * 56 * 32


def test_the_middle_of_a_very_long_image_is_what_is_kept():
    column = torch.zeros(1, 3, 1000, 2)
    column[..., 499:501, :] = 1
    seen = Preprocess(crop=(32, 32), mean=(0.0,) * 3, std=(1.0,) * 3, shortest_edge=32)(column)
    assert seen[0, 0, 15:17].min() == 1 > seen[0, 0, 0].max()
    assert torch.allclose(seen, seen.flip(-2), atol=1e-5)


def test_contain_keeps_the_whole_picture_and_pads_with_black():
    preprocess = Preprocess(crop=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, fit="contain")
    padded = preprocess(torch.ones(1, 3, 16, 8))
    assert torch.equal(padded[0, 0, 0], torch.tensor([0.0, 0, 1, 1, 1, 1, 0, 0]))
    assert padded[0, 0].sum() == 8 * 4


@pytest.mark.parametrize(
    ("config", "crop", "fit"),
    [
        ({"size": 24, "do_center_crop": True, "crop_size": 24}, (24, 24), "cover"),  # CLIP's file of old
        ({"size": 24}, (24, 24), "stretch"),  # DINO v1's file of old: ViT resizes to a square
        ({"size": {"shortest_edge": 24}}, (24, 24), "cover"),
        ({"size": {"height": 24, "width": 16}}, (24, 16), "stretch"),
    ],
)
def test_config_files_of_every_age(config, crop, fit, tmp_path):
    means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | means))
    preprocess = Preprocess.from_pretrained(tmp_path)
    assert (preprocess.crop, preprocess.fit) == (crop, fit)
    assert preprocess(torch.rand(2, 3, 40, 50)).shape == (2, 3, *crop)


def test_what_it_cannot_do_is_said(tmp_path):
    with pytest.raises(UserError, match="preprocessor_config"):
        Preprocess.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"longest_edge": 24}}')
    with pytest.raises(UserError, match="longest_edge"):
        Preprocess.from_pretrained(tmp_path)


def test_tensors_and_pictures_are_inverse():
    image = tiny.picture(17, 9)
    assert to_tensor(image).shape == (3, 9, 17)
    assert to_pil(to_tensor(image)).tobytes() == image.tobytes()
    assert to_pil(torch.full((3, 2, 2), 1.5)).getpixel((0, 0)) == (255, 255, 255)
    assert Image.open(io.BytesIO(png(image))).tobytes() == image.tobytes()


def test_segmented_paints_white_outside_the_mask():
    image = Image.new("RGB", (4, 2), "red")
    mask = Image.new("L", (4, 2), 0)
    mask.paste(255, (0, 0, 2, 2))
    first, second = segmented(Example("e", "p", (image, image), masks=(mask, None)))
    assert [first.getpixel((x, 0)) for x in (0, 3)] == [(255, 0, 0), (255, 255, 255)]
    assert second is image
