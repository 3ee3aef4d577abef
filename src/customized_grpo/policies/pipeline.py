"""What the families share: a diffusers pipeline whose transformer trains, and whose encodings are kept."""

import logging
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from PIL.Image import Image
from pydantic import ValidationError
from torch import Tensor

from customized_grpo.data.images import to_tensor
from customized_grpo.errors import UserError, nearest
from customized_grpo.functional.schedule import shifted_sigmas
from customized_grpo.libraries import quiet_loading
from customized_grpo.policies import lora as _lora
from customized_grpo.policies.contract import Policy, weights_replaced
from customized_grpo.policies.encodings import EncodingCache, Row, digest, identity
from customized_grpo.policies.lora import Trainable
from customized_grpo.policies.mixed_precision import MixedPrecision, checkpoint
from customized_grpo.policies.quantization import Quantize, check_quantize, quantization
from customized_grpo.policies.settings import LoraSettings
from customized_grpo.policies.tokens import Size, fit_area
from customized_grpo.settings import sentence
from customized_grpo.sources import Location, check_weights, explain, locate, pin
from customized_grpo.store import read_json
from customized_grpo.structures import Conditioning, Example

if TYPE_CHECKING:
    from typing_extensions import Self

PIXELS_PER_DECODE = 2**21
"""Pictures are decoded in batches of at most so many pixels (eight of 512 x 512), for memory."""


class PipelinePolicy(Policy):
    """A policy around a diffusers pipeline. A family says how it encodes, and how its transformer is called.

    Args:
        pipeline: with all its components loaded.
        trainable: "lora" or "full".
        lora: the adapter, for trainable = "lora".
        dtype: of the forward pass: float32, bfloat16, or auto for bfloat16 where the hardware computes in it. Frozen
            weights are stored in it, trained ones in float32.
        resolution: pictures have about resolution^2 pixels; None is the model's own.
        width, height: of the pictures, instead of `resolution`; both or neither.
        aspect: with `resolution`, whether pictures are square or have the aspect of their reference.
        reference_resolution: the size of references, as the family counts it; None is the family's own.
        shift: of the sigma schedule; None is the pipeline's own, resolution-dependent.
        guidance_scale: the embedded guidance of a distilled model.
        true_cfg_scale: of classifier-free guidance, which runs the transformer twice; 1 is none. The log-prob is that
            of the guided velocity, in sampling and in training. None is the family's own.
        negative_prompt: for classifier-free guidance.
        max_text_tokens: a longer prompt is cut, counted in `truncated_prompts`, and warned about once.
        gradient_checkpointing: recompute activations in the backward pass, for memory; a pipeline that comes with it on
            keeps it on.
        offload: "cpu" keeps text encoders and VAE off the device except while they work; "swap" also moves the
            transformer off it while text encoders work, which then need not fit beside it.
        attention: diffusers' name of what computes attention, in sampling and in training; native is PyTorch's choice.
        compile: compile the transformer's blocks with this backend of torch.compile; the result changes by rounding.
        cache_mib: memory of the host for encoded prompts and references; the least recently used make room.
        encodings: folder that keeps them for other processes and runs of the same encoders and settings.
        device: None is this process's own GPU, or the CPU where there is none.
        seed: of the adapter's initial weights.
    """

    PIPELINE: ClassVar[str]
    """The name of the pipeline's class in diffusers."""
    TEXT_ENCODERS: ClassVar[tuple[str, ...]] = ("text_encoder",)
    TARGETS: ClassVar[tuple[str, ...]] = _lora.ATTENTION + _lora.FEED_FORWARD
    MAX_REFERENCES: ClassVar[int] = 1
    GUIDANCE: ClassVar[float] = 3.5
    """The embedded guidance, where `guidance_scale` is None."""
    GUIDED_BY: ClassVar[Literal["guidance_scale", "true_cfg_scale"] | None] = "true_cfg_scale"
    """The setting of its guidance, unless the model's own configuration says otherwise; None if it takes none."""
    RUNTIME: ClassVar[tuple[str, ...]] = (
        "gradient_checkpointing",
        "offload",
        "compile",
        "cache_mib",
        "encodings",
        "device",
    )
    """Arguments that do not change the result, so that a resumed run may change them."""
    LOCATIONS: ClassVar[Mapping[str, Location]] = {"path": Location("revision", "model_index.json")}

    def __init__(
        self,
        pipeline: Any,
        *,
        trainable: Trainable = "lora",
        lora: LoraSettings | None = None,
        dtype: str | torch.dtype = torch.float32,
        resolution: int | None = None,
        width: int | None = None,
        height: int | None = None,
        aspect: Literal["square", "reference"] = "square",
        reference_resolution: int | None = None,
        shift: float | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        negative_prompt: str = "",
        max_text_tokens: int = 512,
        gradient_checkpointing: bool = False,
        offload: Literal["none", "cpu", "swap"] = "none",
        attention: str = "native",
        compile: Literal["none", "inductor", "aot_eager"] = "none",
        cache_mib: float = 1024,
        encodings: str | Path | None = None,
        device: str | int | torch.device | None = None,
        seed: int = 0,
    ) -> None:
        check_choices(trainable=trainable, aspect=aspect, offload=offload, attention=attention, compile=compile)
        above_zero(shift=shift, reference_resolution=reference_resolution, max_text_tokens=max_text_tokens)
        check_size(resolution, width, height)
        self.pipeline: Any = pipeline
        self.trainable: Trainable = trainable
        self.dtype = as_dtype(dtype)
        self.device = default_device() if device is None else torch.device(device)
        self.shift, self.negative_prompt, self.max_text_tokens = shift, negative_prompt, max_text_tokens
        self.guidance_scale = self.GUIDANCE if guidance_scale is None else guidance_scale
        self.true_cfg_scale = self._default_cfg_scale() if true_cfg_scale is None else true_cfg_scale
        self.reference_resolution, self.aspect, self.offload = reference_resolution, aspect, offload
        self.truncated_prompts: set[str] = set()
        self._base: dict[str, Tensor] | None = None
        self.pixels_per_token = pipeline.vae_scale_factor * 2
        self._set_size(resolution, width, height)
        self._check_settings(guidance_scale)

        for name in (*self.TEXT_ENCODERS, "vae", "transformer"):
            part = getattr(pipeline, name)
            part.eval().requires_grad_(False)
            wanted = torch.float32 if name == "vae" else self.dtype
            if part.dtype != wanted:
                part.to(wanted)
            part.to("cpu" if offload != "none" and name != "transformer" else self.device)
        encoders = [getattr(pipeline, name) for name in (*self.TEXT_ENCODERS, "vae")]
        own = type(self).__name__, self.dtype, self.max_text_tokens
        folder = None if encodings is None else Path(encodings).expanduser() / identity(encoders, own)
        self._cache = EncodingCache(int(cache_mib * 2**20), folder)
        self.transformer: Any = pipeline.transformer
        _lora.make_trainable(self.transformer, trainable, LoraSettings() if lora is None else lora, seed, self.TARGETS)
        self.module = self.transformer
        if gradient_checkpointing or self.transformer.is_gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing(checkpoint)
        if attention != "native":
            use_attention(self.transformer, attention, self.device, self.dtype)
        if compile != "none":
            self.transformer.compile_repeated_blocks(backend=compile)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, revision: str | None = None, quantize: Quantize = "none", **settings: Any
    ) -> "Self":
        """Load the pipeline.

        Args:
            path: folder or hub id in the diffusers layout.
            revision: commit, tag or branch of a hub id; None is the newest.
            quantize: store the frozen transformer in eight bits ("int8", torchao) or four ("nf4", bitsandbytes).
            settings: as in the class.

        Raises:
            UserError: if there is no such pipeline, or it cannot be quantised.
        """
        cls.check_arguments(path, quantize=quantize, **settings)
        settings = read_settings(settings)
        dtype = settings.get("dtype", torch.float32)
        pipeline = cls.load_pipeline(path, dtype, revision=revision, quantize=quantize)
        return cls(pipeline, **settings)

    @classmethod
    def check_arguments(cls, path: str | Path, *, quantize: Quantize = "none", **settings: Any) -> None:
        """Look whether a policy could be made of these arguments, as far as can be seen before anything is loaded.

        Raises:
            UserError: if it could not.
        """
        check_quantize(quantize, settings.get("trainable", "lora"))
        read_settings(settings)
        as_dtype(settings.get("dtype", torch.float32))
        check_choices(**{name: settings[name] for name in CHOICES if name in settings})
        above_zero(**{name: settings.get(name) for name in ("shift", "reference_resolution", "max_text_tokens")})
        check_size(*(settings.get(name) for name in ("resolution", "width", "height")))
        folder = Path(locate(path))
        if (folder / "model_index.json").is_file():
            cls._check_index(path, read_json(folder / "model_index.json"))
            for name in (*cls.TEXT_ENCODERS, "vae", "transformer"):
                if name not in settings:
                    check_weights(folder / name)

    @classmethod
    def _check_index(cls, path: str | Path, index: Any) -> None:
        """Raise UserError for a pipeline of another class, or one with components of another library."""
        found = index.get("_class_name") if isinstance(index, Mapping) else None
        if found != cls.PIPELINE:
            raise UserError(
                f"'{path}' holds a {found}, and {cls.__name__} takes a {cls.PIPELINE}; "
                f"give the policy of that family or another path."
            )
        _check_components(path, index)

    @classmethod
    def load_pipeline(
        cls,
        path: str | Path,
        dtype: str | torch.dtype = torch.float32,
        *,
        revision: str | None = None,
        quantize: Quantize = "none",
        **components: Any,
    ) -> Any:
        """The family's pipeline, frozen weights in `dtype`, the VAE in float32; `components` replace those of the path.

        Raises:
            UserError: if there is none, or it is of another class.
        """
        import diffusers
        from safetensors import SafetensorError

        import customized_grpo.toyworld.autoencoder
        import customized_grpo.toyworld.transformer  # noqa: F401 - diffusers loads only classes that are imported

        source, dtypes = locate(path), {"default": as_dtype(dtype), "vae": torch.float32}
        pinned = pin(source, revision)
        components |= quantization(quantize, dtypes["default"])
        try:
            index: Any = diffusers.DiffusionPipeline.load_config(source, **pinned)
            cls._check_index(path, index)
            with quiet_loading("diffusers", "transformers"):
                kind = getattr(diffusers, cls.PIPELINE)
                return kind.from_pretrained(source, dtype=dtypes, **pinned, **components)
        except UserError:
            raise
        except (OSError, ValueError, TypeError, AttributeError, ImportError, SafetensorError) as error:
            raise explain(path, f"a {cls.PIPELINE}", error) from error

    @contextmanager
    def sampled_with(
        self,
        *,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        resolution: int | None = None,
    ) -> Iterator[None]:
        own = {name: getattr(self, name) for name in ("guidance_scale", "true_cfg_scale", "resolution", "size")}
        try:
            if resolution is not None:
                self._set_size(resolution, None, None, "evaluation")
            self.guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
            self.true_cfg_scale = self.true_cfg_scale if true_cfg_scale is None else true_cfg_scale
            self._check_settings(guidance_scale, "evaluation")
            yield
        finally:
            vars(self).update(own)

    def _check_settings(self, guidance_scale: float | None, section: str = "policy") -> None:
        """Raise UserError for settings, of a section of the configuration, that the model cannot take."""
        if guidance_scale is not None and not self.pipeline.transformer.config.get("guidance_embeds"):
            raise UserError(
                f"{section}.guidance_scale is {guidance_scale:g}, but this model has no embedded guidance; leave it "
                f"out, or use true_cfg_scale."
            )

    # ---- sizes

    def _set_size(self, resolution: int | None, width: int | None, height: int | None, section: str = "policy") -> None:
        if width is None and resolution is None:
            sample_size = self.pipeline.vae.config.get("sample_size")
            resolution = sample_size or self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        for name, side in (("resolution", resolution), ("width", width), ("height", height)):
            if side is not None and side % self.pixels_per_token:
                raise UserError(f"{section}.{name} is {side}; it must be a multiple of {self.pixels_per_token} pixels.")
        self.resolution = resolution or round(math.sqrt((width or 1) * (height or 1)))
        self.size: Size | None = (width, height) if width and height else None

    def picture_size(self, example: Example) -> Size:
        """(width, height) in pixels of what this policy draws for an example."""
        if self.size:
            return self.size
        if self.aspect == "square":
            return self.resolution, self.resolution
        return self._fit(self._aspect_of(example).size, self.resolution)

    def _aspect_of(self, example: Example) -> Image:
        """The reference that aspect = "reference" follows."""
        return example.references[0]

    def _fit(self, size: Size, side: int) -> Size:
        """The aspect of `size` with about side^2 pixels, as the family likes it."""
        return fit_area(size, side, self.pixels_per_token)

    @abstractmethod
    def reference_sizes(self, example: Example) -> list[Size]:
        """(width, height) in pixels at which the model sees the references."""

    def grid(self, size: Size) -> tuple[int, int]:
        """(rows, columns) of tokens of a picture of `size` pixels."""
        return size[1] // self.pixels_per_token, size[0] // self.pixels_per_token

    def shape_key(self, example: Example) -> Hashable:
        self._check_references(example)
        return self.picture_size(example), tuple(self.reference_sizes(example))

    # ---- what it sees

    def encode(self, examples: Sequence[Example]) -> Conditioning:
        rows = self._rows(examples)
        return {name: value.to(self.device) for name, value in self._collate(rows).items()}

    def encode_ahead(self, examples: Sequence[Example]) -> None:
        """With offload, fill the cache, so that the encoders move to the device and back once."""
        if self.offload != "none":
            self._rows(examples)

    @torch.no_grad()
    def _rows(self, examples: Sequence[Example]) -> list[Row]:
        for example in examples:
            self._check_references(example)
        keys = [self._keys(example) for example in examples]
        # One example at a time: a row then depends neither on its neighbours nor on what the cache held.
        with self._awake(*self.TEXT_ENCODERS, "vae") if self._any_missing(keys) else nullcontext(), self._autocast():
            return [self._row(example, *key) for example, key in zip(examples, keys, strict=True)]

    def _any_missing(self, keys: Sequence[tuple[Hashable, ...]]) -> bool:
        return any(key not in self._cache for group in keys for key in group if key is not None)

    def _row(self, example: Example, text_key: Hashable, negative_key: Hashable, picture_key: Hashable) -> Row:
        row = dict(self._cache.get(text_key, lambda: self._encode_text(example.prompt, example)))
        with torch.autocast(self.device.type, enabled=False):
            row |= self._cache.get(picture_key, lambda: self._encode_references(example))
        if negative_key is not None:
            negative = self._cache.get(negative_key, lambda: self._encode_text(self.negative_prompt, example))
            row |= {f"negative_{name}": value for name, value in negative.items()}
        width, height = self.picture_size(example)
        row["size"] = torch.empty(height, width, 0)
        return row

    def _keys(self, example: Example) -> tuple[Hashable, Hashable | None, Hashable]:
        """Of prompt, negative prompt and references in the cache: by content, so that what is shared is shared."""
        pictures = tuple(digest(image) for image in example.references)
        context = self._text_context(pictures)
        negative = ("text", self.negative_prompt, context) if self.true_cfg_scale > 1 else None
        return ("text", example.prompt, context), negative, ("pictures", pictures, self.shape_key(example))

    def _text_context(self, pictures: Hashable) -> Hashable:
        """What the encoding of a prompt depends on besides the prompt."""
        return None

    @abstractmethod
    def _encode_text(self, prompt: str, example: Example) -> Row:
        """The prompt as the transformer takes it; "text" (L, D) among it."""

    @abstractmethod
    def _encode_references(self, example: Example) -> Row:
        """References as the transformer takes them: "reference" (M, C) tokens, "ids" (N + M, axes) positions ..."""

    def _collate(self, rows: Sequence[Row]) -> Row:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _check_references(self, example: Example) -> None:
        count = len(example.references)
        if 1 <= count <= self.MAX_REFERENCES:
            return
        limit = "exactly one" if self.MAX_REFERENCES == 1 else f"one to {self.MAX_REFERENCES}"
        raise UserError(
            f"Example '{example.id}' has {count or 'no'} reference{'s' if count > 1 else ''}, and {self.name} takes "
            f"{limit}; change the example or use another policy."
        )

    def _reference_pixels(self, example: Example) -> list[Tensor]:
        """Per reference (1, 3, H, W) in [-1, 1] on the device, at its `reference_sizes`."""
        sizes = self.reference_sizes(example)
        return [self._pixels(image, size) for image, size in zip(example.references, sizes, strict=True)]

    def _pixels(self, image: Image, size: Size) -> Tensor:
        """(1, 3, H, W) in [-1, 1] on the device, resized as the pipeline does."""
        image = image.convert("RGB")
        if image.size == size:
            return to_tensor(image).unsqueeze(0).to(self.device) * 2 - 1
        processor, (width, height) = self.pipeline.image_processor, size
        return processor.preprocess(processor.resize(image, height, width), height, width).to(self.device)

    @property
    def text_limit(self) -> int:
        """Tokens of a prompt that are seen."""
        return self.max_text_tokens

    def _count_truncated(self, tokens: int, prompt: str) -> None:
        if tokens <= self.text_limit:
            return
        self.truncated_prompts.add(prompt)
        if self.truncated_prompts == {prompt}:
            warnings.warn(
                f"A prompt has {tokens} tokens and the encoder takes {self.text_limit}; the rest is cut. It begins "
                f"'{prompt[:60]}'. Further long prompts are counted only.",
                stacklevel=2,
            )

    @contextmanager
    def _awake(self, *names: str) -> Iterator[None]:
        """Inside it the named components are on the device; with offload they are there only inside."""
        if self.offload == "none":
            yield
            return
        parts = [getattr(self.pipeline, name) for name in names]
        resting = [self.transformer] if self.offload == "swap" and names != ("vae",) else []
        try:
            _move(resting, "cpu")
            _move(parts, self.device)
            yield
        finally:
            _move(parts, "cpu")
            _move(resting, self.device)

    # ---- the flow

    def latent_shape(self, conditioning: Conditioning) -> tuple[int, int]:
        rows, columns = self.grid(_size(conditioning))
        return rows * columns, int(conditioning["reference"].shape[-1])

    def sigmas(self, num_inference_steps: int, conditioning: Conditioning) -> Tensor:
        if self.shift is not None:
            return shifted_sigmas(num_inference_steps, self.shift)
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        mu = self._mu(self.latent_shape(conditioning)[0], num_inference_steps)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps), mu=mu)
        return scheduler.sigmas.float()

    def _mu(self, tokens: int, num_inference_steps: int) -> float:
        """The log of the pipeline's shift: linear in the number of image tokens."""
        config = self.pipeline.scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return base + (tokens - low) * (top - base) / (high - low)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with self._autocast():
            velocity = self._predict(latents, sigma, conditioning).float()
            if self.true_cfg_scale > 1:
                prefix = "negative_"
                swapped = {k.removeprefix(prefix): v for k, v in conditioning.items() if k.startswith(prefix)}
                velocity = self._guide(velocity, self._predict(latents, sigma, {**conditioning, **swapped}).float())
        return velocity

    @abstractmethod
    def _predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """One pass of `module` under autocast: the velocity of the picture's tokens, (B, N, C)."""

    def _embedded_guidance(self, sigma: Tensor) -> Tensor | None:
        return torch.full_like(sigma, self.guidance_scale) if self.transformer.config.guidance_embeds else None

    def _guide(self, velocity: Tensor, negative: Tensor) -> Tensor:
        return negative + self.true_cfg_scale * (velocity - negative)

    def _default_cfg_scale(self) -> float:
        return 1.0

    @property
    def _input_dtype(self) -> torch.dtype:
        return torch.float32 if self.trainable == "full" else self.dtype

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """bfloat16 runs under autocast, so that float32 trained weights meet bfloat16 activations."""
        if self.dtype == torch.float32:
            yield
        else:
            with torch.autocast(self.device.type, self.dtype), MixedPrecision(self.device.type):
                yield

    # ---- what comes out

    @torch.no_grad()
    def decode(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        batch, (width, height) = self.decode_batch(conditioning), _size(conditioning)
        with self._awake("vae"), self._autocast():
            images = [self._decode(some, *self.grid((width, height))).float() for some in latents.split(batch)]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def decode_batch(self, conditioning: Conditioning) -> int:
        width, height = _size(conditioning)
        return max(1, PIXELS_PER_DECODE // (width * height))

    @abstractmethod
    def _decode(self, latents: Tensor, rows: int, columns: int) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] from tokens on a grid."""

    # ---- what trains

    def base(self) -> AbstractContextManager[None]:
        if self._base is not None:
            return weights_replaced(self, self._base)
        return _lora.adapter_off(self.transformer, self.trainable)

    def keep_base(self) -> bool:
        if self.trainable == "full" and self._base is None:
            self._base = {name: tensor.clone() for name, tensor in self.trainable_state().items()}
        return self._base is not None

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

    def load(self, folder: str | Path) -> None:
        """Take up an adapter that `save` wrote. Raises UserError if it is of another family, rank or targets."""
        if self.trainable == "full":
            raise UserError(
                "load() takes an adapter; give a fully trained transformer in the pipeline's folder instead."
            )
        _lora.load_adapter(self.transformer, Path(folder))


def _move(parts: Sequence[torch.nn.Module], device: str | torch.device) -> None:
    for part in parts:
        part.to(device)


def _size(conditioning: Conditioning) -> Size:
    """In the shape of an empty tensor, which reads without waiting for the device."""
    height, width = conditioning["size"].shape[1:3]
    return width, height


def default_device() -> torch.device:
    """This process's own GPU (LOCAL_RANK, as launchers set it), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


CHOICES = {
    "trainable": ("lora", "full"),
    "aspect": ("square", "reference"),
    "offload": ("none", "cpu", "swap"),
    "attention": (
        *("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math", "flex", "xformers"),
        *("flash", "flash_varlen", "_flash_3", "_flash_varlen_3", "sage"),
    ),
    "compile": ("none", "inductor", "aot_eager"),
}
"""Attention backends that diffusers downloads as code from the hub are not among them."""


def check_choices(**settings: str) -> None:
    """Raise UserError unless each setting has one of its values."""
    for name, value in settings.items():
        if value not in CHOICES[name]:
            raise UserError(
                f"policy.{name} is '{value}'; it must be {' or '.join(CHOICES[name])}.{nearest(value, CHOICES[name])}"
            )


def use_attention(transformer: torch.nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Let an attention backend of diffusers compute all attention of a transformer.

    Raises:
        UserError: if it does not run here, or gives no gradient, so that nothing before an attention would train.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    backend = AttentionBackendName(name)
    query = torch.ones(1, 16, 2, 64, device=device, dtype=dtype, requires_grad=True)  # one that all backends take
    try:
        out = dispatch_attention_fn(query, query, query, backend=backend)
        problem = "" if out.requires_grad else "gives no gradient, so it can only sample"
    except Exception as error:  # of any library
        problem = f"does not run here ({type(error).__name__}: {' '.join(str(error).split())[:150]})"
    if problem:
        raise UserError(f"policy.attention is '{name}', which {problem} in {dtype}; take another, such as native.")
    for module in transformer.modules():  # diffusers' own method also changes models that are loaded later
        if hasattr(processor := getattr(module, "processor", None), "_attention_backend"):
            processor._attention_backend = backend  # pyright: ignore


def check_size(resolution: int | None, width: int | None, height: int | None) -> None:
    """Raise UserError unless the size is given once."""
    if (width is None) != (height is None) or (width is not None and resolution is not None):
        raise UserError(
            f"policy.width is {width}, height {height} and resolution {resolution}; give width and height, or "
            f"resolution alone."
        )
    for name, side in (("resolution", resolution), ("width", width), ("height", height)):
        if side is not None and side <= 0:
            raise UserError(f"policy.{name} is {side}; it must be more than 0 pixels.")


def _check_components(path: str | Path, index: Mapping[str, Any]) -> None:
    """Raise UserError for a component of another library: diffusers 0.41 imports whatever the folder names there.

    The autoencoder and the transformer of the toy world are this package's own code.
    """
    own = tuple(f"customized_grpo.toyworld.{module}" for module in ("autoencoder", "transformer"))
    for name, value in index.items():
        library = value[0] if isinstance(value, list | tuple) and value else None
        if library not in (None, "diffusers", "transformers", *own):
            raise UserError(
                f"'{path}' takes its {name} from '{library}'; only parts of diffusers and transformers are loaded, so "
                f"that a model brings no code along."
            )


def above_zero(**settings: float | None) -> None:
    """Raise UserError unless each setting is more than 0, or left out."""
    for name, value in settings.items():
        if value is not None and not value > 0:
            raise UserError(f"policy.{name} is {value:g}; it must be more than 0.")


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of a forward pass.

    Raises:
        UserError: unless it is float32 or bfloat16. float16 overflows in these models.
    """
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() or _fast_bfloat16_on_cpu() else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16):
        raise UserError(f"policy.dtype is '{dtype}'; it must be float32, bfloat16 or auto.")
    return found


def _fast_bfloat16_on_cpu() -> bool:
    """Intel's processors without matrix units (AMX) have the bfloat16 instruction, but their float32 is faster."""
    if torch.cpu._is_amx_tile_supported():
        return True
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older PyTorch
    return torch.cpu._is_avx512_bf16_supported() and "Intel" not in str(capabilities.get("cpu_name"))


def read_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as YAML has them, with the nested ones read."""
    read = dict(settings)
    if read.get("lora") is not None:
        try:
            read["lora"] = LoraSettings.model_validate(read["lora"])
        except ValidationError as error:
            raise UserError(sentence(error.errors(), read["lora"], LoraSettings, "policy.lora")) from None
    return read


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Inside it a library's logger keeps its warnings to itself, because we give a better one."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
