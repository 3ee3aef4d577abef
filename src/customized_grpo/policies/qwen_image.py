"""Qwen-Image-Edit-Plus: the text encoder sees the references too, and guidance keeps the length of the velocity."""

from collections.abc import Hashable, Sequence
from typing import ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from customized_grpo.policies import lora as _lora
from customized_grpo.policies.encodings import Row
from customized_grpo.policies.pipeline import PipelinePolicy
from customized_grpo.policies.tokens import Size, floor_to, pack, unpack
from customized_grpo.structures import Conditioning, Example

GRID = "grid "
"""Begins the names of empty tensors whose shapes are the grids of the picture and its references."""


class QwenImageEditPolicy(PipelinePolicy):
    """A diffusers `QwenImageEditPlusPipeline` as a policy. One to three references per example.

    References have about `reference_resolution`^2 pixels (None: 1024^2) in multiples of 32; the text encoder sees them
    smaller. Pictures with aspect = "reference" follow the last one, as in the pipeline. Classifier-free guidance is on
    (`true_cfg_scale`, None: 4). The encoder cuts no prompt, so `max_text_tokens` has no part here.
    """

    PIPELINE: ClassVar[str] = "QwenImageEditPlusPipeline"
    MAX_REFERENCES: ClassVar[int] = 3
    TARGETS: ClassVar[tuple[str, ...]] = (
        *_lora.ATTENTION, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    )  # fmt: skip

    def _default_cfg_scale(self) -> float:
        return 4.0

    # ---- what it sees

    def _aspect_of(self, example: Example) -> Image:
        return example.references[-1]

    def _fit(self, size: Size, side: int) -> Size:
        return floor_to(_dimensions(size, side**2), self.pixels_per_token)

    def reference_sizes(self, example: Example) -> list[Size]:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as pipeline

        area = self.reference_resolution**2 if self.reference_resolution else pipeline.VAE_IMAGE_SIZE
        return [_dimensions(image.size, area) for image in example.references]

    def _text_context(self, pictures: Hashable) -> Hashable:
        return pictures

    def _encode_text(self, prompt: str, example: Example) -> Row:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as pipeline

        seen = []
        for image in example.references:
            width, height = _dimensions(image.size, pipeline.CONDITION_IMAGE_SIZE)
            seen.append(self.pipeline.image_processor.resize(image.convert("RGB"), height, width))
        text, _ = self.pipeline.encode_prompt([prompt], image=seen, device=self.device)  # of one prompt, all is seen
        return {"text": text[0]}

    def _encode_references(self, example: Example) -> Row:
        mean, std = self._statistics()
        tokens, grids = [], [self.grid(self.picture_size(example))]
        for pixels, size in zip(self._reference_pixels(example), self.reference_sizes(example), strict=True):
            latents = self.pipeline.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
            tokens.append(pack((latents - mean) / std)[0])
            grids.append(self.grid(size))
        shapes = {f"{GRID}{n}": torch.empty(*grid, 0) for n, grid in enumerate(grids)}
        return {"reference": torch.cat(tokens).float(), **shapes}

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' channels, (1, C, 1, 1)."""
        config = self.pipeline.vae.config
        mean, std = (
            torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def _collate(self, rows: Sequence[Row]) -> Row:
        """Texts of different lengths are padded, and masked; a mask without columns hides nothing."""
        collated = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if name.removeprefix("negative_") != "text":
                collated[name] = torch.stack(values)
                continue
            collated[name] = pad_sequence(values, batch_first=True)
            masks = [torch.ones(len(value), dtype=torch.bool) for value in values]
            padded = len({len(value) for value in values}) > 1
            collated[f"{name}_mask"] = pad_sequence(masks, batch_first=True)[:, : None if padded else 0]
        return collated

    # ---- the flow

    def _predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        mask = conditioning["text_mask"]
        shapes = [(1, *grid.shape[1:3]) for name, grid in conditioning.items() if name.startswith(GRID)]
        return self.module(
            hidden_states=torch.cat([latents, conditioning["reference"]], dim=1).to(self._input_dtype),
            encoder_hidden_states=conditioning["text"],
            encoder_hidden_states_mask=mask if mask.shape[1] else None,
            timestep=sigma,
            img_shapes=[shapes] * len(latents),
            guidance=None,
            return_dict=False,
        )[0][:, : latents.shape[1]]

    def _guide(self, velocity: Tensor, negative: Tensor) -> Tensor:
        """Guidance changes the direction of each token's velocity and not its length. Source: the pipeline."""
        guided = super()._guide(velocity, negative)
        return guided * (velocity.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def _decode(self, latents: Tensor, rows: int, columns: int) -> Tensor:
        mean, std = self._statistics()
        frames = (unpack(latents, rows, columns) * std + mean).unsqueeze(2)
        return self.pipeline.vae.decode(frames).sample[:, :, 0]


def _dimensions(size: Size, area: int) -> Size:
    """About `area` pixels in the aspect of `size`, in multiples of 32. Source: the pipeline."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    width, height = calculate_dimensions(area, size[0] / size[1])
    return max(32, width), max(32, height)
