"""FLUX.1-Kontext: the reference has its own plane of positions."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from customized_grpo.policies.flux_model import FluxPolicy
from customized_grpo.policies.quantization import Quantize
from customized_grpo.policies.tokens import Size, floor_to, grid_positions
from customized_grpo.structures import Example

if TYPE_CHECKING:
    from typing_extensions import Self


class FluxKontextPolicy(FluxPolicy):
    """A diffusers `FluxKontextPipeline` as a policy. One reference per example.

    The reference is resized to the nearest of the sizes that the model was trained on, scaled from their 1024 to
    `reference_resolution` (None: `resolution`). At 1024 that is what the pipeline does.
    """

    PIPELINE: ClassVar[str] = "FluxKontextPipeline"

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = "toyworld:pipeline",
        *,
        revision: str | None = None,
        quantize: Quantize = "none",
        **settings: Any,
    ) -> "Self":
        return super().from_pretrained(path, revision=revision, quantize=quantize, **settings)

    def reference_sizes(self, example: Example) -> list[Size]:
        return [self._fit(image.size, self.reference_resolution or self.resolution) for image in example.references]

    def _fit(self, size: Size, side: int) -> Size:
        """The nearest aspect that the model was trained on. Source: the pipeline's `_auto_resize`."""
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        aspect = size[0] / size[1]
        width, height = min(PREFERRED_KONTEXT_RESOLUTIONS, key=lambda wh: (abs(aspect - wh[0] / wh[1]), *wh))
        return floor_to((width * side // 1024, height * side // 1024), self.pixels_per_token)

    def positions(self, picture: tuple[int, int], references: list[tuple[int, int]]) -> list[Tensor]:
        return [grid_positions(rows, columns, plane=1) for rows, columns in references]
