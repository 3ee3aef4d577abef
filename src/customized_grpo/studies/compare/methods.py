"""The methods by name: each is a piece of configuration, and a grid's YAML can define more."""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import Field

from customized_grpo.errors import UserError, nearest
from customized_grpo.settings import Settings
from customized_grpo.store.yaml_text import parse_yaml

BASE = "base"
"""The method that trains nothing."""


class Method(Settings):
    """A method: what it changes in a configuration, and how reports call it."""

    title: str = ""
    """For tables and plots; empty takes the name."""
    about: str = ""
    """One or two sentences."""
    config: dict[str, Any] = Field(default={})
    """Goes on top of the grid's configuration; a mapping with `use` replaces what was there."""


@cache
def known_methods() -> dict[str, Method]:
    """The methods of methods.yaml, in its order."""
    text = files("customized_grpo.studies.compare").joinpath("methods.yaml").read_text(encoding="utf-8")
    return {name: Method(**{"title": name, **content}) for name, content in parse_yaml(text, "methods.yaml").items()}


def find_method(name: str, own: Mapping[str, Method]) -> Method:
    """A method by name. One of the user's with a known name changes the known one.

    Raises:
        UserError: if there is none, with the nearest name.
    """
    known = known_methods()
    if name not in known and name not in own:
        raise UserError(
            f"There is no method '{name}'.{nearest(name, [*known, *own])} Known are {', '.join([*known, *own])}; "
            f"define your own under own_methods."
        )
    before, mine = known.get(name, Method(title=name)), own.get(name, Method())
    return Method(
        title=mine.title or before.title, about=mine.about or before.about, config=merged(before.config, mine.config)
    )


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` on top of `below`, section by section; a name or a mapping with `use` replaces what is below it."""
    result = {**below, **above}
    for key, value in above.items():
        under = below.get(key)
        if isinstance(value, Mapping) and isinstance(under, Mapping) and "use" not in value:
            result[key] = merged(under, value)
    return result
