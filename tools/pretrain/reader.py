"""Train and measure the oracle."""

import random

import numpy as np
import torch
from torch import Tensor

from customized_grpo.toyworld import draw
from customized_grpo.toyworld.oracle import NEEDS, Oracle
from customized_grpo.toyworld.world import ATTRIBUTES, visible_attributes
from tools import labelled
from tools.pretrain import augment
from tools.pretrain.corpus import Corpus, label

UNCLEAR = -2
"""Label of a spoiled attribute, of which the oracle should not be sure. -1 is the label of what is not looked at."""
LEAST = 0.7
"""Probability below which a trained oracle does not read an attribute."""

Pictures = tuple[Tensor, dict[str, Tensor]]
"""(N, 3, S, S) uint8, and per attribute (N,) int64 labels."""


def faulty(count: int, seed: int, size: int) -> Pictures:
    """Pictures in which one part is erased, smudged, half drawn or mixed with another."""
    images, labels = np.empty((count, size, size, 3), dtype=np.uint8), torch.empty(count, len(ATTRIBUTES)).long()
    for n in range(count):
        images[n], shown = _faulty(random.Random(f"faulty {seed} {n}"), size)
        labels[n] = torch.tensor([shown[name] for name in ATTRIBUTES])
    return torch.from_numpy(images).movedim(-1, 1), dict(zip(ATTRIBUTES, labels.unbind(1), strict=True))


def _faulty(rng: random.Random, size: int) -> tuple[draw.Pixels, dict[str, int]]:
    attribute = rng.choice(tuple(ATTRIBUTES))
    fault = rng.choice(("replaced", "mixed") if attribute == "colour" else ("erased", "smudged", "replaced", "mixed"))
    subject, scene = labelled.sample(rng, attribute)
    seed = rng.getrandbits(32)
    full = draw.render(subject, scene, seed, size)
    pixels = labelled.spoil(rng, attribute, subject, scene, seed, full, fault)
    if fault == "erased" and attribute in labelled.WITHOUT:
        subject, scene = labelled.changed(subject, scene, labelled.WITHOUT[attribute])
        return pixels, {name: label(name, value) for name, value in visible_attributes(subject, scene).items()}
    labels = {name: label(name, value) for name, value in visible_attributes(subject, scene).items()}
    if attribute in ("noun", "colour"):  # all over the creature
        labels = {name: value if name == "background" else -1 for name, value in labels.items()}
    thing = NEEDS.get(attribute)
    if thing and fault != "mixed":
        labels[thing] = UNCLEAR
    of_it = {name: -1 for name, needed in NEEDS.items() if needed == attribute}
    return pixels, {**labels, **of_it, attribute: UNCLEAR}


def loss(oracle: Oracle, faithful: Pictures, faults: Pictures, batch_size: int, generator: torch.Generator) -> Tensor:
    """Sum of the cross-entropies of all visible attributes; a third of a batch has faults."""
    third = batch_size // 3
    images, labels = [], {name: [] for name in ATTRIBUTES}
    for (pictures, found), count in ((faithful, batch_size - third), (faults, third)):
        rows = torch.randint(len(pictures), (count,), generator=generator)
        images.append(pictures[rows])
        for name in ATTRIBUTES:
            labels[name].append(found[name][rows])
    pixels = torch.cat(images).float() / 255
    chosen = torch.arange(batch_size) % 3 > 0
    pixels[chosen] = augment.degrade(pixels[chosen], generator)
    logits = oracle(pixels.to(oracle.device))
    losses = [_cross_entropy(logits[name], torch.cat(labels[name]).to(oracle.device)) for name in ATTRIBUTES]
    return torch.stack(losses).sum()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not -1; with the uniform distribution for what is unclear."""
    log = logits.log_softmax(-1)
    each = torch.where(labels == UNCLEAR, -log.mean(-1), -log.gather(-1, labels.clamp(min=0)[:, None])[:, 0])
    return each[labels != -1].sum() / (labels != -1).sum().clamp(min=1)


@torch.no_grad()
def measure(oracle: Oracle, corpus: Corpus) -> dict[str, float]:
    """Accuracy per attribute where it is visible, on a faithful corpus."""
    labels = {name: value.flatten() for name, value in corpus.labels().items()}
    read = [oracle.read(chunk / 255) for chunk in corpus.images.flatten(0, 1).split(250)]
    result = {}
    for name in ATTRIBUTES:
        predicted, seen = torch.cat([r[name] for r in read]).cpu(), labels[name] >= 0
        result[name] = (predicted == labels[name])[seen].float().mean().item()
    return result
