"""Rendered images for training and measurement. A corpus is a pure function of its arguments."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from customized_grpo.toyworld.draw import SIZE, Pixels, render_with_mask
from customized_grpo.toyworld.world import (
    ATTRIBUTES,
    EARS,
    EYES,
    MOUTHS,
    PATTERNS,
    REFERENCE,
    Scene,
    Split,
    Subject,
    prompt,
    sample_scene,
    sample_subject,
    visible_attributes,
)


@dataclass(frozen=True)
class Corpus:
    """N subjects with V images each; image 0 is the reference."""

    images: Tensor
    """(N, V, 3, S, S) uint8."""
    masks: Tensor
    """(N, V, S, S) uint8, 255 on the subject; of imperfect pairs 85 there, and 255 on what the prompt changes."""
    subjects: tuple[Subject, ...]
    scenes: tuple[tuple[Scene, ...], ...]
    """The requested scenes: N rows of V."""

    @property
    def size(self) -> int:
        """Width and height of the images in pixels."""
        return self.images.shape[-1]

    @property
    def an(self) -> bool:
        """Whether prompts say "an" before a vowel."""
        return self.size > SIZE

    @property
    def prompts(self) -> list[list[str]]:
        return [
            [prompt(s.noun, scene, an=self.an) for scene in row]
            for s, row in zip(self.subjects, self.scenes, strict=True)
        ]

    def labels(self) -> dict[str, Tensor]:
        """Per attribute (N, V) int64 indices into `ATTRIBUTES`, -1 where it is not visible; for faithful corpora."""
        rows = [
            [visible_attributes(s, scene) for scene in row] for s, row in zip(self.subjects, self.scenes, strict=True)
        ]
        return {name: torch.tensor([[label(name, seen[name]) for seen in row] for row in rows]) for name in ATTRIBUTES}


def label(name: str, value: str | None) -> int:
    """Index of the value among those of `ATTRIBUTES`; -1 where there is nothing to see."""
    return -1 if value is None else ATTRIBUTES[name].index(value)


def faithful(
    count: int,
    scenes: int,
    seed: int,
    split: Split = "train",
    prompts: Split | None = None,
    size: int = SIZE,
) -> Corpus:
    """A corpus whose images show exactly their subjects and scenes."""
    return _corpus(
        count,
        scenes,
        seed,
        split,
        prompts,
        size,
        lambda rng, subject, scene: render_with_mask(subject, scene, rng.getrandbits(32), size),
    )


def imperfect(count: int, scenes: int, seed: int, size: int = SIZE) -> Corpus:
    """Training pairs with the faults of synthetic pairs, so that reinforcement learning can improve the base model.

    10 % are copies of the reference. Of the others, 25 % show a slightly different subject and 35 % leave out a part of
    the scene.
    """

    def draw(rng: random.Random, subject: Subject, scene: Scene) -> tuple[Pixels, Pixels]:
        if rng.random() < 0.1:
            pixels, mask = render_with_mask(subject, REFERENCE, rng.getrandbits(32), size)
            return pixels, mask // 3
        shown = _drift(rng, subject) if rng.random() < 0.25 else subject
        painted = _forget(rng, scene) if rng.random() < 0.35 else scene
        seed = rng.getrandbits(32)
        pixels, mask = render_with_mask(shown, painted, seed, size, posed_for=scene)
        return pixels, np.maximum(mask // 3, _changed(shown, scene, seed, size))

    return _corpus(count, scenes, seed, "train", "train", size, draw)


def _changed(subject: Subject, scene: Scene, seed: int, size: int) -> Pixels:
    """255 where an accessory, a companion or a new colour belongs, painted or not: (S, S)."""
    if scene.kind == "recontext":
        return np.zeros((size, size), dtype=np.uint8)
    bare = Scene(kind=scene.kind, background=scene.background)
    pictures = [render_with_mask(subject, s, seed, size, posed_for=scene)[0].astype(int) for s in (scene, bare)]
    return (np.abs(pictures[0] - pictures[1]).max(-1) > 12).astype(np.uint8) * 255


def _corpus(
    count: int,
    scenes: int,
    seed: int,
    split: Split,
    prompts: Split | None,
    size: int,
    draw: Callable[[random.Random, Subject, Scene], tuple[Pixels, Pixels]],
) -> Corpus:
    images = np.empty((count, 1 + scenes, size, size, 3), dtype=np.uint8)
    masks = np.empty((count, 1 + scenes, size, size), dtype=np.uint8)
    subjects: list[Subject] = []
    asked: list[tuple[Scene, ...]] = []
    for n in range(count):
        rng = random.Random(f"{seed} {split} {n}")
        subject = sample_subject(rng, split)
        row = tuple(sample_scene(rng, subject.noun, prompts) for _ in range(scenes))
        images[n, 0], masks[n, 0] = render_with_mask(subject, REFERENCE, rng.getrandbits(32), size)
        for v, scene in enumerate(row, start=1):
            images[n, v], masks[n, v] = draw(rng, subject, scene)
        subjects.append(subject)
        asked.append((REFERENCE, *row))
    return Corpus(torch.from_numpy(images).movedim(-1, 2), torch.from_numpy(masks), tuple(subjects), tuple(asked))


def _drift(rng: random.Random, subject: Subject) -> Subject:
    """The subject with one property changed."""
    return rng.choice(
        (
            replace(subject, hue_shift=subject.hue_shift + rng.choice((-1, 1)) * rng.uniform(0.05, 0.2)),
            replace(subject, hue_shift=subject.hue_shift + rng.choice((-1, 1)) * rng.uniform(0.05, 0.2)),
            replace(subject, pattern=rng.choice(PATTERNS)),
            replace(subject, ears=rng.choice(EARS)),
            replace(subject, eyes=rng.choice(EYES), mouth=rng.choice(MOUTHS)),
            replace(subject, pattern_colour=sample_subject(rng).pattern_colour),
        )
    )


def _forget(rng: random.Random, scene: Scene) -> Scene:
    """The scene without one of its parts."""
    without = []
    if scene.background != "plain":
        without.append(replace(scene, background="plain"))
    if scene.accessory:
        without.append(replace(scene, accessory=None, accessory_colour=None))
    if scene.companion:
        without.append(replace(scene, companion=None, companion_colour=None))
    if scene.recolour:
        without.append(replace(scene, recolour=None))
    return rng.choice(without)
