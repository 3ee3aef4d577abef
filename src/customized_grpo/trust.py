"""Code, programs, addresses and files outside this package that a configuration names, and if the user trusts them.

Nothing that a configuration names is imported or constructed here.
"""

import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from customized_grpo.errors import UserError
from customized_grpo.rewards.client import is_loopback
from customized_grpo.settings import Spec
from customized_grpo.settings.build import exported
from customized_grpo.store import checksum


@dataclass(frozen=True)
class Item:
    """One thing that needs trust."""

    where: str
    """The setting, such as `rewards.judge.url`."""
    value: str
    """The value of the setting, with the file that an import would find first."""
    told: bool = True
    """Whether messages show it. Arguments of foreign code are part of what is trusted, but not shown."""


def walk(where: str, slot: str, spec: Spec) -> Iterator[tuple[str, str, Spec]]:
    """(setting, slot, spec) of a spec, and of the rewards named among its arguments at any depth."""
    yield where, slot, spec
    for name, value in spec.arguments.items():
        remote = name == "reward" and isinstance(value, str)  # RemoteReward takes a bare name too
        yield from _nested(f"{where}.{name}", {"use": value} if remote else value)


def _nested(where: str, value: Any) -> Iterator[tuple[str, str, Spec]]:
    if isinstance(value, Mapping):
        value = {str(key): part for key, part in value.items()}
        if "use" in value:
            yield from walk(where, "reward", Spec(**{**value, "use": str(value["use"])}))
        else:
            for key, part in value.items():
                yield from _nested(f"{where}.{key}", part)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _nested(f"{where}.{index}", part)


def items(specs: Iterable[tuple[str, str, Spec]]) -> frozenset[Item]:
    """All that needs trust in (setting, slot, spec) triples, such as `config.specs` gives.

    A name that the home module of its slot exports needs no trust, by whatever path it is named. Of its arguments, only
    those in `GUARDED` need trust. Any other name needs trust, together with all its arguments.
    """
    found: set[Item] = set()
    for where, slot, spec in (part for triple in specs for part in walk(*triple)):
        foreign = exported(spec.use, slot) is None
        if foreign:
            found.add(Item(f"{where}.use", _code(spec.use)))
        for name, value in spec.arguments.items():
            if foreign:
                found.add(Item(f"{where}.{name}", json.dumps(value, sort_keys=True, default=str), told=False))
            elif name in GUARDED and value and not (name == "url" and is_loopback(str(value))):
                found.add(Item(f"{where}.{name}", GUARDED[name](value)))
    return frozenset(found)


def _code(use: str) -> str:
    """The name, and the file it would be imported from, because it may be another module in another folder."""
    module = use.partition(":")[0].partition(".")[0]
    here = ([str(Path.cwd())], None) if module.isidentifier() else ()  # another interpreter may look here first
    found = [spec for path in here if (spec := PathFinder.find_spec(module, path))]
    places = [spec.origin or next(iter(spec.submodule_search_locations or ()), "") for spec in found]
    files = dict.fromkeys(str(Path(place).resolve()) for place in places)
    return f"{use} in {' or '.join(files)}" if files else use


def _path(value: Any) -> str:
    """The absolute path and, if it is a link, its target, because a relative path is another file in another folder."""
    try:
        path = Path(str(value)).expanduser().absolute()
        target = path.resolve()
    except (OSError, ValueError, RuntimeError):  # no path at all
        return str(value)
    return str(path) if path == target else f"{path} -> {target}"


GUARDED: dict[str, Callable[[Any], str]] = {
    "python": _path,
    "environment": lambda value: json.dumps(value, sort_keys=True, default=str),
    "url": str,
    "api_key_variable": str,
    "token_variable": str,
    "log": _path,
    "cache": _path,
    "encodings": _path,
    "config": _path,
    "checkpoint": _path,
}
"""Arguments of the package's own rewards that start a program or change how one runs, send pictures or a secret away,
write to a file, or are read by another package's loader."""


def require(
    source: str | Path,
    found: frozenset[Item],
    *,
    trust_code: bool = False,
    typed: Collection[str] = (),
    written: Callable[[], frozenset[Item]] | None = None,
) -> None:
    """Raise UserError unless this user trusts all that was found, and remember it.

    Args:
        source: the file, for the error.
        found: in the settings that are about to be used.
        trust_code: the user trusts the file now.
        typed: settings that the user gave by hand, which are trusted.
        written: what is found in the file alone; None if nothing was typed.

    Raises:
        UserError: naming what is not trusted.
    """
    asked = frozenset(item for item in found if not any(f"{item.where}.".startswith(f"{key}.") for key in typed))
    if asked:
        whole = written() if written else found
        if trust_code:
            remember(whole)
        elif not (asked <= whole and is_trusted(whole)):
            raise UserError(
                f"'{source}' names code, programs, files or addresses outside this package: {describe(asked)}; if you "
                f"trust whoever wrote that file, add --trust-code (in Python, trust_code=True)."
            )
    remember(found)


def require_file(
    file: str | Path,
    overrides: Sequence[str],
    load: Callable[[Sequence[str]], Iterable[tuple[str, str, Spec]]],
    *,
    trust_code: bool = False,
) -> None:
    """`require` for a file under overrides, which the user typed and so trusts.

    Args:
        file: of settings.
        overrides: such as `policy.path=FOLDER`.
        load: overrides to the (setting, slot, spec) triples of the file under them.
    """
    typed = [override.partition("=")[0].strip() for override in overrides]
    found = items(load(overrides))
    require(file, found, trust_code=trust_code, typed=typed, written=lambda: items(load([])))


def describe(found: Iterable[Item]) -> str:
    """The settings and what they name, in one line."""
    told = sorted((item.where, item.value) for item in found if item.told)
    return (
        ", ".join(f"{where} = {value!r}" for where, value in told) or "other arguments of code that you trusted before"
    )


def remember(found: frozenset[Item]) -> None:
    """Trust these items from now on. If this cannot be written, the next command asks again."""
    if not found or is_trusted(found):
        return
    try:
        file = _file()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
        with file.open("a", encoding="ascii") as handle:
            handle.write(f"{_digest(found)}\n")
    except (OSError, RuntimeError):
        return


def is_trusted(found: frozenset[Item]) -> bool:
    """Whether this user has trusted exactly these items before on this machine."""
    try:
        return _digest(found) in _file().read_text(encoding="ascii").split()
    except (OSError, RuntimeError, UnicodeDecodeError):
        return False


def _digest(found: frozenset[Item]) -> str:
    return checksum(sorted((item.where, item.value) for item in found))


def _file() -> Path:
    """The user's own list of digests, in the state folder of the platform."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        places = {"darwin": "Library/Application Support", "win32": "AppData/Local"}
        state = Path.home() / places.get(sys.platform, ".local/state")
    return state / "customized-grpo" / "trusted"
