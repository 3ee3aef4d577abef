"""The settings of a bench, and what becomes of a protocol under them, departures included."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from customized_grpo.config import Config
from customized_grpo.errors import UserError, nearest
from customized_grpo.settings import Role, Settings, Spec
from customized_grpo.settings.build import check_spec
from customized_grpo.settings.identity import runtime_arguments
from customized_grpo.studies.bench.guidance import describe_guidance, guidance_setting, takes
from customized_grpo.studies.bench.protocols import COMMON_NOTES, Metric, Protocol, find_protocol
from customized_grpo.studies.bench.suites import Suite


class BenchSettings(Settings):
    """Settings of `cgrpo bench`: a protocol, its data, and changes to it, which are reported as departures."""

    protocol: Annotated[str, Role.KEPT] = "toyworld"
    """dreambooth, uno, uno-multi, customized-grpo, dreambench++ or toyworld."""
    data: Annotated[Path | None, Role.RUNTIME] = None
    """Folder with the images of the protocol."""
    prompts: Annotated[Path | None, Role.RUNTIME] = None
    """JSON list of prompts and photos, for protocols that have one."""
    config: Annotated[Path | None, Role.RUNTIME] = None
    """Configuration of the policy to measure; default: the embedded default. Not used with a run."""
    policy: Annotated[dict[str, Any], Role.KEPT] = Field(default={})
    """Arguments of the policy, which override those of the configuration and the protocol."""
    metrics: Annotated[dict[str, Any], Role.KEPT] = Field(default={})
    """Changes to the metrics of the protocol by name: arguments, such as a local path, or null to remove a metric."""
    images: Annotated[int | None, Role.KEPT] = Field(default=None, ge=1)
    """Images per prompt; default: that of the protocol."""
    num_inference_steps: Annotated[int | None, Role.KEPT] = Field(default=None, ge=1)
    """Denoising steps; default: that of the protocol, or else of the configuration."""
    seed: Annotated[int | None, Role.KEPT] = None
    """Seed of the noise; default: that of the protocol."""
    subjects: Annotated[int | None, Role.KEPT] = Field(default=None, ge=1)
    """Use only this many subjects, for a quick test."""
    batch: Annotated[int, Role.RUNTIME] = Field(default=4, ge=1)
    """Images generated at once."""
    score_batch: Annotated[int, Role.RUNTIME] = Field(default=32, ge=1)
    """Images scored at once."""
    grid_rows: Annotated[int, Role.RUNTIME] = Field(default=12, ge=0)
    """Tasks shown in the report."""


@dataclass(frozen=True)
class Plan:
    """A protocol as it will be done."""

    protocol: Protocol
    settings: BenchSettings
    config: Config
    """With the protocol's settings in its policy."""
    metrics: Mapping[str, Metric]
    images: int
    seed: int
    num_inference_steps: int
    departures: list[str] = field(default_factory=list)
    """What is not as the protocol says, one sentence each."""

    def rules(self, suite: Suite) -> list[str]:
        """Exactly what is drawn and measured, one sentence each."""
        subjects = len({task.subject for task in suite.tasks})
        found = [
            f"{len(suite.tasks)} prompts for {subjects} subjects, {self.images} images each: "
            f"{len(suite.tasks) * self.images} images.",
            f"{self.num_inference_steps} deterministic steps, noise of seed {self.seed}, {_short(self.config.policy)}.",
            describe_guidance(check_spec(self.config.policy, "policy"), self.config.policy),
            *(f"{m.title} ({m.role}): {_short(m.spec)}." for m in self.metrics.values()),
            *self.protocol.notes,
            *COMMON_NOTES,
        ]
        return found


def make_plan(settings: BenchSettings, config: Config) -> Plan:
    """Put the settings over the protocol, and the protocol over the configuration.

    Raises:
        UserError: if a name does not exist, or a policy or metric does not take a setting.
    """
    protocol = find_protocol(settings.protocol)
    departures: list[str] = []
    policy = _policy(protocol, settings, config, departures)
    metrics = _metrics(protocol, settings, departures)

    def choose(name: str, wanted: Any) -> Any:
        given = getattr(settings, name)
        if given is not None and wanted is not None and given != wanted:
            departures.append(f"{name} is {given}; the protocol's is {wanted}.")
        return wanted if given is None else given

    steps = choose("num_inference_steps", protocol.num_inference_steps) or config.rollout.num_inference_steps
    return Plan(
        protocol, settings, config.model_copy(update={"policy": policy}), metrics,
        choose("images", protocol.images), choose("seed", protocol.seed), steps, departures,
    )  # fmt: skip


def named(settings: BenchSettings, config: Config) -> list[tuple[str, str, Spec]]:
    """(setting, slot, spec) of what the settings name by import path, without the rest of the configuration."""
    protocol = find_protocol(settings.protocol)
    found = [("policy", "policy", Spec(**{"use": config.policy.use, **settings.policy}))] if settings.policy else []
    for name, metric in protocol.metrics.items():
        if isinstance(change := settings.metrics.get(name), Mapping):
            found.append((f"metrics.{name}", "metric", Spec(**{"use": metric.spec.use, **change})))
    return found


def size_departures(plan: Plan, suite: Suite) -> list[str]:
    """One sentence if there are not as many subjects or prompts as the protocol has."""
    protocol, found = plan.protocol, []
    subjects = {task.subject for task in suite.tasks}
    if protocol.subjects is not None and len(subjects) != protocol.subjects:
        found.append(f"{len(subjects)} subjects; the protocol has {protocol.subjects}.")
    if protocol.prompts is not None and len(suite.tasks) != len(subjects) * protocol.prompts:
        found.append(f"{len(suite.tasks)} prompts; the protocol has {protocol.prompts} for each subject.")
    return found


def _policy(protocol: Protocol, settings: BenchSettings, config: Config, departures: list[str]) -> Spec:
    """The configuration's policy with the protocol's settings where it takes them, and the user's over both."""
    target = check_spec(config.policy, "policy")
    arguments, wanted = config.policy.arguments, dict(protocol.policy)
    if protocol.guidance is not None:
        asked = Spec(**{"use": config.policy.use, **arguments, **settings.policy})
        if knob := guidance_setting(target, asked):
            wanted[knob] = protocol.guidance
        else:
            departures.append(f"The model takes no guidance; the protocol's is {protocol.guidance:g}.")
    for name, value in wanted.items():
        if name in settings.policy:
            if settings.policy[name] != value:
                departures.append(f"policy.{name} is {settings.policy[name]}; the protocol's is {value}.")
        elif not takes(target, name):
            departures.append(f"The policy takes no {name}; the protocol's is {value}.")
        else:
            arguments[name] = value
            if name == "resolution":
                arguments.pop("width", None)
                arguments.pop("height", None)
    spec = Spec(**{"use": config.policy.use, **arguments, **settings.policy})
    check_spec(spec, "policy")
    return spec


def _metrics(protocol: Protocol, settings: BenchSettings, departures: list[str]) -> dict[str, Metric]:
    for name in settings.metrics:
        if name not in protocol.metrics:
            known = ", ".join(protocol.metrics)
            raise UserError(
                f"The protocol '{protocol.name}' has no metric '{name}'; it has {known}."
                f"{nearest(name, protocol.metrics)}"
            )
    found = {}
    for name, metric in protocol.metrics.items():
        change = settings.metrics.get(name, {})
        if change is None:
            departures.append(f"{metric.title} is left out.")
            continue
        if not isinstance(change, Mapping):
            raise UserError(
                f"metrics.{name} is {change!r}; give arguments, such as metrics.{name}.path=FOLDER, or null."
            )
        same = change.get("use", metric.spec.use) == metric.spec.use
        spec = Spec(**({**metric.spec.model_dump(), **change} if same else change))
        if _essence(spec) != _essence(metric.spec):
            departures.append(f"{metric.title} is measured by {_short(spec)}; the protocol's is {_short(metric.spec)}.")
        check_spec(spec, "metric")
        if spec.use == "VlmJudge" and "model" not in spec.arguments:
            raise UserError(
                f"The protocol '{protocol.name}' needs a judge: metrics.{name}.model=NAME and "
                f"metrics.{name}.url=URL of an OpenAI-compatible endpoint, or metrics.{name}=null to leave it out."
            )
        found[name] = replace(metric, spec=spec)
    if not found:
        raise UserError("Every metric is left out; keep at least one.")
    return found


def _essence(spec: Spec) -> dict[str, Any]:
    """What a score depends on, but for the model of a judge, which no protocol names. Of a reward in a process of its
    own, that of the reward there, which is not imported here."""
    if spec.use.split(":")[-1] == "RemoteReward" and isinstance(spec.arguments.get("reward"), Mapping):
        spec = Spec(**spec.arguments["reward"])
    free = {"model", *runtime_arguments(spec, "metric", foreign=False)}
    return {key: value for key, value in spec.model_dump().items() if key not in free}


def _short(spec: Spec) -> str:
    """A spec in a line: the name and its arguments."""
    name = spec.use.split(":")[-1]
    arguments = ", ".join(f"{key}={value}" for key, value in spec.arguments.items())
    return f"{name}({arguments})"
