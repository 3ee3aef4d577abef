"""Prompt following by CLIP: cosine of image and text."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from customized_grpo.rewards.contract import once_per_example
from customized_grpo.images import Preprocess, pooled
from customized_grpo.sources import explain, locate
from customized_grpo.types import Example


class ClipReward:
    """Cosine of the CLIP embeddings of image and prompt, in [-1, 1]; real photos score about 0.2 to 0.35 (CLIP-T).

    Args:
        path: a `CLIPModel` folder or hub id with its processor; `toyworld:clip` is the packaged one.
        device: where it runs; None is the fastest device there is.
    """

    name = "prompt"

    def __init__(self, path: str | Path = "openai/clip-vit-large-patch14", device: str | None = None) -> None:
        from transformers import AutoTokenizer, CLIPModel

        source = locate(path)
        try:
            self.model = CLIPModel.from_pretrained(source).eval().requires_grad_(False)
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise explain(path, "a CLIPModel with its tokenizer", error) from error
        self.preprocess = Preprocess.from_pretrained(source)
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # pyright: ignore[reportArgumentType]
        self.max_length = self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Shape (B,). Source: Radford et al. 2021; CLIP-T of DreamBooth, Ruiz et al. 2023, sec. 4.2."""
        image = normalize(pooled(self.model.get_image_features(self.preprocess(images.to(self.model.device)))), dim=-1)
        text = once_per_example(examples, self._embed_prompts)
        return (image * text).sum(-1)

    def _embed_prompts(self, examples: Sequence[Example]) -> Tensor:
        tokens = self.tokenizer(
            [example.prompt for example in examples],
            padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return normalize(pooled(features), dim=-1)
