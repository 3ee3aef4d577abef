import numpy as np

from customized_grpo.toyworld import draw
from customized_grpo.toyworld.world import ACCESSORIES, BACKGROUNDS, NOUNS, PLACES, REFERENCE, Scene, Subject

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
    # A hat and a crown ask for the same room above the creature, sunglasses and a scarf for none.
    masks = {}
    for accessory in ACCESSORIES:
        colour = "blue" if accessory in ("hat", "scarf") else None
        pixels, masks[accessory] = draw.render_with_mask(STAR, Scene("accessory", "plain", accessory, colour), 0)
        assert (pixels != plain).any()
    assert (masks["hat"] == masks["crown"]).all()
    assert (masks["sunglasses"] == mask).all()
    assert (masks["scarf"] == mask).all()


def test_recolouring_changes_the_body_and_keeps_the_shape() -> None:
    plain, mask = draw.render_with_mask(STAR, REFERENCE, 3)
    blue, same_mask = draw.render_with_mask(STAR, Scene("property", recolour="blue"), 3)
    assert (mask == same_mask).all()
    body = blue[mask == 255].astype(float).mean(0)
    assert body[2] > body[0] + 60
    assert (plain[mask == 0] == blue[mask == 0]).all()


def test_above_64_pixels_each_place_moves_the_creature_in_its_own_way() -> None:
    def stands(scene: Scene) -> np.ndarray:
        """Per seed the centre of the creature and the root of its area, in 64ths of the picture: (4, 3)."""
        rows = []
        for seed in range(4):
            pixels, mask = draw.render_with_mask(STAR, scene, seed, 128)
            assert pixels.shape == (128, 128, 3)
            assert not np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).any()  # all of it is in the picture
            inside = np.argwhere(mask > 127) / 2
            rows.append([*inside.mean(0), 0.5 * (mask > 127).sum() ** 0.5])
        return np.array(rows)

    for kind, added in {"recontext": {}, "companion": {"companion": "box", "companion_colour": "red"}}.items():
        places = np.stack([stands(Scene(kind, place, **added)) for place in PLACES])
        assert (places.std(1) < 1).all()
        assert (places.mean(1).std(0) > (1, 4, 0.7)).all()
    assert (stands(REFERENCE).std(0) < 1).all()
    assert set(draw.STANCES) == set(BACKGROUNDS)


def test_a_larger_reference_is_the_same_drawing() -> None:
    small = draw.render(STAR, REFERENCE, 4).astype(float)
    large = draw.render(STAR, REFERENCE, 4, 128).astype(float)
    reduced = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(small - reduced).mean() < 2


def test_a_pose_for_another_scene_differs_only_in_what_is_added() -> None:
    scene = Scene("accessory", "plain", "hat", "blue")
    _, mask = draw.render_with_mask(STAR, scene, 7)
    bare, same_mask = draw.render_with_mask(STAR, REFERENCE, 7, posed_for=scene)
    assert (mask == same_mask).all()
    assert (bare != draw.render(STAR, scene, 7)).any()
    assert (mask != draw.render_with_mask(STAR, REFERENCE, 7)[1]).any()


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
