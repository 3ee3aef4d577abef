"""Linear policies with a rate for each channel, and rewards that read one channel: everything about them is known."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import fakes
from customized_grpo.functional.schedule import shifted_sigmas
from customized_grpo.functional.sde import dance_sde
from customized_grpo.structures import Conditioning, Example
from customized_grpo.studies.probe import Probe, ProbeSettings

SCALE = 100.0
"""Latents per unit of image, so that nothing is clipped."""
STEPS = 5
ETA = 0.5


class DiagonalPolicy(fakes.LinearPolicy):
    """velocity = rate * latents - colour, channel by channel.

    A negative rate lets early noise grow towards the image, a positive one lets it fade.
    """

    def __init__(self, rates: Sequence[float] = (-2.0, 2.0)) -> None:
        super().__init__()
        with torch.no_grad():
            self.module.weight.copy_(torch.diag(torch.tensor([*rates, 0.5])))
        self.rows_seen = 0

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.rows_seen += len(latents)
        return super().velocity(latents, sigma, conditioning)

    def decode(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        return (latents.detach() / SCALE + 0.5).clamp(0, 1).mT.reshape(-1, 3, 2, 2)


POLICY = DiagonalPolicy


def early(images: Tensor, examples: Sequence[Example]) -> Tensor:
    """Reads channel 0."""
    return SCALE * images[:, 0].mean((1, 2))


def late(images: Tensor, examples: Sequence[Example]) -> Tensor:
    """Reads channel 1."""
    return SCALE * images[:, 1].mean((1, 2))


def examples(count: int, subjects: int | None = None) -> list[Example]:
    """Each its own subject, or example i of subject i % subjects."""
    return [
        Example(
            f"e{i}", f"prompt {i}", (Image.new("RGB", (2, 2), (9 * i, 30, 99)),), subject=f"s{i % (subjects or count)}"
        )
        for i in range(count)
    ]


def probe(
    rates: tuple[float, float] = (-2.0, 2.0), *, rewards: dict[str, Any] | None = None, noise_level: float = ETA,
    subjects: int | None = 2, **settings: Any,
) -> Probe:  # fmt: skip
    chosen = ProbeSettings(**{"examples": 4, "branches": 6, **settings})
    return Probe(
        DiagonalPolicy(rates),
        rewards or {"prompt": early, "identity": late},
        examples(chosen.examples, subjects),
        chosen,
        partial(dance_sde, noise_level=noise_level),
        STEPS,
    )


def variances(rates: tuple[float, float], steps: int) -> Tensor:
    """(steps, 2): of the mean of four tokens, by the noise of each step but the last, and of all of these together."""
    sigmas = shifted_sigmas(steps, 1.5, dtype=torch.float64)
    found = torch.zeros(steps, 2, dtype=torch.float64)
    for k, rate in enumerate(rates):
        for step in range(steps - 1):
            alone, together = 1.0, 1.0
            for after in range(step + 1, steps):
                sigma, dt = sigmas[after], sigmas[after + 1] - sigmas[after]
                ode = 1 + rate * dt
                drift = ETA**2 / (2 * sigma) * dt * (1 + (1 - sigma) * rate)
                alone, together = alone * ode, together * (ode if after == steps - 1 else ode + drift)
            std = ETA * (sigmas[step] - sigmas[step + 1]).sqrt()
            found[step, k] = (std * alone) ** 2 / 4
            found[-1, k] += (std * together) ** 2 / 4
    return found


def shares(rates: tuple[float, float]) -> Tensor:
    alone = variances(rates, STEPS)[:-1]
    return alone / alone.sum(0)


def centres(rates: tuple[float, float]) -> Tensor:
    return torch.einsum("sk,s->k", shares(rates), torch.arange(STEPS - 1, dtype=torch.float64) / STEPS)


class Data(list[Example]):
    """A dataset that a configuration can name."""

    def __init__(self, count: int = 6) -> None:
        super().__init__(examples(count))
