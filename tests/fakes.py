"""A policy and rewards small enough to reason about, for tests of the loop around them."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from customized_grpo.functional.schedule import shifted_sigmas
from customized_grpo.policies.contract import Policy
from customized_grpo.structures import Conditioning, Example

TOKENS, CHANNELS = 4, 3


class LinearPolicy(Policy):
    """velocity = latents W + condition; four latent tokens of three channels are the four pixels of the picture."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.module = nn.Linear(CHANNELS, CHANNELS)
        with torch.no_grad():
            self.module.weight.copy_(torch.eye(CHANNELS) * 0.5)
            self.module.bias.zero_()
        self.before = {n: t.clone() for n, t in self.trainable_state().items()}
        self.device, self.dtype = torch.device("cpu"), dtype
        self.encoded = 0

    def encode(self, examples: Sequence[Example]) -> Conditioning:
        self.encoded += len(examples)
        colours = [[c / 255 for c in example.references[0].getpixel((0, 0))] for example in examples]
        return {"colour": torch.tensor(colours).unsqueeze(1)}

    def latent_shape(self, conditioning: Conditioning) -> tuple[int, int]:
        return TOKENS, CHANNELS

    def sigmas(self, num_inference_steps: int, conditioning: Conditioning) -> Tensor:
        return shifted_sigmas(num_inference_steps, 1.5)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self.module(latents) - conditioning["colour"]

    def decode(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        return (latents.detach() / 2 + 0.5).clamp(0, 1).mT.reshape(-1, 3, 2, 2)

    @contextmanager
    def base(self):
        own = {n: t.clone() for n, t in self.trainable_state().items()}
        self.load_trainable_state(self.before)
        yield
        self.load_trainable_state(own)

    def trainable_state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.trainable_state().items():
                tensor.copy_(state[name])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        save_file(self.trainable_state(), folder / "weights.safetensors")


def red(images: Tensor, examples: Sequence[Example]) -> Tensor:
    return images[:, 0].mean((1, 2))


def dark(images: Tensor, examples: Sequence[Example]) -> Tensor:
    """Competes with `red`."""
    return 1 - images.mean((1, 2, 3))


def raising(error: Exception):
    """A function that raises it, whatever it is called with."""

    def fail(*args, **kwargs):
        raise error

    return fail


def constant(images: Tensor, examples: Sequence[Example]) -> Tensor:
    return torch.full((len(images),), 0.7)


def examples(count: int = 6) -> list[Example]:
    return [
        Example(f"e{i}", f"prompt {i}", (Image.new("RGB", (2, 2), (40 * i, 30, 200 - 20 * i)),), subject=f"s{i % 3}")
        for i in range(count)
    ]
