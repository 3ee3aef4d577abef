"""UNO: FLUX.1-dev with UNO's adapter, which teaches it references on the diagonal beyond the picture."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from customized_grpo.data.images import to_tensor
from customized_grpo.errors import UserError
from customized_grpo.policies import lora as _lora
from customized_grpo.policies.flux_model import FluxPolicy
from customized_grpo.policies.flux_names import BLOCKS, FLUX1, load_transformer
from customized_grpo.policies.pipeline import as_dtype, read_settings
from customized_grpo.policies.quantization import Quantize
from customized_grpo.policies.tokens import Size, floor_to, grid_positions
from customized_grpo.sources import Location, explain, pin
from customized_grpo.structures import Example

if TYPE_CHECKING:
    from typing_extensions import Self

FILE = "dit_lora.safetensors"
"""The adapter's file in UNO's hub repository."""


class UnoPolicy(FluxPolicy):
    """A diffusers `FluxPipeline` with UNO's adapter as a policy. One to four references per example.

    `reference_resolution` is the longer side of a reference in pixels; None is 512 for one reference and 320 for
    several. `from_pretrained` loads base and adapter; given to the class, a pipeline must hold the adapter already.

    Source: UNO (arXiv 2504.02160), bytedance/UNO. Its code draws a reference's latents from the VAE's distribution;
    here it is the mode, so that an example has one conditioning.
    """

    PIPELINE: ClassVar[str] = "FluxPipeline"
    MAX_REFERENCES: ClassVar[int] = 4
    GUIDANCE: ClassVar[float] = 4.0
    LOCATIONS: ClassVar[Mapping[str, Location]] = {
        **FluxPolicy.LOCATIONS,
        "adapter": Location("adapter_revision", files=True),
        "transformer": Location(files=True),
    }

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        adapter: str | Path,
        fuse: bool = True,
        transformer: str | Path | None = None,
        revision: str | None = None,
        adapter_revision: str | None = None,
        quantize: Quantize = "none",
        **settings: Any,
    ) -> "Self":
        """Load FLUX.1-dev and UNO's adapter.

        Args:
            path: folder or hub id of a `FluxPipeline` in the diffusers layout.
            adapter: UNO's file in its original naming, or a hub id that holds `dit_lora.safetensors`.
            fuse: add the adapter to the weights; otherwise it lies frozen beneath the one that trains, which is slower
                but exact in bfloat16.
            transformer: a file in FLUX's original naming, such as flux1-dev.safetensors, instead of the path's own.
            revision: of `path`: commit, tag or branch of a hub id; None is the newest.
            adapter_revision: of `adapter`.
            quantize: as for every family; with `fuse: false`, because nothing can be added to rounded weights exactly.
            settings: as in the class.

        Raises:
            UserError: if a file is missing, is not UNO's, or does not fit the base model.
        """
        cls.check_arguments(path, quantize=quantize, fuse=fuse, transformer=transformer, **settings)
        settings = read_settings(settings)
        dtype = settings.get("dtype", torch.float32)
        parts = {} if transformer is None else {"transformer": load_transformer(transformer).to(as_dtype(dtype))}
        pipeline = cls.load_pipeline(path, dtype, revision=revision, quantize=quantize, **parts)
        add_uno(pipeline.transformer, _locate(adapter, adapter_revision), fuse=fuse)
        return cls(pipeline, **settings)

    @classmethod
    def check_arguments(
        cls,
        path: str | Path,
        *,
        quantize: Quantize = "none",
        fuse: bool = True,
        transformer: str | Path | None = None,
        **settings: Any,
    ) -> None:
        if not fuse and settings.get("trainable") == "full":
            raise UserError(
                "policy.fuse is false, but with trainable: full there is no adapter of ours to lie above UNO's."
            )
        given = {} if transformer is None else {"transformer": transformer}
        super().check_arguments(path, quantize=quantize, **given, **settings)
        if quantize != "none" and (fuse or transformer is not None):
            raise UserError(
                f"policy.quantize is {quantize}, and weights are quantised while the pipeline loads: set policy.fuse "
                f"to false, so that UNO's adapter lies beneath ours, and leave policy.transformer out."
            )

    def reference_sizes(self, example: Example) -> list[Size]:
        return [floor_to(self._scaled(example, image.size), self.pixels_per_token) for image in example.references]

    def _scaled(self, example: Example, size: Size) -> Size:
        """The size whose longer side is as wanted. Source: UNO, `preprocess_ref`."""
        longer = self.reference_resolution or (512 if len(example.references) == 1 else 320)
        width, height = size
        if width >= height:
            return longer, max(self.pixels_per_token, int(longer / width * height))
        return max(self.pixels_per_token, int(longer / height * width)), longer

    def _reference_pixels(self, example: Example) -> list[Tensor]:
        """Resized, then cropped at the centre to whole tokens."""
        pixels = []
        for image, (width, height) in zip(example.references, self.reference_sizes(example), strict=True):
            scaled = image.convert("RGB").resize(self._scaled(example, image.size), Image.Resampling.LANCZOS)
            left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
            pixels.append(to_tensor(scaled.crop((left, top, left + width, top + height))).unsqueeze(0) * 2 - 1)
        return [p.to(self.device) for p in pixels]

    def positions(self, picture: tuple[int, int], references: list[tuple[int, int]]) -> list[Tensor]:
        """Each reference begins where the rows and columns of all before it end."""
        positions, (row, column) = [], picture
        for rows, columns in references:
            positions.append(grid_positions(rows, columns, row=row, column=column))
            row, column = row + rows, column + columns
        return positions


def add_uno(transformer: Any, file: str | Path, *, fuse: bool = True) -> None:
    """Give a diffusers `FluxTransformer2DModel` UNO's adapter, fused into its weights or frozen.

    Raises:
        UserError: if the file is not UNO's or does not fit.
    """
    state, _ = _lora.read_safetensors(Path(file).expanduser())
    config = transformer.config
    converted = convert_uno(state, blocks=(config.num_layers, config.num_single_layers))
    if fuse:
        _lora.fuse(transformer, converted)
    else:
        _lora.add_frozen_adapter(transformer, converted, "uno")


_KEY = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.processor\.(qkv_lora[12]?|proj_lora[12]?)\.(down|up)\.weight")
_LAYERS = {
    "double_blocks": {
        "qkv_lora1": "img_attn.qkv", "proj_lora1": "img_attn.proj",
        "qkv_lora2": "txt_attn.qkv", "proj_lora2": "txt_attn.proj",
    },
    "single_blocks": {"qkv_lora": "linear1", "proj_lora": "linear2"},
}  # fmt: skip
"""UNO's layers to FLUX's. Of a single block's linear1 only the q, k and v part is touched."""


def convert_uno(state: Mapping[str, Tensor], blocks: tuple[int, int] = (19, 38)) -> dict[str, Tensor]:
    """UNO's adapter from its original naming to `{module}.lora_A.weight`, `{module}.lora_B.weight` of diffusers.

    Args:
        state: `double_blocks.{i}.processor.qkv_lora1.down.weight` and so on; there is no alpha, so its scale is 1.
        blocks: numbers of double and single blocks, all of which must be there.

    Raises:
        UserError: if keys are missing or left over, or the ranks differ.
    """
    wanted = {
        f"{stack}.{index}.processor.{layer}.{part}.weight"
        for (stack, layers), count in zip(_LAYERS.items(), blocks, strict=True)
        for index in range(count)
        for layer in layers
        for part in ("down", "up")
    }
    missing, extra = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or extra:
        raise UserError(
            f"This is not UNO's adapter for {blocks[0]} double and {blocks[1]} single blocks: {len(missing)} keys are "
            f"missing{f' (such as {missing[0]})' if missing else ''}, {len(extra)} left over"
            f"{f' (such as {extra[0]})' if extra else ''}; give UNO's own {FILE}."
        )
    ranks = {len(state[key]) for key in wanted if ".down." in key} | {state[k].shape[1] for k in wanted if ".up." in k}
    if len(ranks) != 1:
        raise UserError(f"UNO's adapter has one rank, and this file has {sorted(ranks)}; give UNO's own {FILE}.")
    converted: dict[str, Tensor] = {}
    for key in sorted(wanted):
        match = _KEY.fullmatch(key)
        assert match is not None
        stack, index, layer, part = match.groups()
        names = FLUX1[stack][_LAYERS[stack][layer]][:3]
        pieces = [state[key]] * len(names) if part == "down" else state[key].chunk(len(names))
        for name, piece in zip(names, pieces, strict=True):
            letter = "A" if part == "down" else "B"
            converted[f"{BLOCKS[stack]}.{index}.{name}.lora_{letter}.weight"] = piece.clone().contiguous()
    return converted


def _locate(adapter: str | Path, revision: str | None = None) -> Path:
    """The adapter's file here, fetched from the hub if it is a hub id."""
    path = Path(adapter).expanduser()
    if path.is_dir():
        return path / FILE
    text = str(adapter)
    if path.is_file() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(text, FILE, **pin(text, revision)))
    except (OSError, ValueError) as error:
        raise explain(adapter, "UNO's adapter", error) from error
