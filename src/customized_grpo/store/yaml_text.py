"""YAML to plain data, restricted to what JSON can represent."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from customized_grpo.errors import UserError
from customized_grpo.store.files import read_text

MAX_DEPTH = 50
"""Deepest nesting. No setting needs ten levels."""
MAX_VALUES = 10_000
"""Most values in one text, because anchors that repeat each other could otherwise fill the memory."""
MAX_NUMBER = 2**63
SHORT_TAG = "tag:yaml.org,2002:"

SAID = {
    "<stream end>": "a bracket or a brace is not closed",
    "unexpected end of stream": "a quote is not closed",
    "mapping values are not allowed here": "a second ': ' follows in one line, or the line above has none; quote text "
    "that holds it, or begin another line",
    r"found character '\t'": "a line begins with a tab; indent it with spaces",
    "expected <block end>": "the indentation does not fit that of the lines above",
    "could not find expected ':'": "a line is not 'name: value'",
    "found undefined alias": "text that begins with * names an anchor, and there is none; quote the text",
    "another document": "a second document begins; keep one in a file",
    "'<document start>'": "text follows after the end; expected one mapping, such as 'name: value' in each line",
    "special characters are not allowed": "it holds a control character; remove it",
}
"""Messages of PyYAML, and what to tell the user instead."""


class _Resolver(yaml.resolver.BaseResolver):
    """Which plain scalars are not text. Dates are text, because JSON has none. 1e-3 is a number, unlike in YAML 1.1."""


for _first, _kinds in yaml.SafeLoader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _kinds:
        if _tag not in (f"{SHORT_TAG}timestamp", f"{SHORT_TAG}value"):
            _Resolver.add_implicit_resolver(_tag, _pattern, [_first])
_Resolver.add_implicit_resolver(
    f"{SHORT_TAG}float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Loader(_Resolver, yaml.SafeLoader):
    pass


class _Dumper(_Resolver, yaml.SafeDumper):
    pass


class _Refused(yaml.MarkedYAMLError):
    """YAML that is valid, but not accepted here."""


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file; errors as in `parse_yaml`, and if the file cannot be read."""
    return parse_yaml(read_text(Path(path)), f"'{path}'")


def parse_yaml(text: str, where: str) -> Any:
    """YAML to plain data. The names in mappings are text as written, and dates are text.

    Args:
        where: begins the sentence of the error.

    Raises:
        UserError: with the line, if it is not YAML; if it holds a tag such as !!set, a name twice, a name that is no
            text, an anchor within itself, a number that is not finite or too large, or half a surrogate pair; or if it
            is nested too deeply.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Reader(loader).value(node, ())
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        line = f", line {mark.line + 1}" if mark and "\n" in text.strip("\n") else ""
        raise UserError(f"{where}{line}: {_reason(error, text)}.") from error
    except RecursionError:
        raise UserError(f"{where}: it is nested too deeply; expected at most {MAX_DEPTH} levels.") from None


def dump_yaml(tree: Any) -> str:
    """Plain data as YAML, which `parse_yaml` reads back unchanged."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=100)


def missing_space(text: Any) -> str:
    """'; ...' if this is text such as 'use:name', in which a space is missing after the colon, or an empty string."""
    match = re.match(r"\s*(\w+):(\S+)", text) if isinstance(text, str) else None
    return f"; a space is missing after the colon, write '{match[1]}: {match[2]}'" if match else ""


def _reason(error: yaml.YAMLError, text: str) -> str:
    said = " ".join(str((isinstance(error, yaml.MarkedYAMLError) and error.problem) or error).split())
    if isinstance(error, _Refused):
        return said
    known = next((meaning for sign, meaning in SAID.items() if sign in said), said)
    faults = re.finditer(r"(?:^|[{,])[ -]*(\w+:[^\s:/]\S*)", text, re.MULTILINE)
    fault = next((match[1].rstrip(",}]") for match in faults), None)
    return f"invalid YAML: {known}{missing_space(fault)}"


class _Reader:
    """Converts nodes to values. A node to which several aliases refer is converted once for each."""

    def __init__(self, loader: _Loader) -> None:
        self.loader, self.count = loader, 0
        self.merged: set[yaml.Node] = set()
        self.scalars = {
            "null": lambda node: None,
            "bool": loader.construct_yaml_bool,
            "int": self._whole,
            "float": self._number,
            "str": self._text,
            "merge": self._text,
        }

    def value(self, node: yaml.Node, above: tuple[yaml.Node, ...]) -> Any:
        self.count += 1
        if node in above:
            raise _refused(node, "an anchor names what it is a part of; write the values out")
        if len(above) >= MAX_DEPTH:
            raise _refused(node, f"it is nested too deeply; expected at most {MAX_DEPTH} levels")
        if self.count > MAX_VALUES:
            raise _refused(node, f"its anchors stand for more than {MAX_VALUES:,} values; write them out")
        tag, above = node.tag.removeprefix(SHORT_TAG), (*above, node)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self._mapping(node, above)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.value(item, above) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and tag in self.scalars:
            return self.scalars[tag](node)
        shown = f"!!{tag}" if tag != node.tag else tag
        raise _refused(node, f"the tag {shown} is not read; write text, a number, a list or a mapping without it")

    def _mapping(self, node: yaml.MappingNode, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        if node not in self.merged:  # in which a name may come twice
            _check_names(node)
        self.merged.add(node)
        self.loader.flatten_mapping(node)  # what << names comes first, so that the mapping's own values count
        return {self._text(key): self.value(value, above) for key, value in node.value}

    def _text(self, node: yaml.ScalarNode) -> str:
        odd = next((c for c in node.value if c == "\0" or "\ud800" <= c <= "\udfff"), None)
        if odd is not None:
            raise _refused(node, f"text holds {odd!a}, which is no character; remove it")
        return node.value

    def _whole(self, node: yaml.ScalarNode) -> int:
        try:
            number = self.loader.construct_yaml_int(node)
        except ValueError:  # more digits than Python reads
            number = MAX_NUMBER
        if abs(number) >= MAX_NUMBER:
            raise _refused(node, f"{_short(node.value)} is too large; expected a number of at most 18 digits")
        return number

    def _number(self, node: yaml.ScalarNode) -> float:
        number = self.loader.construct_yaml_float(node)
        if not math.isfinite(number):
            raise _refused(node, f"{_short(node.value)} is not finite; expected a finite number")
        return number


def _check_names(node: yaml.MappingNode) -> None:
    names: set[str] = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            kind = "list" if isinstance(key, yaml.SequenceNode) else "mapping"
            raise _refused(key, f"a {kind} stands where a name is expected; write {{name: value}}")
        if key.style is None and value.tag == f"{SHORT_TAG}null" and value.value == "" and missing_space(key.value):
            raise _refused(key, f"'{key.value}' is read as one name{missing_space(key.value)}")
        if key.value in names:
            raise _refused(key, f"duplicate key '{key.value}', of which only one would count; remove one")
        names.add(key.value)


def _refused(node: yaml.Node, problem: str) -> _Refused:
    return _Refused(problem=problem, problem_mark=node.start_mark)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
