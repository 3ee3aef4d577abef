"""Pictures with faults whose labels are known by construction, and the oracle's precision and recall on them.

    python -m tools.labelled [FOLDER]     # measure; with FOLDER, also save a contact sheet of each attribute

Each picture asks one question: does it show this value of this attribute? For a yes, it is a render that is blurred,
warped and noisy as a whole, or another part is destroyed. For a no, the part itself is erased, smudged, replaced for
two thirds, mixed half and half with another value, or drawn with another value. A picture is a function of its
attribute and number. Odd numbers are never to be used for mending the oracle, only to measure it.
"""

import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from customized_grpo.toyworld import draw
from customized_grpo.toyworld.oracle import NEEDS, Oracle, shown_right
from customized_grpo.toyworld.world import (
    ATTRIBUTES,
    Scene,
    Subject,
    sample_scene,
    sample_subject,
    visible_attributes,
)
from tools.pretrain import augment

COUNT = 200
"""Pictures of each attribute, half of them with the answer yes."""
FAULTS = ("erased", "smudged", "replaced", "mixed", "other")
KINDS = {"accessory": "accessory", "accessory_colour": "accessory", "companion": "companion",
         "companion_colour": "companion"}  # fmt: skip
NO_ACCESSORY: dict[str, str | None] = {"accessory": None, "accessory_colour": None}
NO_COMPANION: dict[str, str | None] = {"companion": None, "companion_colour": None}
WITHOUT: dict[str, dict[str, str | None]] = {
    "background": {"background": "plain"},
    "accessory": NO_ACCESSORY,
    "accessory_colour": NO_ACCESSORY,
    "companion": NO_COMPANION,
    "companion_colour": NO_COMPANION,
    "pattern": {"pattern": "plain"},
    "pattern_colour": {"pattern": "plain"},
    "ears": {"ears": "none"},
}
"""How to leave a part out; other parts are smudged instead."""
COLOUR_DISTANCE = 150
"""Euclidean distance of another colour, so that half and half of two colours is neither."""


@dataclass(frozen=True)
class Labelled:
    """One picture and its question."""

    attribute: str
    number: int
    value: str
    shown: bool
    fault: str
    """What was done to it."""
    pixels: draw.Pixels

    @property
    def for_mending(self) -> bool:
        return self.number % 2 == 0


def labelled(attribute: str, count: int = COUNT, size: int = draw.SIZE) -> list[Labelled]:
    """The pictures of one attribute, of `size` x `size` pixels."""
    return [_labelled(attribute, number, size) for number in range(count)]


def _labelled(attribute: str, number: int, size: int) -> Labelled:
    rng = random.Random(f"labelled {attribute} {number}")
    subject, scene = sample(rng, attribute)
    value = visible_attributes(subject, scene)[attribute]
    assert value is not None
    shown, seed = number // 2 % 2 == 0, rng.getrandbits(32)
    full = draw.render(subject, scene, seed, size)
    if not shown:
        fault = FAULTS[number // 4 % len(FAULTS)]
        pixels = spoil(rng, attribute, subject, scene, seed, full, fault)
        return Labelled(attribute, number, value, False, fault, pixels)
    if number // 4 % 2 == 0:
        degraded = augment.degrade(
            torch.from_numpy(full)[None].movedim(-1, 1) / 255, torch.Generator().manual_seed(number)
        )
        pixels = (degraded[0].clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
        return Labelled(attribute, number, value, True, "degraded", pixels)
    part = rng.choice([name for name in ("eyes", "mouth", "ears") if name != attribute])
    pixels = full if _is_bare(part, subject, scene) else spoil(rng, part, subject, scene, seed, full, "smudged")
    return Labelled(attribute, number, value, True, f"{part} smudged", pixels)


def sample(rng: random.Random, attribute: str) -> tuple[Subject, Scene]:
    """A subject and a scene in which the attribute is visible and not bare."""
    while True:
        subject = sample_subject(rng)
        scene = sample_scene(rng, subject.noun, kind=KINDS.get(attribute))  # pyright: ignore[reportArgumentType]
        if visible_attributes(subject, scene)[attribute] is not None and not _is_bare(attribute, subject, scene):
            return subject, scene


def _is_bare(attribute: str, subject: Subject, scene: Scene) -> bool:
    """Whether there is nothing to spoil: no ears, a plain background, eyes behind sunglasses."""
    return visible_attributes(subject, scene)[attribute] in (None, "none", "plain")


def spoil(
    rng: random.Random, attribute: str, subject: Subject, scene: Scene, seed: int, full: draw.Pixels, fault: str
) -> draw.Pixels:
    """The picture `full` with one part spoiled."""
    size = len(full)

    def drawn(values: Mapping[str, str | None]) -> draw.Pixels:
        return draw.render_with_mask(*changed(subject, scene, values), seed, size, posed_for=scene)[0]

    other = drawn(_another(rng, attribute, subject, scene))
    bare = drawn(WITHOUT[attribute]) if attribute in WITHOUT else other
    if fault == "other" or (attribute == "colour" and fault in ("erased", "smudged")):  # a smudge keeps its colour
        return other
    if fault == "mixed":
        return ((full.astype(np.uint16) + other) // 2).astype(np.uint8)
    if fault == "erased" and attribute in WITHOUT:
        return bare
    differs = (np.abs(full.astype(int) - bare).max(-1) > 12) | (np.abs(full.astype(int) - other).max(-1) > 12)
    region = np.asarray(Image.fromarray(differs.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(3))) > 0
    if fault == "replaced":
        rows = np.nonzero(region.any(1))[0]
        region &= (np.arange(size) >= np.quantile(rows, 0.3))[:, None]  # the lower two thirds, as a bite
        return np.where(region[..., None], bare, full)
    flat = np.asarray(Image.fromarray(full).filter(ImageFilter.GaussianBlur(6 * size // draw.SIZE)))
    return np.where(region[..., None], flat, full)


def changed(subject: Subject, scene: Scene, values: Mapping[str, str | None]) -> tuple[Subject, Scene]:
    """Both with other values of some of their fields."""
    body = {name: value for name, value in values.items() if hasattr(subject, name)}
    around = {name: value for name, value in values.items() if not hasattr(subject, name)}
    return replace(subject, **body), replace(scene, **around)  # pyright: ignore[reportArgumentType]


def _another(rng: random.Random, attribute: str, subject: Subject, scene: Scene) -> dict[str, str | None]:
    """Fields of the subject or the scene with which the attribute shows another value."""
    now = visible_attributes(subject, scene)[attribute]
    values = [value for value in ATTRIBUTES[attribute] if value not in (now, "none", "cream")]
    if attribute.endswith("colour"):
        here = draw.RGB.get(str(now), draw.CREAM)
        values = [v for v in values if np.linalg.norm(np.subtract(draw.RGB[v], here)) > COLOUR_DISTANCE]
        values = [v for v in values if attribute != "pattern_colour" or v != (scene.recolour or subject.colour)]
    value = rng.choice(values)
    if attribute == "colour":
        return {"recolour": value}
    if attribute == "accessory":
        coloured = value in ("hat", "scarf")
        return {"accessory": value, "accessory_colour": scene.accessory_colour or "red" if coloured else None}
    return {attribute: value}


def answers(oracle: Oracle, items: Sequence[Labelled]) -> list[bool]:
    """Whether the oracle sees the value that each picture asks for."""
    images = torch.from_numpy(np.stack([item.pixels for item in items])).movedim(-1, 1) / 255
    read = {name: value.cpu() for name, value in oracle.read(images).items()}
    found = []
    for row, item in enumerate(items):
        expected = {item.attribute: item.value}
        if name := NEEDS.get(item.attribute):  # a colour counts on anything that is there
            thing = int(read[name][row])
            if thing < 0 or ATTRIBUTES[name][thing] in ("none", "plain"):
                found.append(False)
                continue
            expected[name] = ATTRIBUTES[name][thing]
        found.append(shown_right(read, row, expected)[item.attribute])
    return found


def precision_and_recall(items: Sequence[Labelled], found: Sequence[bool]) -> tuple[float, float]:
    """Of the pictures in which the oracle sees the value, those that show it; and of those that show it, those seen."""
    right = sum(yes and item.shown for item, yes in zip(items, found, strict=True))
    return right / max(1, sum(found)), right / max(1, sum(item.shown for item in items))


def sheet(items: Sequence[Labelled], columns: int = 20) -> Image.Image:
    """The pictures side by side at twice their size."""
    rows = [np.concatenate([i.pixels for i in items[n : n + columns]], 1) for n in range(0, len(items), columns)]
    picture = Image.fromarray(np.concatenate(rows))
    return picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)


def main() -> None:
    oracle, folder = Oracle.load(), Path(sys.argv[1]) if len(sys.argv) > 1 else None
    credited = Counter[str]()
    print(f"{'attribute':<18}{'mending':>16}{'never for mending':>20}")
    for attribute in ATTRIBUTES:
        items = labelled(attribute, size=oracle.size)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            sheet(items[:40]).save(folder / f"{attribute}.png")
        found = answers(oracle, items)
        credited.update(i.fault for i, yes in zip(items, found, strict=True) if yes and not i.shown)
        halves = []
        for mending in (True, False):
            rows = [k for k, item in enumerate(items) if item.for_mending == mending]
            halves.append(precision_and_recall([items[k] for k in rows], [found[k] for k in rows]))
        print(f"{attribute:<18}" + "".join(f"{p:>12.2f}{r:>6.2f}" for p, r in halves))
    print("credited wrongly:", dict(credited))


if __name__ == "__main__":
    main()
