"""Right masks for every way in which people write them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from customized_grpo.data.images import segmented
from customized_grpo.data.masks import subject_mask
from customized_grpo.errors import UserError
from customized_grpo.structures import Example

SUBJECT = np.zeros((32, 40), bool)
SUBJECT[8:26, 10:28] = True


def two(low, high, dtype=np.uint8):
    return np.where(SUBJECT, high, low).astype(dtype)


def palette(low, high, colours, transparent=None):
    image = Image.fromarray(two(low, high)).convert("P")
    image.putdata(two(low, high).ravel().tolist())
    image.putpalette(sum(colours, ()) + (0,) * (768 - 3 * len(colours)))
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def colours(background, subject):
    return Image.fromarray(np.where(SUBJECT[..., None], subject, background).astype(np.uint8))


def stored(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    read = Image.open(buffer)
    read.load()
    return read


TWO_VALUES = {
    "0/255": Image.fromarray(two(0, 255)),
    "0/1": Image.fromarray(two(0, 1)),
    "0/2": Image.fromarray(two(0, 2)),
    "0/128": Image.fromarray(two(0, 128)),
    "30/200": Image.fromarray(two(30, 200)),
    "1 bit": Image.fromarray(SUBJECT),
    "16 bit of 0/1": Image.fromarray(two(0, 1, np.uint16)),
    "16 bit of 0/300": Image.fromarray(two(0, 300, np.uint16)),
    "16 bit of 0/65535": Image.fromarray(two(0, 65535, np.uint16)),
    "32 bit": Image.fromarray(two(0, 70000, np.int32)),
    "float": Image.fromarray(two(0, 0.4, np.float32)),
    "palette label 1, dark red": palette(0, 1, [(0, 0, 0), (128, 0, 0)]),
    "palette label 15": palette(0, 15, [(0, 0, 0)] * 15 + [(192, 128, 128)]),
    "palette, black last": palette(1, 0, [(255, 255, 255), (0, 0, 0)]),
    "palette without black": palette(0, 1, [(70, 70, 160), (250, 250, 20)]),
    "palette of one colour": palette(0, 1, [(0, 0, 0), (0, 0, 0)]),
    "grey palette": palette(0, 1, [(0, 0, 0), (1, 1, 1)]),
    "RGB blue": colours((0, 0, 0), (0, 0, 128)),
    "RGB white": colours((0, 0, 0), (255, 255, 255)),
    "JPEG of red": stored(colours((0, 0, 0), (255, 0, 0)), "JPEG", quality=90, subsampling=0),
    "JPEG of white": stored(Image.fromarray(two(0, 255)), "JPEG", quality=75),
    "alpha of 0/255": Image.merge("LA", [Image.new("L", (40, 32), 255), Image.fromarray(two(0, 255))]),
    "alpha of 0/128": Image.merge("LA", [Image.new("L", (40, 32), 0), Image.fromarray(two(0, 128))]),
    "palette with transparency": palette(0, 1, [(9, 9, 9), (9, 9, 9)], transparent=0),
    "opaque RGBA": colours((0, 0, 0), (255, 255, 255)).convert("RGBA"),
    "nearly opaque RGBA": Image.merge(
        "RGBA", [*colours((0, 0, 0), (90, 90, 90)).split(), Image.new("L", (40, 32), 250)]
    ),
}


@pytest.mark.parametrize("image", TWO_VALUES.values(), ids=TWO_VALUES)
def test_two_values_are_background_and_subject(image):
    mask = subject_mask(image)
    assert (mask.mode, mask.size) == ("L", (40, 32))
    lossy = image.format == "JPEG"
    difference = np.abs(np.asarray(mask, dtype=int) - two(0, 255))
    assert (difference[SUBJECT].mean(), difference[~SUBJECT].mean()) < ((6, 6) if lossy else (0.1, 0.1))
    assert ((np.asarray(mask) >= 128) == SUBJECT).all()


@pytest.mark.parametrize("top", [255, 100])
@pytest.mark.parametrize("colour", [None, (1.0, 0.0, 0.0)])
def test_soft_edges_stay_soft(top, colour):
    soft = Image.fromarray(two(0, top)).filter(ImageFilter.GaussianBlur(2))
    expected = np.asarray(soft) / np.asarray(soft).max() * 255
    if colour:
        soft = Image.fromarray((np.asarray(soft)[..., None] * np.asarray(colour)).astype(np.uint8))
    assert np.abs(np.asarray(subject_mask(soft), dtype=float) - expected).max() <= 3


def test_a_grey_level_matte_stays_as_it_is():
    matte = Image.fromarray(np.tile(np.linspace(0, 255, 300).round().astype(np.uint8), (20, 1)))
    assert (np.asarray(subject_mask(matte)) == np.asarray(matte)).all()
    dim = Image.fromarray(np.tile(np.linspace(0, 200, 300).round().astype(np.uint8), (20, 1)))
    assert (np.asarray(subject_mask(dim)) == np.asarray(dim)).all()
    deep = Image.fromarray(np.tile(np.linspace(0, 65535, 300).round().astype(np.uint16), (20, 1)))
    assert np.abs(np.asarray(subject_mask(deep), dtype=int) - np.asarray(matte)).max() <= 1


def several(*labels):
    values = np.zeros((32, 40), np.uint8)
    for n, label in enumerate(labels):
        values[4:28, 4 + 10 * n : 14 + 10 * n] = label
    return values


LABELS = {
    "1, 2": Image.fromarray(several(1, 2)),
    "1, 2, 3": Image.fromarray(several(1, 2, 3)),
    "128, 255": Image.fromarray(several(128, 255)),
    "1 and a void of 255": Image.fromarray(several(1, 255)),
    "16 bit": Image.fromarray(several(1, 2).astype(np.uint16) * 1000),
    "two colours": Image.fromarray(np.stack([several(200, 0), several(0, 200), several(0, 0)], -1)),
    "palette of too few colours": palette(0, 1, [(0, 0, 0), (128, 0, 0), (0, 0, 0)]),
    "two shades": Image.fromarray(np.stack([several(64, 128), several(0, 0), several(0, 0)], -1)),
}


LABELS["palette of too few colours"].paste(2, (0, 0, 6, 6))


@pytest.mark.parametrize("image", LABELS.values(), ids=LABELS)
def test_several_labels_are_refused_unless_one_is_named(image):
    with pytest.raises(UserError, match="mask_labels"):
        subject_mask(image, "The mask 'm.png'")


@pytest.mark.parametrize(("name", "label"), [("1, 2", 1), ("1 and a void of 255", 1), ("two colours", "#c80000"),
                                             ("16 bit", 1000), ("two shades", "rgb(64, 0, 0)")])  # fmt: skip
def test_a_named_label(name, label):
    assert (np.asarray(subject_mask(LABELS[name], label=label)) == np.where(several(1) == 1, 255, 0)).all()


def test_a_named_label_of_a_palette_is_its_index():
    image = palette(3, 7, [(n, 2 * n, 3 * n) for n in range(8)])
    assert (np.asarray(subject_mask(image, label=7)) == two(0, 255)).all()


@pytest.mark.parametrize("image", [Image.new("L", (40, 32), 0), Image.new("1", (40, 32), 0), Image.new("P", (40, 32)),
                                   Image.new("RGBA", (40, 32), (255, 255, 255, 0)), Image.new("RGB", (40, 32)),
                                   Image.new("I;16", (40, 32), 0)], ids=lambda image: image.mode)  # fmt: skip
def test_a_mask_that_marks_nothing_is_refused(image):
    with pytest.raises(UserError, match=r"The mask 'm.png' is black or transparent everywhere; mark the subject white"):
        subject_mask(image, "The mask 'm.png'")


def test_a_photo_is_no_mask(random):
    photo = Image.fromarray(torch.randint(0, 256, (32, 40, 3), generator=random, dtype=torch.uint8).numpy())
    with pytest.raises(UserError, match="has several colours; mark the subject alone"):
        subject_mask(photo)


@pytest.mark.parametrize("image", [Image.fromarray(two(255, 0)), palette(0, 1, [(255, 255, 255), (0, 0, 0)])])
def test_a_mask_that_looks_inverted_is_warned_about(image):
    with pytest.warns(UserWarning, match="looks inverted"):
        subject_mask(image)


def test_a_subject_that_fills_the_picture_is_not_inverted():
    assert subject_mask(Image.new("L", (40, 32), 7)).getextrema() == (255, 255)


@pytest.mark.parametrize("mask", [palette(0, 1, [(0, 0, 0), (128, 0, 0)]), Image.fromarray(two(0, 1))], ids=["P", "L"])
def test_the_subject_is_cut_out_by_any_mask_of_an_example(mask):
    """Masks that a dataset of one's own hands over are read in the same way as those of a manifest."""
    (cut,) = segmented(Example("e", "p", (Image.new("RGB", (40, 32), "red"),), masks=(mask,)))
    assert (np.asarray(cut) == np.where(SUBJECT[..., None], (255, 0, 0), 255)).all()
