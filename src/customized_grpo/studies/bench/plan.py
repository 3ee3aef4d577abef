"""The settings of a bench, and the protocol under these settings, with the departures from it."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from customized_grpo.assemble import PolicySource
from customized_grpo.config import Config
from customized_grpo.errors import UserError, nearest
from customized_grpo.policies.guidance import describe_guidance, guidance_setting, takes
from customized_grpo.settings import Role, Settings, Spec, make_spec
from customized_grpo.settings.build import check_spec, resolve
from customized_grpo.settings.identity import declared_roles, runtime_arguments
from customized_grpo.studies.bench.protocols import COMMON_NOTES, Metric, Protocol, find_protocol
from customized_grpo.studies.bench.suites import Suite


class BenchSettings(Settings):
    """Settings of `cgrpo bench`: a protocol, its data, and changes to it, which are reported as departures."""

    protocol: Annotated[str, Role.KEPT] = "toyworld"
    """dreambooth, uno, uno-multi, customized-grpo, dreambench++, omnicontext, xversebench, xversebench-multi or
    toyworld."""
    data: Annotated[Path | None, Role.RUNTIME] = None
    """Folder with the images of the protocol."""
    prompts: Annotated[Path | None, Role.RUNTIME] = None
    """JSON list of prompts and photos, for protocols that have one."""
    config: Annotated[Path | None, Role.RUNTIME] = None
    """Configuration of the policy to measure; default: the embedded default. Not used with a run."""
    policy: Annotated[dict[str, Any], Role.KEPT] = Field(default={})
    """Arguments of the policy, which override those of the configuration and the protocol."""
    metrics: Annotated[dict[str, dict[str, Any] | None], Role.KEPT] = Field(default={})
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
    """A protocol with settings."""

    protocol: Protocol
    settings: BenchSettings
    config: Config
    """With the protocol's settings in its policy."""
    metrics: Mapping[str, Metric]
    images: int
    seed: int
    num_inference_steps: int

    def departures(self, suite: Suite | None = None) -> list[str]:
        """The differences from the protocol, one sentence each; those in size only with the suite."""
        protocol, policy = self.protocol, self.config.policy
        found, target = list[str](protocol.departures), check_spec(policy, "policy")
        if protocol.guidance is not None and guidance_setting(target, policy) is None:
            found.append(f"The model takes no guidance; the protocol's is {protocol.guidance:g}.")
        for name, value in _wanted(protocol, target, policy).items():
            if name not in policy.arguments:
                found.append(f"The policy takes no {name}; the protocol's is {value}.")
            elif policy.arguments[name] != value:
                found.append(f"policy.{name} is {policy.arguments[name]}; the protocol's is {value}.")
        for name, metric in protocol.metrics.items():
            free = () if "model" in metric.spec.arguments else ("model",)  # of a judge, which few protocols name
            if name not in self.metrics:
                found.append(f"{metric.title} is left out.")
            elif _essence(spec := self.metrics[name].spec, *free) != _essence(metric.spec, *free):
                found.append(f"{metric.title} is measured by {_short(spec)}; the protocol's is {_short(metric.spec)}.")
        for name in ("num_inference_steps", "images", "seed"):
            if (wanted := getattr(protocol, name)) not in (None, getattr(self, name)):
                found.append(f"{name} is {getattr(self, name)}; the protocol's is {wanted}.")
        subjects = len({task.subject for task in suite.tasks}) if suite else protocol.subjects
        if subjects != protocol.subjects:
            found.append(f"{subjects} subjects; the protocol has {protocol.subjects}.")
        if suite and len(suite.tasks) != subjects * protocol.prompts:
            found.append(f"{len(suite.tasks)} prompts; the protocol has {protocol.prompts} for each subject.")
        return found

    def rules(self, suite: Suite) -> list[str]:
        """How images are generated and scored, one sentence each."""
        subjects = len({task.subject for task in suite.tasks})
        policy = self.config.policy
        return [
            f"{len(suite.tasks)} prompts for {subjects} subjects, {self.images} images each: "
            f"{len(suite.tasks) * self.images} images.",
            f"{self.num_inference_steps} deterministic steps, noise of seed {self.seed}, {_short(policy)}.",
            describe_guidance(check_spec(policy, "policy"), policy),
            *(f"{m.title} ({m.role}): {_short(m.spec)}." for m in self.metrics.values()),
            *self.protocol.notes,
            *COMMON_NOTES,
        ]

    def identity(self, source: PolicySource, suite: Suite) -> dict[str, Any]:
        """The settings and data that two processes of one bench have in common."""
        planned = {
            **vars(self.settings),
            "policy": self.config.policy.model_dump(),
            "images": self.images,
            "seed": self.seed,
            "num_inference_steps": self.num_inference_steps,
            "metrics": {name: metric.model_dump() for name, metric in self.metrics.items()},
        }
        kept = {name: planned[name] for name, role in declared_roles(BenchSettings).items() if role is Role.KEPT}
        run = str(source.run.path.resolve()) if source.run else None
        return {**kept, "run": run, "iteration": source.iteration, "tasks": [vars(task) for task in suite.tasks]}


def make_plan(settings: BenchSettings, config: Config) -> Plan:
    """Put the settings over the protocol, and the protocol over the configuration.

    Raises:
        UserError: if a name does not exist, or a policy or metric does not take a setting.
    """
    protocol = find_protocol(settings.protocol)
    return Plan(
        protocol, settings, config.model_copy(update={"policy": _policy(protocol, settings, config)}),
        _metrics(protocol, settings),
        images=settings.images or protocol.images,
        seed=protocol.seed if settings.seed is None else settings.seed,
        num_inference_steps=settings.num_inference_steps or protocol.num_inference_steps
        or config.evaluation_steps,
    )  # fmt: skip


def specs(settings: BenchSettings, config: Config) -> list[tuple[str, str, Spec]]:
    """(setting, slot, spec) of the imports that the settings name, without the rest of the configuration."""
    metrics = find_protocol(settings.protocol).metrics
    changed = {
        f"metrics.{name}": {"use": metrics[name].spec.use, **some}
        for name, some in settings.metrics.items()
        if some and name in metrics
    }
    policy = {"use": config.policy.use, **settings.policy}
    found = [("policy", "policy", make_spec(policy, "policy"))] if settings.policy else []
    return found + [(where, "metric", make_spec(spec, where)) for where, spec in changed.items()]


def _policy(protocol: Protocol, settings: BenchSettings, config: Config) -> Spec:
    """The configuration's policy with the protocol's settings where it takes them, and the user's over both."""
    base, target = config.policy.model_dump(), check_spec(config.policy, "policy")
    wanted = _wanted(protocol, target, make_spec({**base, **settings.policy}, "policy"))
    wanted = {name: value for name, value in wanted.items() if takes(target, name) and name not in settings.policy}
    if "resolution" in wanted:
        base = {name: value for name, value in base.items() if name not in ("width", "height")}
    spec = make_spec({**base, **wanted, **settings.policy}, "policy")
    check_spec(spec, "policy")
    return spec


def _wanted(protocol: Protocol, target: Any, spec: Spec) -> dict[str, Any]:
    """The protocol's settings of a policy, its guidance by the name that the policy has for it."""
    knob = guidance_setting(target, spec) if protocol.guidance is not None else None
    return {**protocol.policy, **({knob: protocol.guidance} if knob else {})}


def _metrics(protocol: Protocol, settings: BenchSettings) -> dict[str, Metric]:
    """The metrics of the protocol with the changes of the settings, without those that are left out."""
    for name in settings.metrics:
        if name not in protocol.metrics:
            raise UserError(
                f"The protocol '{protocol.name}' has no metric '{name}'; it has {', '.join(protocol.metrics)}."
                f"{nearest(name, protocol.metrics)}"
            )
    found = {}
    for name, metric in protocol.metrics.items():
        change = settings.metrics.get(name, {})
        if change is None:
            continue
        same = change.get("use", metric.spec.use) == metric.spec.use
        spec = make_spec({**metric.spec.model_dump(), **change} if same else change, f"metrics.{name}")
        if spec.use == "VlmJudge" and "model" not in spec.arguments:
            raise UserError(
                f"The protocol '{protocol.name}' needs a judge: metrics.{name}.model=NAME and "
                f"metrics.{name}.url=URL of an OpenAI-compatible endpoint, or metrics.{name}=null to leave it out."
            )
        target = resolve(spec.use, "metric", f"metrics.{name}")
        if inspect.isabstract(target):
            raise UserError(
                f"The protocol '{protocol.name}' measures {metric.title} with a model that is no part of this package: "
                f"metrics.{name}.use=package.module:NAME, your subclass of {target.__name__} "
                f"(docs/bench.md#xversebench), or metrics.{name}=null to leave it out."
            )
        if takes(target, "data") and settings.data is not None:  # of the protocol, such as the questions of a prompt
            spec = make_spec({"data": str(settings.data), **spec.model_dump()}, f"metrics.{name}")
        check_spec(spec, "metric", f"metrics.{name}")
        found[name] = metric.model_copy(update={"spec": spec})
    if not found:
        raise UserError("Every metric is left out; keep at least one.")
    return found


def _essence(spec: Spec, *free: str) -> dict[str, Any]:
    """The part of a spec that scores depend on, without `free` arguments. Of a reward in a process of its own, that of
    the reward there, which is not imported here."""
    if spec.use.split(":")[-1] == "RemoteReward" and isinstance(spec.arguments.get("reward"), Mapping):
        spec = make_spec(spec.arguments["reward"], "reward")
    free = (*free, *runtime_arguments(spec, "metric", foreign=False))
    return {key: value for key, value in spec.model_dump().items() if key not in free}


def _short(spec: Spec) -> str:
    """A spec in a line: the name and its arguments."""
    arguments = ", ".join(f"{key}={value}" for key, value in spec.arguments.items())
    return f"{spec.use.split(':')[-1]}({arguments})"
