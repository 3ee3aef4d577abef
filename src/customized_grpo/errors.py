"""The errors this package raises on purpose."""

import difflib
from collections.abc import Iterable, Iterator


def printable(text: str, encoding: str = "utf-8") -> str:
    """The text with escapes for control characters, other than line ends and tabs, and for what the encoding lacks.

    Texts from files and servers may hold escape sequences that a terminal obeys, marks that reverse the direction of
    writing, and halves of surrogate pairs, which cannot be encoded.
    """
    safe = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def is_text(word: str) -> bool:
    """Whether every character can be written to a file; halves of surrogate pairs cannot."""
    return not any("\ud800" <= c <= "\udfff" for c in word)


class UserError(ValueError):
    """An error that the user can fix: one sentence with what was seen, what was expected and what to do."""

    advice = ""
    """How to resume once it is fixed, if something was running."""
    shared = False
    """Whether all processes of the run raise it, so that only the first needs to print it."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(arg) if isinstance(arg, str) else arg for arg in args))


class TrainingError(RuntimeError):
    """A guard stopped the run, because it would have trained nothing or nonsense."""

    advice = ""
    shared = False


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the closest of `known`, or an empty string."""
    known = list(known)
    alike = [other for other in known if other.lower() == name.lower() and other != name]
    match = alike or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the errors that led to it, the last one first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
