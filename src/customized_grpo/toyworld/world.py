"""What can be drawn and said: subjects, scenes, prompts, and what is held out. Nothing here draws.

Every image of the toy world is `draw.render(subject, scene, seed)`, so its attributes are known exactly.
"""

import random
import re
from dataclasses import astuple, dataclass
from typing import Literal

NOUNS = ("bean", "star", "cloud", "pear", "ghost", "cube", "egg", "heart")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
PATTERNS = ("plain", "stripes", "dots", "belly", "patch")
EARS = ("none", "round", "pointy", "horns", "antenna", "leaf")
EYES = ("dots", "big", "one", "sleepy")
MOUTHS = ("smile", "o", "flat")

PLACES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "forest": "in the forest",
    "night": "at night",
    "desert": "in the desert",
    "city": "in the city",
    "sea": "under the sea",
    "room": "in a room",
    "meadow": "in a meadow",
}
"""Background to the words that ask for it. "plain" is a backdrop nobody asked for."""
BACKGROUNDS = ("plain", *PLACES)
ACCESSORIES = ("hat", "crown", "sunglasses", "scarf")
COLOURED_ACCESSORIES = ("hat", "scarf")
COMPANIONS = ("ball", "box", "flower")

Kind = Literal["recontext", "accessory", "companion", "property"]
KINDS: tuple[Kind, ...] = ("recontext", "accessory", "companion", "property")
Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Subject:
    """A creature. The words are its exact attributes; by the numbers two creatures of one description differ."""

    noun: str
    colour: str
    pattern: str
    pattern_colour: str
    ears: str
    eyes: str
    mouth: str
    cheeks: bool = False
    hue_shift: float = 0.0
    """Of the body, in turns of the colour wheel."""
    lightness: float = 1.0
    """Of the body, as a factor."""
    stoutness: float = 1.0
    """Width over height, as a factor."""


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for. None is "not asked for"."""

    kind: Kind | None = None
    """DreamBench's kinds of prompt, accessories and companions told apart; None for a reference picture."""
    background: str = "plain"
    accessory: str | None = None
    accessory_colour: str | None = None
    companion: str | None = None
    companion_colour: str | None = None
    recolour: str | None = None


REFERENCE = Scene()
"""The plain picture that shows a policy who the subject is."""


def prompt(noun: str, scene: Scene, *, an: bool = False) -> str:
    """The prompt of a scene, at most 14 words: `a red star wearing a blue hat in the snow next to a green ball`.

    Args:
        an: write "an" before a vowel; the packaged models have not learned this word.
    """
    words = ["a", scene.recolour, noun]
    if scene.accessory:
        article = "a" if scene.accessory != "sunglasses" else None
        words += ["wearing", article, scene.accessory_colour, scene.accessory]
    words.append(PLACES.get(scene.background))
    if scene.companion:
        words += ["next to a", scene.companion_colour, scene.companion]
    text = " ".join(word for word in words if word)
    return re.sub(r"\ba (?=[aeiou])", "an ", text) if an else text


VOCABULARY = tuple(
    sorted(
        {
            w
            for phrase in (*PLACES.values(), *NOUNS, *COLOURS, *ACCESSORIES, *COMPANIONS, "a wearing next to")
            for w in phrase.split()
        }
    )
)
"""Every word a prompt can hold, but "an"."""


def unknown_words(text: str) -> list[str]:
    """The words of a prompt that are not in the vocabulary, each once; case and punctuation do not count."""
    return [word for word in dict.fromkeys(re.findall(r"\w+", text.lower())) if word not in VOCABULARY]


def details(scene: Scene) -> dict[str, int]:
    """What the scene asks for, each with its place in the list of all such things."""
    found: dict[str, int] = {}
    if scene.background in PLACES:
        found["background"] = list(PLACES).index(scene.background)
    if scene.accessory:
        colour = COLOURS.index(scene.accessory_colour) if scene.accessory_colour else 0
        found["accessory"] = ACCESSORIES.index(scene.accessory) + colour
    if scene.companion and scene.companion_colour:
        found["companion"] = COMPANIONS.index(scene.companion) + COLOURS.index(scene.companion_colour)
    if scene.recolour:
        found["recolour"] = COLOURS.index(scene.recolour)
    return found


def prompt_split(noun: str, scene: Scene) -> Split:
    """One (noun, detail) pair in eight is held out, on the diagonals of a Latin square: "a star on the beach", say.

    A prompt is "eval" if any of its pairs is held out, so every word is known from training but never in this pairing.
    """
    held_out = any((NOUNS.index(noun) + place) % 8 == 5 for place in details(scene).values())
    return "eval" if held_out else "train"


def subject_split(subject: Subject) -> Split:
    """One combination of words in eight is held out; every training subject differs from it in at least one."""
    lists = (NOUNS, COLOURS, PATTERNS, COLOURS, EARS, EYES, MOUTHS)
    total = sum(names.index(word) for names, word in zip(lists, astuple(subject)[:7], strict=True))
    return "eval" if total % 8 == 3 else "train"


def sample_subject(rng: random.Random, split: Split | None = None) -> Subject:
    """Draw a subject; with `split`, only from that side."""
    while True:
        colour = rng.choice(COLOURS)
        subject = Subject(
            noun=rng.choice(NOUNS),
            colour=colour,
            pattern=rng.choice(PATTERNS),
            pattern_colour=rng.choice([c for c in COLOURS if c != colour]),
            ears=rng.choice(EARS),
            eyes=rng.choice(EYES),
            mouth=rng.choice(MOUTHS),
            cheeks=rng.random() < 0.4,
            hue_shift=rng.uniform(-0.018, 0.018),
            lightness=rng.uniform(0.9, 1.08),
            stoutness=rng.uniform(0.94, 1.06),
        )
        if split is None or subject_split(subject) == split:
            return subject


def sample_scene(rng: random.Random, noun: str, split: Split | None = None, kind: Kind | None = None) -> Scene:
    """Draw what to ask of a subject with this noun; `split` and `kind` restrict the draw."""
    while True:
        chosen = kind or rng.choices(KINDS, (0.3, 0.25, 0.2, 0.25))[0]
        background = rng.choice(tuple(PLACES))
        plain = rng.random() < {"recontext": 0.0, "accessory": 0.25, "companion": 0.25, "property": 0.4}[chosen]
        accessory = rng.choice(ACCESSORIES) if chosen == "accessory" else None
        scene = Scene(
            kind=chosen,
            background="plain" if plain else background,
            accessory=accessory,
            accessory_colour=rng.choice(COLOURS) if accessory in COLOURED_ACCESSORIES else None,
            companion=rng.choice(COMPANIONS) if chosen == "companion" else None,
            companion_colour=rng.choice(COLOURS) if chosen == "companion" else None,
            recolour=rng.choice(COLOURS) if chosen == "property" else None,
        )
        if split is None or prompt_split(noun, scene) == split:
            return scene


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "background": BACKGROUNDS,
    "accessory": ("none", *ACCESSORIES),
    "accessory_colour": COLOURS,
    "companion": ("none", *COMPANIONS),
    "companion_colour": COLOURS,
    "noun": NOUNS,
    "colour": COLOURS,
    "pattern": PATTERNS,
    "pattern_colour": (*COLOURS, "cream"),
    "ears": EARS,
    "eyes": EYES,
    "mouth": MOUTHS,
}
"""Everything that can be seen in a picture, with the values it can take."""
SUBJECT_ATTRIBUTES = ("noun", "colour", "pattern", "pattern_colour", "ears", "eyes", "mouth")


def visible_attributes(subject: Subject, scene: Scene) -> dict[str, str | None]:
    """The exact truth about a picture, by the names of `ATTRIBUTES`; None where there is nothing to see."""
    colour = scene.recolour or subject.colour
    second = "cream" if colour == subject.pattern_colour else subject.pattern_colour
    return {
        "background": scene.background,
        "accessory": scene.accessory or "none",
        "accessory_colour": scene.accessory_colour,
        "companion": scene.companion or "none",
        "companion_colour": scene.companion_colour,
        "noun": subject.noun,
        "colour": colour,
        "pattern": subject.pattern,
        "pattern_colour": second if subject.pattern != "plain" else None,
        "ears": subject.ears,
        "eyes": subject.eyes if scene.accessory != "sunglasses" else None,
        "mouth": subject.mouth,
    }
