"""Identity by DINO: is it still my subject?"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from customized_grpo.data.images import Preprocess, grey, segmented, to_pil, to_tensor
from customized_grpo.errors import UserError
from customized_grpo.functional.similarity import matching_reward, target_identity
from customized_grpo.rewards.contract import (
    Reduce,
    check_reduce,
    frozen,
    groups,
    in_batches,
    load,
    once_per_example,
    reference_similarity,
)
from customized_grpo.settings import AtLeastOne
from customized_grpo.sources import Location
from customized_grpo.structures import Example

NO_CODE = {"trust_remote_code": False}
FAMILIES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext")
"""Model types of config.json whose first token is the CLS token (DINO v1 is a plain `ViTModel`)."""


class DinoReward:
    """Cosine of the CLS embeddings of an image and the subject's references, in [-1, 1].

    Two photos of one object score about 0.7 to 0.8 (0.77 on DreamBench with DINO ViT-S/16), two objects of one class
    about 0.4; what is reached depends on the model, so numbers of different models do not compare.

    Args:
        path: a DINO, DINOv2 or DINOv3 folder or hub id with its image processor; `toyworld:dino` is the packaged one,
            `facebook/dino-vits16` the benchmark's.
        segment: paint everything outside a reference's mask white before it is embedded, where there is a mask.
        segmenter: paint everything outside the subject of the image white too, as this one finds it: `rembg`, or a
            folder or hub id of a segmentation model of transformers. An image without a subject is white.
        detector: for several subjects. The score is the `matching_reward` of what this one finds in the image with the
            references, in [-1, 1]: every subject should be there once and resemble no other, and 0 stands for an image
            in which nothing is found. A folder or hub id of an object detection model of transformers, or a function
            from an image to the crops of the subjects in it.
        grey: compare brightness alone, for prompts that change the colour of the subject.
        target_centre: compare with the example's target in place of its references: the score is the `target_identity`
            of the cosine, in [0, 1], and this the cosine that counts half, 0.65 in DyRef. The target shows the subject
            as the prompt wants it, so nothing is gained by refusing. NaN for an example without a target.
        reduce: over several references: the mean of the cosines, or the best.
        revision: commit, tag or branch of a hub id; None is the pinned commit of the default, and the newest of others.
        device: where it runs; None is the fastest device there is.
        batch_size: images embedded at once.
    """

    name = "identity"
    RUNTIME = ("device", "batch_size")
    LOCATIONS: ClassVar[Mapping[str, Location]] = {"path": Location("revision", "config.json")}

    def __init__(
        self,
        path: str | Path = "facebook/dinov2-base",
        *,
        segment: bool = True,
        segmenter: str | None = None,
        detector: str | Callable[[Image], Sequence[Image]] | None = None,
        grey: bool = False,
        target_centre: float | None = None,
        reduce: Reduce = "mean",
        revision: str | None = None,
        device: str | int | None = None,
        batch_size: AtLeastOne = 64,
    ) -> None:
        from transformers import AutoConfig, AutoModel

        from customized_grpo.data.segment import make_detector, make_segmenter

        if detector is not None and target_centre is not None:
            raise UserError("detector compares with the references and target_centre with the target; remove one.")
        self.segment, self.grey, self.target_centre, self.batch_size = segment, grey, target_centre, batch_size
        self.reduce: Reduce = check_reduce(reduce)
        self.find = None if segmenter is None else make_segmenter(segmenter)
        self.detect = make_detector(detector) if isinstance(detector, str) else detector
        kind = load("a DINO model", path, partial(AutoConfig.from_pretrained, **NO_CODE), revision).model_type
        if kind not in FAMILIES:
            raise UserError(f"'{path}' is a {kind} model; DinoReward takes one of {', '.join(FAMILIES)}.")
        read = partial(AutoModel.from_pretrained, dtype=torch.float32, **NO_CODE)
        self.model = load("a DINO model", path, read, revision)
        self.preprocess = load("an image processor", path, Preprocess.from_pretrained, revision)
        frozen(self.model, device)

    @torch.no_grad()
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Shape (B,). Source: DINO score of DreamBooth, Ruiz et al. 2023, sec. 4.2."""
        if self.find is not None:
            images = torch.stack([self._cut_out(image, self.find) for image in images])
        if self.target_centre is not None:
            return self._of_targets(images, examples, self.target_centre)
        pictures = segmented if self.segment else lambda example: list(example.references)
        if self.detect is not None:
            return self._matched(images, examples, self.detect, pictures)
        return reference_similarity(self.embed(images), examples, self.embed_pictures, pictures, self.reduce)

    def _of_targets(self, images: Tensor, examples: Sequence[Example], centre: float) -> Tensor:
        scores = torch.full((len(images),), torch.nan)
        rows = [row for row, example in enumerate(examples) if example.target is not None]
        if rows:
            known = [examples[row] for row in rows]
            targets = once_per_example(known, lambda some: self.embed_pictures([e.target for e in some if e.target]))
            cosines = (self.embed(images[rows]) * targets).sum(dim=-1).cpu()
            for row, cosine, example in zip(rows, cosines, known, strict=True):
                scores[row] = target_identity(cosine.expand(len(example.references)), centre=centre)
        return scores

    def _matched(
        self, images: Tensor, examples: Sequence[Example], detect: Callable[[Image], Sequence[Image]],
        pictures: Callable[[Example], list[Image]],
    ) -> Tensor:  # fmt: skip
        """Source: UMO (arXiv 2509.06818), there with detected faces."""
        scores, crops = torch.zeros(len(images)), [list(detect(to_pil(image))) for image in images.cpu()]
        if any(crops):
            found = self.embed_pictures([crop for some in crops for crop in some]).split([len(some) for some in crops])
            for rows in groups(examples):
                references = self.embed_pictures(pictures(examples[rows[0]]))
                for row in rows:
                    scores[row] = matching_reward(found[row] @ references.T)
        return scores

    def _cut_out(self, image: Tensor, find: Callable[[Image], Image]) -> Tensor:
        mask = to_tensor(find(to_pil(image)))[:1].to(image)
        return image * mask + (1 - mask)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, D), of length 1."""
        return in_batches(lambda rows: self._embed(self._pixels(self._here(rows))), images, self.batch_size)

    def embed_pictures(self, pictures: list[Image]) -> Tensor:
        """R pictures of any sizes to (R, D), of length 1."""
        pixels = torch.cat([self._pixels(to_tensor(picture).unsqueeze(0)) for picture in pictures])
        return in_batches(lambda rows: self._embed(self._here(rows)), pixels, self.batch_size)

    def _here(self, rows: Tensor) -> Tensor:
        return rows.to(self.model.device)

    def _pixels(self, images: Tensor) -> Tensor:
        return self.preprocess(grey(images) if self.grey else images)

    def _embed(self, pixels: Tensor) -> Tensor:
        return normalize(self.model(pixel_values=pixels).last_hidden_state[:, 0].float(), dim=-1)
