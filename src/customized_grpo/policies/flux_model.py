"""FLUX.1 with references appended to the picture's tokens. Families differ in the references' sizes and positions."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from customized_grpo.policies.encodings import Row
from customized_grpo.policies.pipeline import PipelinePolicy, quiet
from customized_grpo.policies.tokens import grid_positions, pack, unpack
from customized_grpo.structures import Conditioning, Example


class FluxPolicy(PipelinePolicy):
    """A pipeline with FLUX.1's transformer, VAE and text encoders."""

    TEXT_ENCODERS: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    GUIDED_BY = "guidance_scale"

    @property
    def text_limit(self) -> int:
        return min(self.max_text_tokens, self.pipeline.tokenizer_2.model_max_length)

    @abstractmethod
    def positions(self, picture: tuple[int, int], references: list[tuple[int, int]]) -> list[Tensor]:
        """Per reference (rows * columns, 3) for the rotary embedding, from the grids of the picture and of all."""

    def _encode_text(self, prompt: str, example: Example) -> Row:
        tokenizer = self.pipeline.tokenizer_2
        with quiet("transformers.tokenization_utils_base"), quiet(type(self.pipeline).__module__):
            self._count_truncated(len(tokenizer(prompt).input_ids), prompt)
            text, pooled, _ = self.pipeline.encode_prompt(
                prompt=prompt, device=self.device, max_sequence_length=self.text_limit
            )
        return {"text": text[0], "pooled": pooled[0]}

    def _encode_references(self, example: Example) -> Row:
        vae, sizes = self.pipeline.vae, self.reference_sizes(example)
        tokens = []
        for pixels in self._reference_pixels(example):
            latents = vae.encode(pixels).latent_dist.mode()
            tokens.append(pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)[0])
        grid = self.grid(self.picture_size(example))
        ids = [grid_positions(*grid), *self.positions(grid, [self.grid(size) for size in sizes])]
        return {"reference": torch.cat(tokens).float(), "ids": torch.cat(ids)}

    def _predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        text = conditioning["text"]
        return self.module(
            hidden_states=torch.cat([latents, conditioning["reference"]], dim=1).to(self._input_dtype),
            encoder_hidden_states=text,
            pooled_projections=conditioning["pooled"],
            timestep=sigma,
            guidance=self._embedded_guidance(sigma),
            img_ids=conditioning["ids"][0],
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device),
            return_dict=False,
        )[0][:, : latents.shape[1]]

    def _decode(self, latents: Tensor, rows: int, columns: int) -> Tensor:
        vae = self.pipeline.vae
        return vae.decode(unpack(latents, rows, columns) / vae.config.scaling_factor + vae.config.shift_factor).sample
