import pytest
import torch

from customized_grpo.data.images import to_tensor
from rewards import tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders by name: clip, dino1, dino2, dino3."""
    root = tmp_path_factory.mktemp("models")
    return {"clip": tiny.save_clip(root / "clip")} | {
        f"dino{version}": tiny.save_dino(root / f"dino{version}", version) for version in (1, 2, 3)
    }


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    return torch.stack([to_tensor(tiny.picture(seed=n)) for n in range(3)])
