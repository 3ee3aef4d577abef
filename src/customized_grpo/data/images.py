"""Pictures as encoders want them: resized, cropped and normalised on tensors, in one batch."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from customized_grpo.data.masks import subject_mask
from customized_grpo.errors import UserError
from customized_grpo.sources import explain
from customized_grpo.structures import Example

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocess:
    """An image processor's resize, centre crop and normalisation, batched and on the encoder's device.

    It computes in float where the processors round to 8 bits after resizing: on photos the two differ by one or two
    grey levels, a hundredth of the normalised range.
    """

    crop: tuple[int, int]
    """(height, width) that the encoder takes."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    shortest_edge: int | None = None
    """Pixels of the shorter side after resizing, for fit "cover"."""
    fit: Literal["cover", "stretch", "contain"] = "cover"
    """cover: resize the shorter side, then crop the middle. stretch: resize to `crop`, whatever the aspect.
    contain: resize the longer side to `crop` and pad with black."""
    mode: str = "bicubic"

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str = "main") -> "Preprocess":
        """Read what the encoder's own image processor does from its preprocessor_config.json.

        Raises:
            UserError: if there is none, or it asks for something that is not done here.
        """
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            config, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
        except (OSError, ValueError) as error:
            raise explain(source, "an image processor (preprocessor_config.json)", error) from error
        size = config.get("size", 224)
        crops = config.get("do_center_crop", "crop_size" in config)
        if isinstance(size, int):  # files of old: the shorter side where a crop follows (CLIP), a square else (ViT)
            size = {"shortest_edge": size} if crops else {"height": size, "width": size}
        edge = size.get("shortest_edge")
        resample = config.get("resample", 3)
        if resample not in _RESAMPLE or not (edge or {"height", "width"} <= size.keys()):
            raise UserError(
                f"The image processor of '{source}' resizes to {size} with filter {resample}; known are shortest_edge "
                f"or height and width, with nearest (0), bilinear (2) or bicubic (3)."
            )
        crop = config.get("crop_size") if crops and edge else None
        crop = crop or ({"height": edge, "width": edge} if edge else size)
        height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        normalizes = config.get("do_normalize", True)
        return cls(
            crop=(int(height), int(width)),
            mean=tuple(config["image_mean"]) if normalizes else (0.0, 0.0, 0.0),
            std=tuple(config["image_std"]) if normalizes else (1.0, 1.0, 1.0),
            shortest_edge=edge,
            fit="cover" if edge else "stretch",
            mode=_RESAMPLE[resample],
        )

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to what the encoder takes."""
        images = self._middle(images) if self.fit == "cover" else images
        size = self._resized(*images.shape[-2:])
        if size != images.shape[-2:]:
            smooth = {} if self.mode == "nearest" else {"antialias": True, "align_corners": False}
            images = interpolate(images.float(), size, mode=self.mode, **smooth).clamp(0, 1)
        down, right = self.crop[0] - size[0], self.crop[1] - size[1]
        if down > 0 or right > 0:
            images = pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
        top, left = max(0, -down) // 2, max(0, -right) // 2
        images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std

    def _middle(self, images: Tensor) -> Tensor:
        """Without the ends of very long images, which would be resized only to be cropped away."""
        height, width = images.shape[-2:]
        short = min(height, width)
        kept = 32 * short * max(1, -(-max(self.crop) // (self.shortest_edge or min(self.crop))))
        top, left = (max(0, side - kept) // 2 for side in (height, width))
        return images[..., top : height - top, left : width - left]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.fit == "stretch":
            return self.crop
        if self.fit == "contain":
            scale = min(self.crop) / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        edge = self.shortest_edge or min(self.crop)
        return (edge, edge * width // height) if height <= width else (edge * height // width, edge)

    def pil(self, image: Image.Image) -> Tensor:
        """One picture to (1, 3, h, w)."""
        return self(to_tensor(image).unsqueeze(0))


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W), float32 in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


def resized(image: Image.Image, height: int, width: int) -> Tensor:
    """An image of any mode and size as a tensor (3, height, width), in [0, 1]."""
    return to_tensor(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))


def grey(images: Tensor) -> Tensor:
    """Brightness in place of colours (ITU-R BT.601), (..., 3, H, W) to the same shape."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(3, 1, 1)
    return (images * weights).sum(dim=-3, keepdim=True).expand_as(images)


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to a picture, rounded to 8 bits; what is out of range is clipped."""
    pixels = image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file: lossless, and the same bytes for the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def pooled(features: Any) -> Tensor:
    """The embedding itself, whether transformers wraps it in an output object (5.x) or not (4.x)."""
    return (features if isinstance(features, Tensor) else features.pooler_output).float()


def segmented(example: Example) -> list[Image.Image]:
    """The references with everything outside their masks painted white; unchanged where there is no mask."""
    masks = example.masks or (None,) * len(example.references)
    return [
        image
        if mask is None
        else Image.composite(image.convert("RGB"), Image.new("RGB", image.size, "white"), subject_mask(mask))
        for image, mask in zip(example.references, masks, strict=True)
    ]
