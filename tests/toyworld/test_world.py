import random

import pytest

from customized_grpo.toyworld import world
from customized_grpo.toyworld.world import (
    Scene,
    Subject,
    prompt,
    prompt_split,
    sample_scene,
    sample_subject,
    subject_split,
)


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (Scene("recontext", "beach"), "a star on the beach"),
        (Scene("accessory", "snow", "hat", "blue"), "a star wearing a blue hat in the snow"),
        (Scene("accessory", "plain", "crown"), "a star wearing a crown"),
        (Scene("accessory", "night", "sunglasses"), "a star wearing sunglasses at night"),
        (
            Scene("companion", "sea", companion="ball", companion_colour="red"),
            "a star under the sea next to a red ball",
        ),
        (Scene("property", "plain", recolour="pink"), "a pink star"),
    ],
)
def test_prompt_grammar(scene: Scene, expected: str) -> None:
    assert prompt("star", scene) == expected


def test_an_before_a_vowel_where_the_models_know_the_word() -> None:
    scene = Scene("companion", "sea", companion="box", companion_colour="orange")
    assert prompt("egg", scene) == "a egg under the sea next to a orange box"
    assert prompt("egg", scene, an=True) == "an egg under the sea next to an orange box"
    assert prompt("star", Scene("property", recolour="red"), an=True) == "a red star"


def test_every_prompt_is_made_of_the_vocabulary_and_fits_sixteen_tokens() -> None:
    rng = random.Random(0)
    for _ in range(500):
        words = prompt(rng.choice(world.NOUNS), sample_scene(rng, "star")).split()
        assert set(words) <= set(world.VOCABULARY)
        assert len(words) <= 14  # two more for <bos> and <eos>


def test_unknown_words_are_named_once() -> None:
    assert world.unknown_words("A RED star, smiling; a dog -- smiling") == ["smiling", "dog"]
    assert world.unknown_words("A red star wearing a hat.") == []
    assert len(world.VOCABULARY) == 41


def test_sampling_keeps_to_its_split() -> None:
    rng = random.Random(1)
    for split in ("train", "eval"):
        for _ in range(100):
            subject = sample_subject(rng, split)
            assert subject_split(subject) == split
            assert prompt_split(subject.noun, sample_scene(rng, subject.noun, split)) == split


def test_each_noun_holds_out_exactly_one_recolouring() -> None:
    for noun in world.NOUNS:
        held_out = [c for c in world.COLOURS if prompt_split(noun, Scene("property", recolour=c)) == "eval"]
        assert len(held_out) == 1


def test_held_out_pair_stays_held_out_inside_a_longer_prompt() -> None:
    assert prompt_split("bean", Scene("recontext", "room")) == "train"
    assert prompt_split("bean", Scene("recontext", "city")) == "eval"
    assert prompt_split("bean", Scene("accessory", "city", "crown")) == "eval"


def test_one_subject_in_eight_is_held_out() -> None:
    rng = random.Random(2)
    share = sum(subject_split(sample_subject(rng)) == "eval" for _ in range(4000)) / 4000
    assert share == pytest.approx(1 / 8, abs=0.02)


def test_visible_attributes_follow_the_prompt() -> None:
    subject = Subject("egg", "red", "dots", "blue", "horns", "big", "smile")
    plain = world.visible_attributes(subject, world.REFERENCE)
    assert plain["colour"] == "red"
    assert plain["accessory"] == plain["companion"] == "none"
    recoloured = world.visible_attributes(subject, Scene("property", recolour="blue"))
    assert recoloured["colour"] == "blue"
    assert recoloured["pattern_colour"] == "cream"
    assert world.visible_attributes(subject, Scene("accessory", accessory="sunglasses"))["eyes"] is None
    for name, value in recoloured.items():
        assert value is None or value in world.ATTRIBUTES[name]
