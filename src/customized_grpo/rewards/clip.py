"""Rewards on a CLIP model: prompt following (CLIP-T, PickScore, HPSv2.1) and identity (CLIP-I)."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from customized_grpo.data.images import CLIP_MEAN, CLIP_STD, Preprocess, pooled, segmented
from customized_grpo.rewards.contract import (
    Reduce,
    check_reduce,
    frozen,
    in_batches,
    load,
    once_per_example,
    reference_similarity,
)
from customized_grpo.rewards.open_clip import clean_prompt, is_checkpoint, read_clip
from customized_grpo.settings import AtLeastOne
from customized_grpo.sources import Location
from customized_grpo.structures import Example

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Whose tokenizer and image processor PickScore and HPSv2.1 were trained with."""


class _ClipEmbedder:
    """Images and prompts to embeddings of length 1."""

    def __init__(
        self, model: Any, preprocess: Preprocess, tokenizer: Any, device: str | int | None, batch_size: int,
        clean: Callable[[str], str] = str,
    ) -> None:  # fmt: skip
        self.model, self.preprocess, self.tokenizer, self.batch_size = model, preprocess, tokenizer, batch_size
        self.clean = clean
        self.max_length = model.config.text_config.max_position_embeddings
        frozen(model, device)

    def images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, D)."""
        return in_batches(lambda rows: self._pixels(self.preprocess(self._here(rows))), images, self.batch_size)

    def pictures(self, pictures: list[Image]) -> Tensor:
        """R pictures of any size to (R, D)."""
        pixels = torch.cat([self.preprocess.pil(picture) for picture in pictures])
        return in_batches(lambda rows: self._pixels(self._here(rows)), pixels, self.batch_size)

    def prompts(self, examples: Sequence[Example]) -> Tensor:
        """U examples to (U, D)."""
        prompts = [self.clean(example.prompt) for example in examples]
        cut = sum(len(ids) > self.max_length for ids in self.tokenizer(prompts, verbose=False).input_ids)
        if cut:
            warnings.warn(f"{cut} prompts are longer than the {self.max_length} tokens CLIP reads.", stacklevel=2)
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return normalize(pooled(features), dim=-1)

    def _here(self, rows: Tensor) -> Tensor:
        return rows.to(self.model.device)

    def _pixels(self, pixels: Tensor) -> Tensor:
        return normalize(pooled(self.model.get_image_features(pixels)), dim=-1)


def _load_model(at: str, **pinned: Any) -> Any:
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(at, dtype=torch.float32, **pinned)


def _load_tokenizer(at: str, **pinned: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(at, trust_remote_code=False, **pinned)


def _embedder(
    path: str | Path, processor: str | Path | None, revision: str | None, device: str | int | None, batch_size: int
) -> _ClipEmbedder:
    model = load("a CLIPModel", path, _load_model, revision)
    beside, its_revision = (path, revision) if processor is None else (processor, None)
    preprocess = load("an image processor", beside, Preprocess.from_pretrained, its_revision)
    tokenizer = load("a CLIP tokenizer", beside, _load_tokenizer, its_revision)
    return _ClipEmbedder(model, preprocess, tokenizer, device, batch_size)


class ClipReward:
    """Cosine of the CLIP embeddings of image and prompt, in [-1, 1]; real photos score about 0.2 to 0.35 (CLIP-T).

    Args:
        path: a `CLIPModel` folder or hub id with its processor; `toyworld:clip` is the packaged one,
            `openai/clip-vit-base-patch32` the benchmark's.
        processor: where the tokenizer and the image processor are, if not at `path`.
        revision: commit, tag or branch of `path` on the hub; None is the pinned commit of a default, else the newest.
        device: where it runs; None is the fastest device there is.
        batch_size: images embedded at once.
    """

    name = "prompt"
    RUNTIME = ("device", "batch_size")
    LOCATIONS: ClassVar[Mapping[str, Location]] = {"path": Location("revision", "config.json"), "processor": Location()}

    def __init__(
        self,
        path: str | Path = "openai/clip-vit-large-patch14",
        *,
        processor: str | Path | None = None,
        revision: str | None = None,
        device: str | int | None = None,
        batch_size: AtLeastOne = 64,
    ) -> None:
        self.clip = _embedder(path, processor, revision, device, batch_size)

    @property
    def model(self) -> torch.nn.Module:
        return self.clip.model

    @torch.no_grad()
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Shape (B,). Source: Radford et al. 2021; CLIP-T of DreamBooth, Ruiz et al. 2023, sec. 4.2."""
        return (self.clip.images(images) * once_per_example(examples, self.clip.prompts)).sum(-1)


class PickScoreReward(ClipReward):
    """PickScore: what people preferred for a prompt, as cosine times CLIP's logit scale (about 100), roughly 15 to 25.

    Args:
        path: PickScore_v1 in the transformers layout.
        processor: where the tokenizer and the image processor are; the released weights come without.
        revision: commit, tag or branch of `path` on the hub; None is the pinned commit of a default, else the newest.
        device: where it runs; None is the fastest device there is.
        batch_size: images embedded at once.
    """

    def __init__(
        self,
        path: str | Path = "yuvalkirstain/PickScore_v1",
        *,
        processor: str | Path | None = CLIP_H,
        revision: str | None = None,
        device: str | int | None = None,
        batch_size: AtLeastOne = 64,
    ) -> None:
        super().__init__(path, processor=processor, revision=revision, device=device, batch_size=batch_size)

    @torch.no_grad()
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Shape (B,), logits. Source: Kirstain et al. 2023, sec. 3."""
        return self.clip.model.logit_scale.exp() * super().__call__(images, examples)


class Hpsv2Reward(ClipReward):
    """Human Preference Score v2.1: a fine-tuned CLIP-H, cosine in [-1, 1], generated pictures about 0.2 to 0.35.

    Images are resized by their longer side and padded with black, as in the released scorer.

    Args:
        path: the released checkpoint in open_clip's layout (`HPS_v2.1_compressed.pt`, or the same as .safetensors), a
            `CLIPModel` folder in the transformers layout, or the hub id of a repository that holds the former.
        processor: where the tokenizer is.
        revision: commit, tag or branch of `path` on the hub; None is the pinned commit of a default, else the newest.
        device: where it runs; None is the fastest device there is.
        batch_size: images embedded at once.
    """

    CHECKPOINT = "HPS_v2.1_compressed.pt"
    LOCATIONS: ClassVar[Mapping[str, Location]] = {
        "path": Location("revision", "config.json", files=True), "processor": Location(),
    }  # fmt: skip

    def __init__(
        self,
        path: str | Path = "xswu/HPSv2",
        *,
        processor: str | Path = CLIP_H,
        revision: str | None = None,
        device: str | int | None = None,
        batch_size: AtLeastOne = 64,
    ) -> None:
        model = load("an HPSv2 checkpoint", path, self._read, revision)
        size = model.config.vision_config.image_size
        preprocess = Preprocess(crop=(size, size), mean=CLIP_MEAN, std=CLIP_STD, fit="contain")
        tokenizer = load("a CLIP tokenizer", processor, _load_tokenizer)
        self.clip = _ClipEmbedder(model, preprocess, tokenizer, device, batch_size, clean_prompt)

    def _read(self, at: str, **pinned: Any) -> Any:
        if Path(at).is_dir():
            return _load_model(at)
        if not Path(at).is_file():
            from huggingface_hub import hf_hub_download

            at = hf_hub_download(at, self.CHECKPOINT, **pinned)
        return read_clip(at) if is_checkpoint(at) else _load_model(at)


class ClipImageReward:
    """CLIP-I: cosine of the CLIP embeddings of an image and the subject's references, in [-1, 1].

    Two photos of one object score about 0.85 to 0.9. It forgives more than DINO does: a dog of another breed is still
    a dog.

    Args:
        path: a `CLIPModel` folder or hub id with its processor; `toyworld:clip` is the packaged one.
        segment: paint everything outside a reference's mask white before it is embedded, where there is a mask.
        reduce: over several references: the mean of the cosines, or the best.
        processor: where the tokenizer and the image processor are, if not at `path`.
        revision: commit, tag or branch of `path` on the hub; None is the pinned commit of a default, else the newest.
        device: where it runs; None is the fastest device there is.
        batch_size: images embedded at once.
    """

    name = "identity"
    RUNTIME = ("device", "batch_size")
    LOCATIONS: ClassVar[Mapping[str, Location]] = ClipReward.LOCATIONS

    def __init__(
        self,
        path: str | Path = "openai/clip-vit-base-patch32",
        *,
        segment: bool = True,
        reduce: Reduce = "mean",
        processor: str | Path | None = None,
        revision: str | None = None,
        device: str | int | None = None,
        batch_size: AtLeastOne = 64,
    ) -> None:
        self.segment = segment
        self.reduce: Reduce = check_reduce(reduce)
        self.clip = _embedder(path, processor, revision, device, batch_size)

    @property
    def model(self) -> torch.nn.Module:
        return self.clip.model

    @torch.no_grad()
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Shape (B,). Source: CLIP-I of DreamBooth, Ruiz et al. 2023, sec. 4.2."""
        pictures = segmented if self.segment else lambda example: list(example.references)
        return reference_similarity(self.clip.images(images), examples, self.clip.pictures, pictures, self.reduce)
