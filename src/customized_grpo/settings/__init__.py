"""Settings: their base class, their reading from YAML, and the objects that they name."""

from customized_grpo.settings.base import AtLeastOne, Role, Settings, Spec, expectation, make_spec, mistakes, sentence

__all__ = ["AtLeastOne", "Role", "Settings", "Spec", "expectation", "make_spec", "mistakes", "sentence"]
