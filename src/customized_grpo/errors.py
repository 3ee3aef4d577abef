"""The errors this package raises on purpose."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: one sentence with what was seen, what was expected and what to do."""

    advice = ""
    """How to go on when it is mended, where something was under way."""
    shared = False
    """Whether all processes of the run raise it, so that one of them telling it is enough."""


class TrainingError(RuntimeError):
    """A guard stopped the run, because going on would have trained nothing or trained nonsense."""

    advice = ""
    shared = False


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the closest of `known`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""
