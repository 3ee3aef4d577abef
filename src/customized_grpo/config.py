"""The configuration of a run, composed of settings that are each defined beside the code that reads them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from customized_grpo import trust
from customized_grpo.data.settings import DataSettings
from customized_grpo.settings import Role, Spec
from customized_grpo.settings.build import check_spec, check_unimported, exported
from customized_grpo.settings.parse import load_settings
from customized_grpo.shell import command
from customized_grpo.train.settings import TrainerConfig

REWARDS = {
    "prompt": Spec(use="ClipReward", path="toyworld:clip"),
    "identity": Spec(use="DinoReward", path="toyworld:dino"),
}
METRICS = {
    "oracle_prompt": Spec(use="customized_grpo.toyworld.oracle:PromptShown"),
    "oracle_subject": Spec(use="customized_grpo.toyworld.oracle:SubjectKept"),
    "oracle_right": Spec(use="customized_grpo.toyworld.oracle:FullyRight"),
}


class Config(TrainerConfig):
    """The configuration of a run, as in YAML. The defaults are those of `cgrpo train` without arguments."""

    policy: Annotated[Spec, Role.KEPT] = Spec(
        use="FluxKontextPolicy", path="toyworld:pipeline", trainable="full", dtype="auto"
    )
    """The model family and the location of its weights."""
    rewards: Annotated[dict[str, Spec], Role.KEPT] = Field(default=REWARDS)
    """Rewards in column order; the time weights of the paper expect prompt, then identity."""
    metrics: Annotated[dict[str, Spec], Role.APPLIED] = Field(default=METRICS)
    """Metrics computed in evaluation, which train only if `method.rewards` names them. The default applies to the toy
    world only, because its oracle cannot evaluate other data."""
    data: DataSettings = DataSettings()

    LISTED: ClassVar[str] = f" `{command('config')}` lists all settings."
    """Added to the error for an unknown setting."""

    @classmethod
    def default_of(cls, name: str, tree: Mapping[str, Any]) -> Any:
        """As in `Settings`. The default metrics are an oracle of the toy world, and cannot evaluate other data."""
        data = tree.get("data", {})
        data = data.model_dump() if isinstance(data, DataSettings) else data
        of_toys = not isinstance(data, Mapping) or (data.get("eval") or data.get("train", "toyworld")) == "toyworld"
        return {} if name == "metrics" and not of_toys else super().default_of(name, tree)

    @model_validator(mode="before")
    @classmethod
    def _metrics_of_the_data(cls, values: dict[str, Any]) -> dict[str, Any]:
        default = cls.default_of("metrics", values)
        return values if default is METRICS else {"metrics": default, **values}

    def specs(self) -> list[tuple[str, str, Spec]]:
        """(setting, slot, spec) of every function and class that the configuration names."""
        found = [*super().specs(), ("policy", "policy", self.policy)]
        found += [(f"rewards.{name}", "reward", spec) for name, spec in self.rewards.items()]
        found += [(f"metrics.{name}", "metric", spec) for name, spec in self.metrics.items()]
        data = {"data.train": self.data.train, "data.eval": self.data.eval}
        return found + [(where, "dataset", spec) for where, spec in data.items() if isinstance(spec, Spec)]


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run: `load_settings` for `Config`."""
    return load_settings(Config, path, overrides)


def open_config(path: str | Path | None, overrides: Sequence[str] = (), *, trust_code: bool = False) -> Config:
    """`load_config` for a file that someone else may have written, such as that of a run folder.

    Raises:
        UserError: as `load_config`, or if the file names code, programs or addresses that the user has not trusted.
    """
    config = load_config(path, overrides)
    if path is not None:
        trust.require_file(path, overrides, lambda words: load_config(path, words).specs(), trust_code=trust_code)
    return config


def check_names(config: Config, *, foreign: bool = True) -> list[str]:
    """Resolve every name in a configuration and check its arguments, without constructing anything.

    Args:
        foreign: also import third-party code. Rewards that run in a separate process are never imported here.

    Returns:
        The names that were not checked, such as `rewards.sharp.use = mine:sharpness`.

    Raises:
        UserError: for the first name or argument that does not exist.
    """
    unchecked = []
    for setting, slot, spec in config.specs():
        for where, kind, part in trust.walk(setting, slot, spec):
            if (foreign and where == setting) or ":" not in part.use or exported(part.use, kind) is not None:
                check_spec(part, kind, where)
                continue
            if where == setting:
                check_unimported(part.use, kind, where)
            unchecked.append(f"{where}.use = {part.use}")
    return unchecked
