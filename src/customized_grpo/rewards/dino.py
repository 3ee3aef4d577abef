"""Identity by DINO: is it still my subject?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from customized_grpo.errors import UserError
from customized_grpo.rewards.contract import once_per_example
from customized_grpo.images import Preprocess, segmented
from customized_grpo.sources import explain, locate
from customized_grpo.types import Example


class DinoReward:
    """Cosine of the CLS embeddings of an image and the subject's references, in [-1, 1].

    Args:
        path: a DINO, DINOv2 or DINOv3 folder or hub id with its image processor; `toyworld:dino` is the packaged one.
        segment: paint everything outside a reference's mask white before it is embedded, where there is a mask.
        reduce: over several references: the mean of the cosines, or the best.
        device: where it runs; None is the fastest device there is.
    """

    name = "identity"

    def __init__(
        self,
        path: str | Path = "facebook/dinov2-base",
        *,
        segment: bool = True,
        reduce: Literal["mean", "max"] = "mean",
        device: str | None = None,
    ) -> None:
        from transformers import AutoModel

        if reduce not in ("mean", "max"):
            raise UserError(f"DinoReward: reduce is '{reduce}'; it must be 'mean' or 'max'.")
        source = locate(path)
        try:
            self.model = AutoModel.from_pretrained(source).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise explain(path, "a DINO model", error) from error
        self.preprocess = Preprocess.from_pretrained(source)
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.segment, self.reduce = segment, reduce

    @torch.no_grad()
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Shape (B,). Source: DINO score of DreamBooth, Ruiz et al. 2023, sec. 4.2."""
        embedded = self._embed(self.preprocess(images.to(self.model.device)))
        references = once_per_example(examples, self._embed_references)
        cosines = torch.einsum("bd,brd->br", embedded, references)
        return cosines.nanmean(-1) if self.reduce == "mean" else cosines.nan_to_num(-2.0).amax(-1)

    def _embed(self, pixels: Tensor) -> Tensor:
        return normalize(self.model(pixel_values=pixels).last_hidden_state[:, 0].float(), dim=-1)

    def _embed_references(self, examples: Sequence[Example]) -> Tensor:
        """(U, R, D), R the largest number of references; NaN where an example has fewer."""
        pictures = [segmented(example) if self.segment else list(example.references) for example in examples]
        embedded = self._embed(torch.cat([self.preprocess.pil(image) for group in pictures for image in group]))
        groups = embedded.split([len(group) for group in pictures])
        most = max(len(group) for group in groups)
        return torch.stack([
            torch.cat([group, group.new_full((most - len(group), group.shape[1]), torch.nan)]) for group in groups
        ])  # fmt: skip
