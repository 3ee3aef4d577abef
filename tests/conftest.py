"""Shared by all tests: few threads, and small stand-ins that obey the real contracts."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)
