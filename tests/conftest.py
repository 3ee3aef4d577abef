"""Shared by all tests: few threads, and small stand-ins that obey the real contracts."""

import atexit
import os
import shutil
import signal
import tempfile

os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp()  # what tests trust must not be trusted afterwards
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup with this one
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)
