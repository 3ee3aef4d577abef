"""What is measured and never trained on: rewards by contract, `(images (B, 3, H, W), examples) -> (B,)`.

Name them under `metrics:` of any run, such as `{use: customized_grpo.rewards.copying:BackgroundCopied}`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL.Image import Image, Resampling
from torch import Tensor

from customized_grpo.data.images import resized, to_pil, to_tensor
from customized_grpo.data.masks import subject_mask
from customized_grpo.functional.similarity import copying
from customized_grpo.rewards.contract import groups, once_per_example
from customized_grpo.structures import Example

__all__ = ["BackgroundCopied", "Diversity", "PoseCopied", "ReferenceCopied"]
"""What a configuration can name as a metric."""


class BackgroundCopied:
    """Copy-paste: share of the region around the subject that is the reference's, pixel for pixel. Lower is better.

    The region is what lies outside the reference's mask. A pixel is copied if it is no further from the reference's
    than `tolerance` (a difference of grey levels in [0, 1], root mean square over colours). With several references
    the most copied one counts. NaN without a mask, and for a prompt that leaves the place as it is: there is nothing
    wrong with a plain wall that stays plain.
    """

    name = "background_copied"

    def __init__(self, tolerance: float = 0.1) -> None:
        self.tolerance = tolerance

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        def share(image: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
            around = 1 - F.max_pool2d(mask[None], 5, 1, 2)[0]  # two pixels away from the subject's soft edge
            same = (image - reference).square().mean(0, keepdim=True).sqrt() <= self.tolerance
            return (same * around).sum() / around.sum() if around.any() else torch.tensor(torch.nan)

        return _most_alike(images, examples, share, lambda example: not _place_stays(example))


class PoseCopied:
    """Copy-paste: correlation of the outlines inside the subject's frame with those of the reference. Lower is better.

    1 is the reference's pose to the pixel, 0 no relation. What is correlated is the size of the brightness gradient in
    the bounding box of the reference's mask, so that colour and light do not matter. NaN without a mask.
    """

    name = "pose_copied"

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        def correlation(image: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
            rows, columns = (mask[0].amax(dim=d) > 0.5 for d in (1, 0))
            if not rows.any():
                return torch.tensor(torch.nan)
            frame = (slice(*_ends(rows)), slice(*_ends(columns)))
            a, b = (_outlines(picture)[frame].flatten() for picture in (image, reference))
            return F.cosine_similarity(a - a.mean(), b - b.mean(), dim=0)

        return _most_alike(images, examples, correlation, lambda example: True)


class ReferenceCopied:
    """Copy-paste: whether an image is nearer to the reference (1) or to the target (-1), by DINO. Lower is better.

    `functional.similarity.copying` of the embeddings, of the nearest of several references. NaN without a target.

    Args:
        path: the encoder, as in `DinoReward`.

    Source: WithAnyone (arXiv 2510.14975).
    """

    name = "reference_copied"

    def __init__(self, path: str = "facebook/dino-vits16") -> None:
        from customized_grpo.rewards.dino import DinoReward

        self.encoder = DinoReward(path, segment=False)

    @torch.no_grad()
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        scores, embedded = torch.full((len(images),), torch.nan), self.encoder.embed(images).unsqueeze(1)
        for rows in groups(examples):
            example = examples[rows[0]]
            if example.target is not None:
                target, *references = self.encoder.embed_pictures([example.target, *example.references])
                scores[rows] = copying(embedded[rows], target, torch.stack(references)).amax(dim=1).cpu()
        return scores


class Diversity:
    """How far the images of one task lie apart: the mean distance from an image to the others of its task.

    The distance is the root mean square difference of pixels in [0, 1], or with an encoder 1 - the cosine of the
    embeddings. Images of one task are the rows of a batch with the same example: generations of a group in training,
    replicates in evaluation. NaN for an image without another.

    Args:
        path: the encoder, as in `DinoReward`; None compares pixels.
    """

    name = "diversity"

    def __init__(self, path: str | None = None) -> None:
        self.encoder = None
        if path is not None:
            from customized_grpo.rewards.dino import DinoReward

            self.encoder = DinoReward(path, segment=False)

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        tasks: dict[str, list[int]] = {}
        for row, example in enumerate(examples):
            tasks.setdefault(example.id, []).append(row)
        total, count = torch.zeros(len(images)), torch.zeros(len(images))
        for step in range(1, max(map(len, tasks.values()))):
            pairs = [(rows[i], rows[(i + step) % len(rows)]) for rows in tasks.values() for i in range(len(rows))]
            mine, other = (list(column) for column in zip(*((a, b) for a, b in pairs if a != b), strict=True))
            total[mine] += self._distance(images[mine], images[other]).cpu()
            count[mine] += 1
        return (total / count).to(images.device)

    def _distance(self, images: Tensor, others: Tensor) -> Tensor:
        if self.encoder is None:
            return (images - others).float().square().flatten(1).mean(1).sqrt()
        return 1 - self.encoder(images, [Example("", "", (to_pil(other),)) for other in others])


Compare = Callable[[Tensor, Tensor, Tensor], Tensor]


def _most_alike(
    images: Tensor, examples: Sequence[Example], compare: Compare, applies: Callable[[Example], bool]
) -> Tensor:
    """(B,) the largest `compare(image, reference, mask)` over the references that have a mask; NaN without one."""
    size = images.shape[-2:]

    def prepared(distinct: list[Example]) -> Tensor:  # (U, R, 4, H, W): colours and mask
        groups = []
        for example in distinct:
            masks = example.masks or (None,) * len(example.references)
            groups.append(torch.stack([_layers(r, m, size) for r, m in zip(example.references, masks, strict=True)]))
        return torch.nn.utils.rnn.pad_sequence(groups, batch_first=True, padding_value=torch.nan)

    layers = once_per_example(examples, prepared).to(images.device)
    scores = torch.full((len(images),), torch.nan, device=images.device)
    for row, (image, example) in enumerate(zip(images.float(), examples, strict=True)):
        known = [layer for layer in layers[row] if bool(layer[3].isfinite().all())]
        if known and applies(example):
            scores[row] = torch.stack([compare(image, layer[:3], layer[3:]).to(image) for layer in known]).amax()
    return scores


def _layers(reference: Image, mask: Image | None, size: torch.Size) -> Tensor:
    """(4, H, W): the reference's colours and mask at the image's size; a mask of NaN where there is none."""
    wide = (size[1], size[0])
    colours = resized(reference, *size)
    if mask is None:
        return torch.cat([colours, torch.full((1, *size), torch.nan)])
    return torch.cat([colours, to_tensor(subject_mask(mask).resize(wide, Resampling.BILINEAR))[:1]])


def _place_stays(example: Example) -> bool:
    """Whether the prompt asks for no place; known in the toy world only."""
    scene = getattr(example, "truth_scene", None)
    return scene is not None and scene.background == "plain"


def _outlines(picture: Tensor) -> Tensor:
    """(3, H, W) to the size of the brightness gradient, (H, W)."""
    grey = picture.mean(0)
    down, right = torch.gradient(grey)
    return (down.square() + right.square()).sqrt()


def _ends(flags: Tensor) -> tuple[int, int]:
    """First and one past the last True."""
    where = flags.nonzero()
    return int(where[0]), int(where[-1]) + 1
