"""Train and measure the oracle."""

import torch
import torch.nn.functional as F
from torch import Tensor

from customized_grpo.toyworld.oracle import Oracle
from customized_grpo.toyworld.world import ATTRIBUTES
from tools.pretrain import augment
from tools.pretrain.corpus import Corpus


def loss(
    oracle: Oracle, images: Tensor, labels: dict[str, Tensor], batch_size: int, generator: torch.Generator
) -> Tensor:
    """Sum of the cross-entropies of all visible attributes. images: (N, V, 3, S, S) uint8."""
    n = torch.randint(len(images), (batch_size,), generator=generator)
    v = torch.randint(images.shape[1], (batch_size,), generator=generator)
    pixels = images[n, v].float() / 255
    clean = batch_size // 3
    pixels[clean:] = augment.degrade(pixels[clean:], generator)
    logits = oracle(pixels.to(oracle.device))
    losses = [
        F.cross_entropy(logits[name], labels[name][n, v].to(oracle.device), ignore_index=-1)
        for name in ATTRIBUTES
        if (labels[name][n, v] >= 0).any()
    ]
    return torch.stack(losses).sum()


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
