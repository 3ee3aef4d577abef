"""The toy world as a dataset: an endless supply of tasks whose answer is known."""

import random
from dataclasses import dataclass, field

from PIL import Image

from customized_grpo.structures import Example, LazyExamples
from customized_grpo.toyworld.draw import SIZE, render, render_with_mask
from customized_grpo.toyworld.world import (
    KINDS,
    REFERENCE,
    Kind,
    Scene,
    Split,
    Subject,
    prompt,
    sample_scene,
    sample_subject,
)


@dataclass(frozen=True)
class ToyExample(Example):
    """An example that knows the truth, for the oracle."""

    truth_subject: Subject = field(kw_only=True)
    truth_scene: Scene = field(kw_only=True)
    subject_id: str = field(kw_only=True, default="")
    """Which creature it is, so that intervals resample creatures and not the eight nouns."""


class ToyWorld(LazyExamples[ToyExample]):
    """`count` tasks of one split; task n is a pure function of (split, seed, n).

    Args:
        split: "train", or "eval": unseen subjects with unseen (noun, detail) pairs in their prompts.
        count: how many tasks.
        seed: another seed is another world of the same split.
        kinds: which kinds of prompt to ask; all of them by default.
        per_subject: how many prompts are asked of each subject.
        size: width and height of the references; above 64, prompts say "an" before a vowel.
    """

    def __init__(
        self,
        split: Split = "train",
        count: int = 1024,
        seed: int = 0,
        *,
        kinds: tuple[Kind, ...] = KINDS,
        per_subject: int = 1,
        size: int = SIZE,
    ) -> None:
        self.split: Split = split
        self.length, self.seed, self.kinds, self.per_subject, self.size = count, seed, kinds, per_subject, size

    def __len__(self) -> int:
        return self.length

    def example(self, index: int) -> ToyExample:
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is out of range for {self.length} toy examples")
        return self._example(index % self.length)

    def _example(self, index: int) -> ToyExample:
        subject, rng = self._subject(index // self.per_subject)
        pixels, mask = render_with_mask(subject, REFERENCE, rng.getrandbits(32), self.size)
        scene = self._scene(subject, index)
        return ToyExample(
            id=f"toy-{self.split}-{self.seed}-{index}",
            prompt=prompt(subject.noun, scene, an=self.size > SIZE),
            references=(Image.fromarray(pixels),),
            subject=subject.noun,
            masks=(Image.fromarray(mask),),
            kind=scene.kind or "",
            truth_subject=subject,
            truth_scene=scene,
            subject_id=f"toy-{self.split}-{self.seed}-subject-{index // self.per_subject}",
            target=self._target(subject, scene, index),
        )

    def _target(self, subject: Subject, scene: Scene, index: int) -> Image.Image:
        rng = random.Random(f"{self.split} {self.seed} target {index}")
        return Image.fromarray(render(subject, scene, rng.getrandbits(32), self.size))

    def all_kinds(self) -> list[str]:
        subjects = (self._subject(index // self.per_subject)[0] for index in range(self.length))
        return [self._scene(subject, index).kind or "" for index, subject in enumerate(subjects)]

    def _scene(self, subject: Subject, index: int) -> Scene:
        rng = random.Random(f"{self.split} {self.seed} scene {index}")
        while True:
            scene = sample_scene(rng, subject.noun, self.split, rng.choice(self.kinds) if self.kinds != KINDS else None)
            if scene.recolour != subject.colour:  # asking for the colour it has asks for nothing
                return scene

    def _subject(self, who: int) -> tuple[Subject, random.Random]:
        """The creature, and the randomness its reference is drawn with."""
        rng = random.Random(f"{self.split} {self.seed} subject {who}")
        return sample_subject(rng, self.split), rng


def toy_examples(split: Split = "train", count: int = 1024, seed: int = 0) -> list[ToyExample]:
    """The first `count` tasks of `ToyWorld(split, seed=seed)`, drawn at once."""
    return list(ToyWorld(split, count, seed))


def toy_reference(seed: int = 0) -> ToyExample:
    """An unseen subject to play with: its picture, its noun, and a prompt that suits it."""
    return ToyWorld("eval", 1, seed)[0]


__all__ = ["ToyExample", "ToyWorld", "toy_examples", "toy_reference"]
