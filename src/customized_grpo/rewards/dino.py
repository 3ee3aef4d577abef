"""Identity by DINO: is it still my subject?"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from customized_grpo.data.images import Preprocess, segmented
from customized_grpo.errors import UserError
from customized_grpo.rewards.contract import Reduce, check_reduce, frozen, in_batches, load, reference_similarity
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
        reduce: Reduce = "mean",
        revision: str | None = None,
        device: str | int | None = None,
        batch_size: AtLeastOne = 64,
    ) -> None:
        from transformers import AutoConfig, AutoModel

        self.segment, self.batch_size = segment, batch_size
        self.reduce: Reduce = check_reduce(reduce)
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
        embedded = in_batches(lambda rows: self._embed(self.preprocess(self._here(rows))), images, self.batch_size)
        pictures = segmented if self.segment else lambda example: list(example.references)
        return reference_similarity(embedded, examples, self._embed_pictures, pictures, self.reduce)

    def _here(self, rows: Tensor) -> Tensor:
        return rows.to(self.model.device)

    def _embed(self, pixels: Tensor) -> Tensor:
        return normalize(self.model(pixel_values=pixels).last_hidden_state[:, 0].float(), dim=-1)

    def _embed_pictures(self, pictures: list[Image]) -> Tensor:
        pixels = torch.cat([self.preprocess.pil(picture) for picture in pictures])
        return in_batches(lambda rows: self._embed(self._here(rows)), pixels, self.batch_size)
