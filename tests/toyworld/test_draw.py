import random
import time

import numpy as np

from customized_grpo.toyworld import draw
from customized_grpo.toyworld.world import ACCESSORIES, NOUNS, REFERENCE, Scene, Subject, sample_scene, sample_subject

STAR = Subject("star", "red", "plain", "blue", "none", "dots", "smile")


def test_render_is_a_pure_function_of_its_seed() -> None:
    scene = Scene("companion", "forest", companion="flower", companion_colour="pink")
    first, again, other = draw.render(STAR, scene, 5), draw.render(STAR, scene, 5), draw.render(STAR, scene, 6)
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert (first != other).any()


def test_mask_covers_the_creature_and_not_what_the_prompt_adds() -> None:
    plain, mask = draw.render_with_mask(STAR, REFERENCE, 0)
    assert mask.shape == (64, 64)
    assert 0.15 < (mask > 127).mean() < 0.45
    inside = plain[mask == 255].astype(float).mean(0)
    assert inside[0] > inside[1] + 60  # a red body
    for accessory in ACCESSORIES:
        scene = Scene("accessory", "plain", accessory, "blue" if accessory in ("hat", "scarf") else None)
        with_accessory = draw.render_with_mask(STAR, scene, 0)[1]
        bare = draw.render_with_mask(STAR, scene, 0)[1]
        assert (with_accessory == bare).all()


def test_recolouring_changes_the_body_and_keeps_the_shape() -> None:
    plain, mask = draw.render_with_mask(STAR, REFERENCE, 3)
    blue, same_mask = draw.render_with_mask(STAR, Scene("property", recolour="blue"), 3)
    assert (mask == same_mask).all()
    body = blue[mask == 255].astype(float).mean(0)
    assert body[2] > body[0] + 60
    assert (plain[mask == 0] == blue[mask == 0]).all()


def test_every_noun_looks_different() -> None:
    masks = [
        draw.render_with_mask(Subject(noun, "red", "plain", "blue", "none", "dots", "smile"), REFERENCE, 0)[1]
        for noun in NOUNS
    ]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert ((first > 127) != (second > 127)).sum() > 40


def test_pattern_in_the_body_colour_is_still_visible() -> None:
    striped = Subject("egg", "red", "stripes", "blue", "none", "dots", "smile")
    scene = Scene("property", recolour="blue")
    pixels, mask = draw.render_with_mask(striped, scene, 0)
    assert pixels[mask == 255].std(0).max() > 40


def test_benchmark_images_per_second(record_property) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(0)
    tasks = []
    for _ in range(60):
        subject = sample_subject(rng)
        tasks.append((subject, sample_scene(rng, subject.noun), rng.getrandbits(32)))
    for task in tasks:
        draw.render(*task)  # paints the places
    started = time.perf_counter()
    for task in tasks:
        draw.render(*task)
    rate = len(tasks) / (time.perf_counter() - started)
    record_property("images_per_second", round(rate))
