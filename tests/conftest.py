"""Shared by all tests: few threads, and small stand-ins that obey the real contracts."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp()  # what tests trust must not be trusted afterwards
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from customized_grpo.page import images, plots

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup with this one
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _blank_plots() -> Iterator[None]:
    """Drawing takes most of the time of a report: only tests that use `plotted` draw, the others write empty files."""

    def save(figure: Any, folder: Path, name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(b"")
        path = folder / f"{name}.svg"
        path.write_text("<svg/>")
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "save", save)
        yield


@pytest.fixture
def plotted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "save", plots.save)
