"""FLUX.1-Kontext: a reference's latents are appended to the image's, with their own position plane."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.images import to_tensor
from customized_grpo.functional.schedule import shifted_sigmas
from customized_grpo.policies import lora as _lora
from customized_grpo.policies.contract import Policy
from customized_grpo.policies.lora import LoraSettings, Trainable
from customized_grpo.sources import explain, locate
from customized_grpo.types import Conditioning, Example


class FluxKontextPolicy(Policy):
    """A diffusers `FluxKontextPipeline` as a policy. One reference per example.

    Args:
        pipeline: with all its components loaded.
        trainable: "lora" or "full".
        lora: the adapter, for trainable = "lora".
        dtype: of the forward pass; frozen weights are stored in it, trained ones in float32.
        resolution: pictures have about resolution^2 pixels; None is the VAE's own sample size.
        guidance_scale: the embedded guidance of a distilled model; the same in training and inference.
        shift: of the sigma schedule; None is the pipeline's own, resolution-dependent.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        device: None is the fastest device there is.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        trainable: Trainable = "lora",
        lora: LoraSettings | None = None,
        dtype: str | torch.dtype = torch.float32,
        resolution: int | None = None,
        guidance_scale: float = 3.5,
        shift: float | None = None,
        gradient_checkpointing: bool = False,
        device: str | torch.device | None = None,
        seed: int = 0,
    ) -> None:
        self.pipeline, self.trainable = pipeline, trainable
        self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.guidance_scale, self.shift = guidance_scale, shift
        self.resolution = resolution or pipeline.vae.config.sample_size
        self.pixels_per_token = pipeline.vae_scale_factor * 2
        if self.resolution % self.pixels_per_token:
            raise UserError(
                f"policy.resolution is {self.resolution}; it must be a multiple of {self.pixels_per_token} pixels."
            )
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer):
            part.eval().requires_grad_(False).to(self.device)
            wanted = torch.float32 if part is pipeline.vae else self.dtype
            if part.dtype != wanted:
                part.to(wanted)
        self.transformer: Any = pipeline.transformer
        lora_settings = lora or LoraSettings()
        _lora.make_trainable(self.transformer, trainable, lora_settings, seed)
        self.module = self.transformer
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()

    @classmethod
    def from_pretrained(cls, path: str | Path = "toyworld:pipeline", **settings: Any) -> "FluxKontextPolicy":
        """Load the pipeline from a folder or hub id in the diffusers layout. `settings` as in the class."""
        from diffusers import FluxKontextPipeline

        if isinstance(settings.get("lora"), Mapping):
            settings["lora"] = LoraSettings(**settings["lora"])
        dtype = settings.get("dtype", torch.float32)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        try:
            pipeline = FluxKontextPipeline.from_pretrained(
                locate(path), dtype={"default": dtype, "vae": torch.float32}
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise explain(path, "a FluxKontextPipeline", error) from error
        return cls(pipeline, **settings)

    # ---- what it sees

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> Conditioning:
        for example in examples:
            if len(example.references) != 1:
                raise UserError(
                    f"Example '{example.id}' has {len(example.references)} references; FLUX.1-Kontext takes exactly "
                    f"one. Give it one, or use a policy that takes several."
                )
        with self._autocast():
            text, pooled, _ = self.pipeline.encode_prompt(
                prompt=[e.prompt for e in examples], device=self.device, max_sequence_length=self._max_text_tokens
            )
            width, height = self._reference_size(examples[0])
            pixels = torch.cat([self._reference_pixels(e, width, height) for e in examples]).to(self.device)
        vae = self.pipeline.vae
        latents = (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        side = self.resolution // self.pixels_per_token
        ids = torch.cat([_grid_ids(side, side, 0), _grid_ids(*(s // 2 for s in latents.shape[-2:]), 1)])
        return {
            "text": text,
            "pooled": pooled,
            "reference": _pack(latents.float()),
            "ids": ids.to(self.device).expand(len(examples), -1, -1),
        }

    @property
    def _max_text_tokens(self) -> int:
        return min(512, self.pipeline.tokenizer_2.model_max_length)

    def _reference_size(self, example: Example) -> tuple[int, int]:
        """(width, height) with the reference's aspect ratio and about resolution^2 pixels."""
        width, height = example.references[0].size
        aspect = width / height
        unit = self.pixels_per_token

        def snap(pixels: float) -> int:
            return max(unit, round(pixels / unit) * unit)

        return snap(self.resolution * math.sqrt(aspect)), snap(self.resolution / math.sqrt(aspect))

    def _reference_pixels(self, example: Example, width: int, height: int) -> Tensor:
        image = example.references[0].convert("RGB")
        if image.size == (width, height):
            return to_tensor(image).unsqueeze(0) * 2 - 1
        return self.pipeline.image_processor.preprocess(
            self.pipeline.image_processor.resize(image, height, width), height, width
        )

    def shape_key(self, example: Example) -> tuple[int, int]:
        return self._reference_size(example)

    # ---- the flow

    def latent_shape(self, conditioning: Conditioning) -> tuple[int, int]:
        return (self.resolution // self.pixels_per_token) ** 2, int(conditioning["reference"].shape[-1])

    def sigmas(self, num_inference_steps: int, conditioning: Conditioning) -> Tensor:
        shift = self.shift or math.exp(self._mu(self.latent_shape(conditioning)[0]))
        return shifted_sigmas(num_inference_steps, shift)

    def _mu(self, tokens: int) -> float:
        """The log of the pipeline's shift: linear in the number of image tokens."""
        config = self.pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return math.log(config.shift)
        low, high = config.base_image_seq_len, config.max_image_seq_len
        return config.base_shift + (tokens - low) * (config.max_shift - config.base_shift) / (high - low)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        tokens = torch.cat([latents, conditioning["reference"]], dim=1)
        text = conditioning["text"]
        guidance = torch.full_like(sigma, self.guidance_scale) if self.transformer.config.guidance_embeds else None
        with self._autocast():
            velocity = self.module(
                hidden_states=tokens.to(self._input_dtype),
                encoder_hidden_states=text,
                pooled_projections=conditioning["pooled"],
                timestep=sigma,
                guidance=guidance,
                img_ids=conditioning["ids"][0],
                txt_ids=torch.zeros(text.shape[1], 3, device=self.device),
                return_dict=False,
            )[0]
        return velocity[:, : latents.shape[1]].float()

    @property
    def _input_dtype(self) -> torch.dtype:
        return torch.float32 if self.trainable == "full" else self.dtype

    def _autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 runs under autocast, so that float32 trained weights meet bfloat16 activations."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    # ---- what comes out

    @torch.no_grad()
    def decode(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        vae, side = self.pipeline.vae, self.resolution // self.pixels_per_token
        unpacked = _unpack(latents, side, side) / vae.config.scaling_factor + vae.config.shift_factor
        with self._autocast():
            images = vae.decode(unpacked.to(vae.dtype)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    # ---- what trains

    def base(self) -> AbstractContextManager[None]:
        return _lora.adapter_off(self.transformer, self.trainable)

    def trainable_state(self) -> dict[str, Tensor]:
        return _lora.trainable_state(self.transformer)

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        _lora.load_trainable_state(self.transformer, state)

    def save(self, folder: Path) -> None:
        """LoRA: `pytorch_lora_weights.safetensors` for `pipeline.load_lora_weights(folder)`. Full: the transformer."""
        if self.trainable == "full":
            self.transformer.save_pretrained(folder / "transformer")
        else:
            _lora.save_adapter(self.pipeline, self.transformer, folder)


def _pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) to tokens of 2 x 2 latent pixels, (B, H/2 * W/2, 4 C). Source: the pipeline's `_pack_latents`."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def _unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `_pack`, for a grid of rows x columns tokens."""
    patches = tokens.view(len(tokens), rows, columns, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, rows * 2, columns * 2)


def _grid_ids(rows: int, columns: int, plane: int) -> Tensor:
    """Positions (rows * columns, 3) for the rotary embedding: (plane, row, column)."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.full_like(row, plane), row, column], dim=-1).reshape(-1, 3).float()
