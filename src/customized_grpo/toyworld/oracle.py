"""The oracle: reads the attributes of a picture back, independently of the reward models.

It is a plain convolutional network trained on the attributes themselves; docs/toyworld.md has its measured accuracies.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from customized_grpo.structures import Example
from customized_grpo.toyworld import weights_path
from customized_grpo.toyworld.dataset import ToyExample
from customized_grpo.toyworld.draw import SIZE
from customized_grpo.toyworld.world import ATTRIBUTES, SUBJECT_ATTRIBUTES, visible_attributes

__all__ = ["FullyRight", "PromptShown", "SubjectKept"]
"""What a configuration can name as a metric."""

WEIGHTS_FILE = "model.safetensors"


class Oracle(nn.Module):
    """Eight convolutions with a stem at 64 x 64 pixels, because eyes and mouths are a few pixels wide.

    Args:
        size: width and height of the pictures it reads, a multiple of 64.
        least: the probability that a value needs to be read; below it the attribute is unclear.
    """

    def __init__(self, size: int = SIZE, least: float = 0.0) -> None:
        super().__init__()
        self.size, self.least = size, least
        plan = (
            (3, 16, size // SIZE),
            (16, 32, 2),
            (32, 32, 1),
            (32, 64, 2),
            (64, 64, 1),
            (64, 96, 2),
            (96, 96, 1),
            (96, 128, 2),
        )
        self.features = nn.Sequential(*(layer for step in plan for layer in _convolution(*step)), nn.Flatten())
        self.heads = nn.ModuleDict({name: nn.Linear(128 * 4 * 4, len(values)) for name, values in ATTRIBUTES.items()})

    @classmethod
    def load(cls, folder: str | Path | None = None) -> "Oracle":
        """The packaged oracle, or the one in `folder`, ready to read."""
        from safetensors import safe_open

        with safe_open(Path(folder or weights_path("oracle")) / WEIGHTS_FILE, "pt") as file:
            kept = file.metadata() or {}
            oracle = cls(int(kept.get("size", SIZE)), float(kept.get("least", 0)))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        oracle.load_state_dict(
            {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
        )
        return oracle.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits per attribute, (B, values), of images (B, 3, size, size) in [0, 1]."""
        features = self.features(images * 2 - 1)
        return {name: head(features).float() for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, Tensor]:
        """What the pictures show.

        Args:
            images: (B, 3, H, W) in [0, 1]; other sizes are resampled.

        Returns:
            Per name in `ATTRIBUTES` an (B,) int64 index into its values, -1 where it is unclear. A colour of nothing is
            a guess: look first whether there is an accessory, a companion or a pattern.
        """
        side = (self.size, self.size)
        if images.shape[-2:] != side:
            images = F.interpolate(images, side, mode="bilinear", antialias=True, align_corners=False)
        best = {name: logits.softmax(-1).max(-1) for name, logits in self(images.to(self.device).float()).items()}
        return {name: torch.where(found.values < self.least, -1, found.indices) for name, found in best.items()}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


NEEDS = {"accessory_colour": "accessory", "companion_colour": "companion", "pattern_colour": "pattern"}
"""A colour counts only on the right thing."""


def expected_of_subject(example: ToyExample) -> dict[str, str]:
    """What must be kept of the subject: not what the prompt changes or hides."""
    seen = visible_attributes(example.truth_subject, example.truth_scene)
    recoloured = ("colour", "pattern_colour") if example.truth_scene.recolour else ()
    return {name: value for name in SUBJECT_ATTRIBUTES if name not in recoloured and (value := seen[name]) is not None}


def expected_of_prompt(example: ToyExample) -> dict[str, str]:
    """What the prompt asks for beyond the subject: place, accessory, companion, their colours, recolouring."""
    scene = example.truth_scene
    asked = {
        "background": scene.background if scene.background != "plain" else None,
        "accessory": scene.accessory,
        "accessory_colour": scene.accessory_colour,
        "companion": scene.companion,
        "companion_colour": scene.companion_colour,
        "colour": scene.recolour,
    }
    return {name: value for name, value in asked.items() if value is not None}


def expected_of_all(example: ToyExample) -> dict[str, str]:
    """All that the prompt asks for, and all of the subject that the prompt leaves."""
    return {**expected_of_subject(example), **expected_of_prompt(example)}


def share_right(read: Mapping[str, Tensor], row: int, expected: Mapping[str, str]) -> float:
    """Share of the expected attributes that row `row` shows; NaN if nothing is expected."""
    right = shown_right(read, row, expected)
    return sum(right.values()) / len(right) if right else torch.nan


def shown_right(read: Mapping[str, Tensor], row: int, expected: Mapping[str, str]) -> dict[str, bool]:
    """Whether row `row` shows each expected attribute."""

    def shown(name: str) -> bool:
        return name not in expected or int(read[name][row]) == ATTRIBUTES[name].index(expected[name])

    return {name: shown(name) and shown(NEEDS.get(name, name)) for name in expected}


class _Judge:
    """A reward that asks the oracle; NaN for examples whose truth is not known."""

    expected: Callable[[ToyExample], dict[str, str]]

    def __init__(self, oracle: Oracle | None = None) -> None:
        self.oracle = oracle or Oracle.load()

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """(B,) float32 in [0, 1], on the images' device."""
        read = {name: value.cpu() for name, value in self.oracle.read(images).items()}
        scores = [
            share_right(read, row, type(self).expected(example)) if isinstance(example, ToyExample) else torch.nan
            for row, example in enumerate(examples)
        ]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)


class SubjectKept(_Judge):
    """Share of the subject's attributes that are still there."""

    name = "oracle_subject"
    expected = staticmethod(expected_of_subject)


class PromptShown(_Judge):
    """Share of what the prompt asks for that is there."""

    name = "oracle_prompt"
    expected = staticmethod(expected_of_prompt)


class FullyRight(_Judge):
    """1 if all that the prompt asks is shown and all of the subject that the prompt leaves is kept, else 0."""

    name = "oracle_right"
    expected = staticmethod(expected_of_all)

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """(B,) float32, 0 or 1, on the images' device; NaN for examples whose truth is not known."""
        share = super().__call__(images, examples)
        return torch.where(share.isnan(), share, (share == 1).to(share))

    def marks(self, images: Tensor, examples: Sequence[Example]) -> list[dict[str, bool]]:
        """Per image what the prompt asks for, and the subject, each with whether it is right; for the sample grids."""
        read = {name: value.cpu() for name, value in self.oracle.read(images).items()}
        return [_marks(read, row, e) if isinstance(e, ToyExample) else {} for row, e in enumerate(examples)]


def _marks(read: Mapping[str, Tensor], row: int, example: ToyExample) -> dict[str, bool]:
    expected = expected_of_prompt(example)
    right = shown_right(read, row, expected)
    things = {"accessory_colour": expected.get("accessory"), "companion_colour": expected.get("companion"),
              "colour": example.subject}  # fmt: skip
    found = {f"{value} {things[name]}" if things.get(name) else value: right[name] for name, value in expected.items()}
    lost = [name for name, kept in shown_right(read, row, expected_of_subject(example)).items() if not kept]
    changed = ", ".join(name.replace("_", " ") for name in lost)
    return {**found, f"subject's {changed}" if lost else "subject kept": not lost}
