"""What to make of the similarity of images: formulas on embeddings and on their cosines. Pure.

Notation: D dimensions of an embedding, n references. Cosines are in [-1, 1], angles in radians.
"""

import itertools
from typing import Any, cast

import torch
from torch import Tensor


def target_identity(cosines: Tensor, *, centre: float = 0.65) -> Tensor:
    """mean_i sigmoid(k (cos_i - centre)), k = 10 + 3 (n - 2): a soft share of the subjects that are there. (...).

    Args:
        cosines: shape (..., n), of the image with the target of each reference.
        centre: the cosine that counts half.

    Source: DyRef (arXiv 2606.26947).
    """
    steepness = 10 + 3 * (cosines.shape[-1] - 2)
    return torch.sigmoid(steepness * (cosines - centre)).mean(dim=-1)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle between vectors, (..., D) and (..., D) to (...): radians, in [0, pi].

    2 atan(|a - b| / |a + b|) of unit vectors, which unlike the arc cosine keeps its digits at small angles.
    """
    a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (a, b))
    apart, along = ((x**2).sum(dim=-1).sqrt() for x in (a - b, a + b))
    return 2 * torch.atan2(apart, along)


def copying(image: Tensor, target: Tensor, reference: Tensor) -> Tensor:
    """(angle(image, target) - angle(image, reference)) / angle(target, reference): (...), in [-1, 1].

    1 is a copy of the reference and -1 the target, another image of the same subject; 0 is as close to both, and where
    target and reference are the same. Identity alone does not tell a copy from a new image of the subject.

    Args:
        image, target, reference: embeddings, shape (..., D).

    Source: WithAnyone (arXiv 2510.14975), the copy-paste metric of MultiID-Bench.
    """
    apart = angle(target, reference)
    measure = (angle(image, target) - angle(image, reference)) / apart.clamp(min=1e-6)
    return measure.clamp(-1, 1)


def matching_reward(cosines: Tensor) -> Tensor:
    """Multi-identity matching reward: mean_ij l_ij cos_ij, l = 1 for the pairs of the best assignment, else -1. Scalar.

    Every subject should be there once and resemble no other. The assignment pairs min(M, N) of them, each once, such
    that the sum of their cosines is the largest; no gradient goes through it.

    Args:
        cosines: shape (M, N), of M subjects found in the image with N references. 0 if either is none.

    Source: UMO (arXiv 2509.06818), reward_models/MIMR/multi_id_matching_reward.py.
    """
    if cosines.ndim != 2:
        raise ValueError(f"expected cosines of shape (M, N), got {tuple(cosines.shape)}.")
    if not cosines.numel():
        return cosines.new_zeros(())
    signs = torch.full_like(cosines, -1)
    for i, j in best_assignment(cosines):
        signs[i, j] = 1
    return (signs * cosines).mean()


def best_assignment(values: Tensor) -> list[tuple[int, int]]:
    """(row, column) of min(M, N) pairs with the largest sum, each row and column at most once; from (M, N)."""
    import networkx

    nx = cast(Any, networkx)  # it has no types
    graph, (num_rows, num_columns) = nx.Graph(), values.shape
    for i, j in itertools.product(range(num_rows), range(num_columns)):
        graph.add_edge(i, num_rows + j, weight=float(values[i, j].detach()))
    pairs = nx.max_weight_matching(graph, maxcardinality=True)
    return sorted((min(pair), max(pair) - num_rows) for pair in pairs)
