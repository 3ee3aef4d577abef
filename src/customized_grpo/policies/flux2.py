"""FLUX.2: references follow the picture, each in its own plane of time. Families differ in their text encoders."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.policies import lora as _lora
from customized_grpo.policies.encodings import Row
from customized_grpo.policies.pipeline import PipelinePolicy
from customized_grpo.policies.tokens import Size, floor_to
from customized_grpo.structures import Conditioning, Example


class Flux2Policy(PipelinePolicy):
    """A pipeline with FLUX.2's transformer and VAE. One to four references per example.

    A reference keeps its size up to `reference_resolution`^2 pixels (None: 1024^2), cropped at the centre to whole
    tokens.
    """

    MAX_REFERENCES: ClassVar[int] = 4
    TARGETS: ClassVar[tuple[str, ...]] = (
        *_lora.ATTENTION, "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out",
        "attn.to_qkv_mlp_proj", "attn.to_out",
    )  # fmt: skip

    @property
    def step_distilled(self) -> bool:
        return bool(self.pipeline.config.get("is_distilled"))

    @property
    def _distilled(self) -> bool:
        """Whether it was distilled, to few steps or with guidance, and runs without classifier-free guidance."""
        return self.step_distilled or self.pipeline.transformer.config.guidance_embeds

    def _default_cfg_scale(self) -> float:
        return 1.0 if self._distilled else 4.0

    def _check_settings(self, guidance_scale: float | None, section: str = "policy") -> None:
        super()._check_settings(guidance_scale, section)
        if self.true_cfg_scale > 1 and self._distilled:
            raise UserError(
                f"{section}.true_cfg_scale is {self.true_cfg_scale:g}, but this FLUX.2 is distilled and runs without "
                f"classifier-free guidance; leave it out or use a base model."
            )

    # ---- what it sees

    def reference_sizes(self, example: Example) -> list[Size]:
        return [floor_to(self._within(image.size), self.pixels_per_token) for image in example.references]

    def _within(self, size: Size) -> Size:
        """No more than the largest area, the aspect kept. Source: the pipeline's `_resize_to_target_area`."""
        area = (self.reference_resolution or 1024) ** 2
        scale = min(1.0, (area / (size[0] * size[1])) ** 0.5)
        return int(size[0] * scale), int(size[1] * scale)

    def _reference_pixels(self, example: Example) -> list[Tensor]:
        processor, pixels = self.pipeline.image_processor, []
        for image, (width, height) in zip(example.references, self.reference_sizes(example), strict=True):
            image = image.convert("RGB")
            if self._within(image.size) != image.size:
                image = processor._resize_to_target_area(image, (self.reference_resolution or 1024) ** 2)
            pixels.append(processor.preprocess(image, height=height, width=width, resize_mode="crop").to(self.device))
        return pixels

    def _encode_text(self, prompt: str, example: Example) -> Row:
        self._count_truncated(self._length(prompt), prompt)
        text, _ = self.pipeline.encode_prompt(prompt, device=self.device, max_sequence_length=self.text_limit)
        return {"text": text[0]}

    @abstractmethod
    def _length(self, prompt: str) -> int:
        """Tokens of a prompt, with all that the pipeline adds to it."""

    def _encode_references(self, example: Example) -> Row:
        mean, std = self._statistics()
        tokens, ids = [], [_positions(*self.grid(self.picture_size(example)), time=0)]
        for n, pixels in enumerate(self._reference_pixels(example)):
            latents = self.pipeline._patchify_latents(self.pipeline.vae.encode(pixels).latent_dist.mode())
            tokens.append(((latents - mean) / std)[0].flatten(1).mT)
            ids.append(_positions(*latents.shape[-2:], time=10 * (n + 1)))
        return {"reference": torch.cat(tokens).float(), "ids": torch.cat(ids)}

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' channels, (1, C, 1, 1)."""
        vae = self.pipeline.vae
        mean, variance = (x.view(1, -1, 1, 1).float() for x in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()

    # ---- the flow

    def _mu(self, tokens: int, num_inference_steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(tokens, num_inference_steps)

    def _predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        tokens = torch.cat([latents, conditioning["reference"]], dim=1)
        return self._pass(tokens, conditioning["ids"], sigma, conditioning["text"])[:, : latents.shape[1]]

    def _pass(self, tokens: Tensor, ids: Tensor, sigma: Tensor, text: Tensor, **more: Any) -> Tensor:
        text_ids = torch.zeros(text.shape[1], 4, device=text.device)
        text_ids[:, 3] = torch.arange(text.shape[1])
        return self.module(
            hidden_states=tokens.to(self._input_dtype),
            encoder_hidden_states=text,
            timestep=sigma,
            guidance=self._embedded_guidance(sigma),
            img_ids=ids,
            txt_ids=text_ids.expand(len(tokens), -1, -1),
            return_dict=False,
            **more,
        )[0]

    def _decode(self, latents: Tensor, rows: int, columns: int) -> Tensor:
        mean, std = self._statistics()
        patches = latents.mT.unflatten(2, (rows, columns)) * std + mean
        return self.pipeline.vae.decode(self.pipeline._unpatchify_latents(patches)).sample


class Flux2KleinPolicy(Flux2Policy):
    """A diffusers `Flux2KleinPipeline` as a policy, of 4B or 9B.

    The base model runs with classifier-free guidance (`true_cfg_scale`, None: 4, against the empty prompt unless
    `negative_prompt` says otherwise); the distilled one without.
    """

    PIPELINE: ClassVar[str] = "Flux2KleinPipeline"

    def _length(self, prompt: str) -> int:
        messages, tokenizer = [{"role": "user", "content": prompt}], self.pipeline.tokenizer
        chat = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return len(tokenizer(chat).input_ids)


class Flux2KleinKVPolicy(Flux2KleinPolicy):
    """A diffusers `Flux2KleinKVPipeline` as a policy: distilled, and references attend to themselves alone.

    So their keys and values are the same in every step, and the pipeline computes them in the first step only. Here
    each step computes them, because the gradient reaches through them.
    """

    PIPELINE: ClassVar[str] = "Flux2KleinKVPipeline"
    GUIDED_BY = None

    @property
    def step_distilled(self) -> bool:
        return True

    def _predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        reference = conditioning["reference"]
        tokens, ids = torch.cat([reference, latents], dim=1), conditioning["ids"].roll(-latents.shape[1], dims=1)
        text, count = conditioning["text"], reference.shape[1]
        return self._pass(tokens, ids, sigma, text, kv_cache_mode="extract", num_ref_tokens=count)


class Flux2DevPolicy(Flux2Policy):
    """A diffusers `Flux2Pipeline` as a policy: guidance is embedded (`guidance_scale`, None: 4)."""

    PIPELINE: ClassVar[str] = "Flux2Pipeline"
    GUIDANCE: ClassVar[float] = 4.0
    GUIDED_BY = "guidance_scale"

    def _length(self, prompt: str) -> int:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        chat = format_input([prompt], self.pipeline.system_message)
        return len(self.pipeline.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0])


def _positions(rows: int, columns: int, *, time: int) -> Tensor:
    """Positions (rows * columns, 4): (time, row, column, 0)."""
    axes = (torch.tensor([time]), torch.arange(rows), torch.arange(columns), torch.zeros(1, dtype=torch.long))
    return torch.cartesian_prod(*axes).float()
