"""Settings are read without torch, and every one of them is read by the code."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import customized_grpo
from customized_grpo.config import Config
from customized_grpo.settings import Settings

ROOT = Path(customized_grpo.__file__).parent
HEAVY = ("torch", "accelerate", "diffusers", "transformers", "numpy")


@pytest.mark.parametrize("words", [["config"], ["config", "--describe"], ["config", "objective=nft"]])
def test_printing_a_configuration_imports_no_heavy_library(words):
    script = (
        "import json, sys\nfrom customized_grpo.cli.main import main\n"
        "try:\n    main()\nfinally:\n    print(json.dumps([*sys.modules]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert "iterations" in done.stdout
    assert [name for name in HEAVY if name in json.loads(done.stderr.splitlines()[-1])] == []


def fields(model: type[Settings], prefix: str = "") -> dict[str, str]:
    """Name of each field by its dotted path."""
    found = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            found |= fields(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = name
    return found


def read_names() -> set[str]:
    """Every attribute that the code outside the settings reads."""
    files = [file for file in ROOT.rglob("*.py") if file.name not in ("settings.py", "config.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def test_every_setting_is_read():
    read = read_names()
    assert [path for path, name in fields(Config).items() if name not in read] == []
    assert "no_such_setting" not in read
