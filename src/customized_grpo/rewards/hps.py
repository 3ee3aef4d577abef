"""HPSv3 and EditReward, through their authors' packages."""

import inspect
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.data.images import to_pil
from customized_grpo.errors import UserError
from customized_grpo.libraries import library_problem
from customized_grpo.settings import AtLeastOne
from customized_grpo.structures import Example


class _Inferencer:
    """A model of an authors' package, whose output is (mean, log of spread); the score is the mean."""

    PACKAGE = ""
    RUNTIME = ("device", "batch_size")
    name = "prompt"
    inferencer: Any
    batch_size: int

    def _import(self) -> Any:
        """The package.

        Raises:
            UserError: if it is not installed.
        """
        use, package = type(self).__name__, self.PACKAGE
        try:
            return import_module(package)
        except ImportError as error:
            raise library_problem(error) or UserError(
                f"{use} needs the {package} package ({error}); make an environment with `cgrpo rewards install "
                f"{package.lower()}` and use {{use: RemoteReward, reward: {{use: {use}}}, python: its/bin/python}}."
            ) from error

    def _inputs(self, images: Tensor, examples: Sequence[Example]) -> dict[str, Any]:
        """What the inferencer takes besides the prompts."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Shape (B,)."""
        scores = []
        for start in range(0, len(examples), self.batch_size):
            rows = slice(start, start + self.batch_size)
            prompts = [example.prompt for example in examples[rows]]
            scores.append(self.inferencer.reward(prompts=prompts, **self._inputs(images[rows], examples[rows]))[:, 0])
        return torch.cat(scores).float()


class Hpsv3Reward(_Inferencer):
    """Human Preference Score v3: the mean of the predicted score, unbounded; generated pictures about 0 to 15.

    The `hpsv3` package pins an older transformers than this package needs. Give it an environment of its own:
    `{use: RemoteReward, reward: {use: Hpsv3Reward}, python: path/to/its/venv/bin/python}`. Source: Ma et al. 2025.

    Args:
        checkpoint: HPSv3.safetensors; None downloads the released one, MizzenAI/HPSv3.
        config: its YAML; None is the package's own.
        device: where it runs; None is the fastest device there is.
        batch_size: images scored at once.

    Raises:
        UserError: if the package is not installed.
    """

    PACKAGE = "hpsv3"

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        config: str | Path | None = None,
        device: str | int | None = None,
        batch_size: AtLeastOne = 8,
    ) -> None:
        self.batch_size = batch_size
        self.inferencer = self._import().HPSv3RewardInferencer(
            config_path=None if config is None else str(config),
            checkpoint_path=None if checkpoint is None else str(checkpoint),
            device=_device(device),
        )
        self.images = _name_of_images(self.inferencer.reward)

    def _inputs(self, images: Tensor, examples: Sequence[Example]) -> dict[str, Any]:
        return {self.images: list(map(to_pil, images))}


class EditReward(_Inferencer):
    """EditReward: how well the first reference was edited as the prompt says, and how well the image is made.

    The mean of the scores that its two heads predict, unbounded. The repository of its authors pins other versions than
    this package needs. Give it an environment of its own:
    `{use: RemoteReward, reward: {use: EditReward, checkpoint: ...}, python: path/to/its/venv/bin/python}`.
    Source: Wu et al. 2025.

    Args:
        checkpoint: the released folder, with model.safetensors or model.pth.
        config: the YAML of the repository for that model, which names the base model that is loaded first; None is that
            for MiMo-VL-7B-SFT-2508.
        device: where it runs; None is the fastest device there is.
        batch_size: images scored at once.

    Raises:
        UserError: if the package is not installed.
    """

    PACKAGE = "EditReward"

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        config: str | Path | None = None,
        device: str | int | None = None,
        batch_size: AtLeastOne = 8,
    ) -> None:
        package = self._import()
        folder = Path(str(package.__file__)).parent / "config"
        self.batch_size = batch_size
        self.inferencer = package.EditRewardInferencer(
            config_path=str(config or folder / "EditReward-MiMo-VL-7B-SFT-2508.yaml"),
            checkpoint_path=str(checkpoint),
            device=_device(device),
            reward_dim="overall_detail",
            rm_head_type="ranknet_multi_head",
        )

    def _inputs(self, images: Tensor, examples: Sequence[Example]) -> dict[str, Any]:
        return {"image_src": [example.references[0] for example in examples], "image_paths": list(map(to_pil, images))}


def _device(name: str | int | None) -> str | int:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name is None else name


def _name_of_images(reward: Any) -> str:
    """Releases differ in the order of the arguments, so they go by name."""
    names = [name for name in inspect.signature(reward).parameters if name != "prompts"]
    return next((name for name in names if "image" in name), "image_paths")
