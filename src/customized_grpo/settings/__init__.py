"""Settings: their base class, their reading from YAML, and the objects that they name."""

from customized_grpo.settings.base import Role, Settings, Spec, expectation

__all__ = ["Role", "Settings", "Spec", "expectation"]
