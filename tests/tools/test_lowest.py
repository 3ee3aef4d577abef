import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.lowest import lowest

CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
REQUIRED = [Requirement(line) for line in metadata.requires("customized-grpo") or () if ";" not in line]


def test_a_bound_becomes_a_version() -> None:
    extras = ['rembg[cpu]>=2.0.60; extra == "masks"', 'torchvision; extra == "qwen"', 'pytest>=8; extra == "dev"']
    found = list(lowest(["torch>=2.6", "peft>=0.19", *extras]))
    assert found == ["peft==0.19", "rembg==2.0.60"]


@pytest.mark.parametrize("required", REQUIRED, ids=lambda required: required.name)
def test_every_dependency_has_one_lower_bound_that_the_tested_version_meets(required: Requirement) -> None:
    assert re.fullmatch(r">=[\d.]+", str(required.specifier))
    tested = [Requirement(line) for line in CONSTRAINTS if re.match(rf"{required.name}==", line, re.I)]
    assert len(tested) == 1
    assert required.specifier.contains(str(tested[0].specifier).removeprefix("=="))
