"""Pictures as encoders want them: resized, cropped and normalised on tensors, in one batch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from customized_grpo.sources import explain
from customized_grpo.types import Example


@dataclass(frozen=True)
class Preprocess:
    """An image processor's resize, centre crop and normalisation, batched."""

    shortest_edge: int | None
    """Resize so that the shorter side has this many pixels; None resizes to `crop` without keeping the aspect."""
    crop: tuple[int, int]
    """(height, width) that the encoder takes."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: str = "bicubic"

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "Preprocess":
        """Read what the encoder's own image processor does from its preprocessor_config.json."""
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            config, _ = ImageProcessingMixin.get_image_processor_dict(source)
        except (OSError, ValueError) as error:
            raise explain(source, "an image processor (preprocessor_config.json)", error) from error
        size, crop = config.get("size", 224), config.get("crop_size")
        edge = size if isinstance(size, int) else size.get("shortest_edge")
        if not config.get("do_center_crop", crop is not None) or crop is None:
            crop = edge if edge else size
        height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        return cls(
            shortest_edge=edge,
            crop=(int(height), int(width)),
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
            mode={0: "nearest", 2: "bilinear", 3: "bicubic"}.get(config.get("resample", 3), "bicubic"),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to what the encoder takes."""
        height, width = images.shape[-2:]
        if self.shortest_edge is None:
            size = self.crop
        else:
            scale = self.shortest_edge / min(height, width)
            size = (max(self.crop[0], round(height * scale)), max(self.crop[1], round(width * scale)))
        if size != (height, width):
            images = interpolate(images, size, mode=self.mode, antialias=True, align_corners=False).clamp(0, 1)
        top, left = (size[0] - self.crop[0]) // 2, (size[1] - self.crop[1]) // 2
        images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std

    def pil(self, image: Image.Image) -> Tensor:
        """One picture to (1, 3, h, w)."""
        return self(to_tensor(image).unsqueeze(0))


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W), float32 in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


def pooled(features: Any) -> Tensor:
    """The embedding itself, whether transformers wraps it in an output object (5.x) or not (4.x)."""
    return (features if isinstance(features, Tensor) else features.pooler_output).float()


def segmented(example: Example) -> list[Image.Image]:
    """The references with everything outside their masks painted white; unchanged where there is no mask."""
    masks = example.masks or (None,) * len(example.references)
    return [
        image if mask is None else Image.composite(image.convert("RGB"), Image.new("RGB", image.size, "white"), mask)
        for image, mask in zip(example.references, masks, strict=True)
    ]
