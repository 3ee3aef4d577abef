"""What a user installs: typed, light to import, complete."""

import subprocess
import sys
from pathlib import Path

import customized_grpo

PACKAGE = Path(customized_grpo.__file__).parent


def test_the_package_is_typed_and_holds_its_weights() -> None:
    assert (PACKAGE / "py.typed").is_file()
    weights = list(PACKAGE.rglob("*.safetensors"))
    assert {p.relative_to(PACKAGE / "toyworld" / "weights").parts[0] for p in weights} >= {"pipeline", "clip", "dino"}
    assert sum(p.stat().st_size for p in weights) <= 20e6


def test_every_public_name_loads() -> None:
    for name in customized_grpo.__all__:
        assert getattr(customized_grpo, name) is not None


def test_importing_is_light() -> None:
    code = "import sys, customized_grpo; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
