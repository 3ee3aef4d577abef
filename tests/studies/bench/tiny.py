"""DreamBench in small, a policy and rewards for it, as the command names them: `studies.bench.tiny:NAME`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import fakes
from customized_grpo.data.images import to_tensor
from customized_grpo.structures import Example

COLOURS = {"dog": (200, 120, 40), "vase": (30, 60, 200), "can": (90, 200, 60)}
LISTING = """Classes

subject_name,class
{classes}

Prompts

Object Prompts

prompt_list = [
'a {{0}} {{1}} in the snow'.format(unique_token, class_token),
'a red {{0}} {{1}}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {{0}} {{1}} in the snow'.format(unique_token, class_token),
'a {{0}} {{1}} wearing a red hat'.format(unique_token, class_token),
'a wet {{0}} {{1}}'.format(unique_token, class_token)
]
"""


def dreambench(folder: Path, photos: int = 3) -> Path:
    """A clone: three subjects, a flat colour each that differs a little from photo to photo, the first one masked."""
    root = folder / "dataset"
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for n in range(photos):
            Image.new("RGB", (8, 8), tuple(min(255, c + 10 * n) for c in colour)).save(root / name / f"{n:02d}.png")
        mask = Image.new("L", (8, 8), 0)
        mask.paste(255, (3, 3, 5, 5))
        mask.save(root / name / "00_mask.png")
    classes = "\n".join(f"{name},{name}" for name in COLOURS)
    (root / "prompts_and_classes.txt").write_text(LISTING.format(classes=classes), encoding="utf-8")
    return folder


def dreambench_plus(folder: Path, subjects: tuple[tuple[str, str], ...] = (("animal", "00"),)) -> Path:
    """A download: subjects by kind and number, nine prompts each."""
    for kind, name in subjects:
        for part in ("images", "captions"):
            (folder / part / kind).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "images" / kind / f"{name}.jpg")
        prompts = [f"a cat {n}" for n in range(9)]
        (folder / "captions" / kind / f"{name}.txt").write_text("\n".join(["cat", *prompts]))
    return folder


class OmniContext(list):
    """Its data set in small, as `open_dataset` opens it: a task of each of three kinds, and one in Chinese."""

    column_names = ("key", "task_type", "instruction", "instruction_language", "input_images")

    def __init__(self) -> None:
        for n, kind in enumerate(("single_object", "multi_character", "scene_character_object", "single_object")):
            pictures = [Image.new("RGB", (32, 32), colour) for colour in list(COLOURS.values())[: 1 + n % 3]]
            row = (f"k{n}", kind, f"a dog {n}", "zh" if n == 3 else "en", pictures)
            self.append(dict(zip(self.column_names, row, strict=True)))

    def __getitem__(self, place: Any) -> Any:
        return [row[place] for row in self] if isinstance(place, str) else super().__getitem__(place)


class Policy(fakes.LinearPolicy):
    """Dies after as many batches as the environment says, and can be brighter."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift, self.batches = shift, 0

    def encode(self, examples):
        if self.batches == int(os.environ.get("BENCH_DIES_AFTER", "-1")):
            os.kill(os.getpid(), 9)
        self.batches += 1
        return super().encode(examples)

    def decode(self, latents, conditioning):
        return (super().decode(latents, conditioning) + self.shift).clamp(0, 1)


class Paste(Policy):
    """Draws the reference."""

    def decode(self, latents, conditioning):
        return conditioning["colour"].mT.unsqueeze(-1).expand(-1, 3, 2, 2)


def alike(images: Tensor, examples: Sequence[Example]) -> Tensor:
    """1 - the mean distance of the mean colours of an image and its references."""
    own = images.mean((2, 3))
    scores = []
    for row, example in zip(own, examples, strict=True):
        references = torch.stack([to_tensor(image).mean((1, 2)) for image in example.references])
        scores.append(1 - (references - row).abs().mean())
    return torch.stack(scores)


def bright(images: Tensor, examples: Sequence[Example], device: str = "cpu") -> Tensor:
    assert all(example.prompt for example in examples)
    return images.mean((1, 2, 3))


METRICS = {"dino": {"use": "studies.bench.tiny:alike"}, "clip_i": None, "clip_t": {"use": "studies.bench.tiny:bright"}}
