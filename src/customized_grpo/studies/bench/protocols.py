"""The benchmarks of the literature, from protocols.yaml: prompts, settings of the generation, and metrics."""

from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import Field

from customized_grpo.errors import UserError, nearest
from customized_grpo.settings import Settings, Spec

COMMON_NOTES = (
    "The noise is a function of seed, task and image, so two benchmark runs pair image by image.",
    "Scores are of the saved PNG files.",
)


class Metric(Settings):
    """One column of scores."""

    role: Literal["identity", "prompt", "copy"]
    """identity is compared with real photos, prompt is not; copy is unwanted similarity: lower is better."""
    spec: Spec
    """A reward, the same code that training uses."""
    title: str


class Protocol(Settings):
    """A benchmark. What is None is left to the configuration of the policy."""

    name: str
    about: str
    source: str
    suite: Literal["dreambooth", "file", "dreambench++", "omnicontext", "xverse", "toyworld"]
    """Where its tasks come from; see `suites.open_suite`."""
    images: int
    """Per prompt."""
    metrics: dict[str, Metric]
    references: int = 1
    """Subjects in a prompt."""
    seed: int = 0
    num_inference_steps: int | None = None
    policy: dict[str, Any] = Field(default={})
    """Settings of the policy."""
    guidance: float | None = None
    """Set by whichever setting the model has for it; see `policies.guidance`."""
    notes: tuple[str, ...] = ()
    """Rules that the other fields do not say."""
    departures: tuple[str, ...] = ()
    """What we always do otherwise than the authors' code. Published numbers stay comparable, roughly."""
    subjects: int
    prompts: int
    """Of each subject. Both are the numbers of the complete data."""


def _read() -> dict[str, Protocol]:
    text = files("customized_grpo.studies.bench").joinpath("protocols.yaml").read_text(encoding="utf-8")
    return {name: Protocol(name=name, **content) for name, content in yaml.safe_load(text)["protocols"].items()}


PROTOCOLS = _read()


def find_protocol(name: str) -> Protocol:
    """A protocol by name.

    Raises:
        UserError: if there is none, with the nearest there is.
    """
    if name not in PROTOCOLS:
        raise UserError(f"There is no protocol '{name}'; there are {', '.join(PROTOCOLS)}.{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]
