"""Which mutants there are: mutmut's operators and a few of ours, applied to every function of the update's modules.

mutmut itself leaves out functions with a decorator, which are the rollout and the evaluation, and cannot be told which
tests belong to which file; so its operators are taken and not its runner.
"""

import contextlib
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import libcst as cst
import libcst.matchers as m
import yaml
from libcst.metadata import MetadataWrapper, WhitespaceInclusivePositionProvider
from mutmut.mutation import mutators

ROOT = Path(__file__).parents[2]
PACKAGE = Path("src/customized_grpo")
FILES = [
    *sorted(f"functional/{path.name}" for path in (ROOT / PACKAGE / "functional").glob("[!_]*.py")),
    *(f"train/{name}.py" for name in ("rollout", "trajectory", "method", "update", "evaluation", "checkpoint")),
    *(f"train/objectives/{name}.py" for name in ("grpo", "forward")),
    "randomness.py",
]
FAULT = "fault: "
AT_LEAST = 20
"""Mutants of a file in the sample, however small its share; all of them where there are fewer."""


class Mutant(NamedTuple):
    """One change of one file."""

    key: str
    """The file, the function, and the changed lines before and after."""
    file: str
    """Below the package."""
    code: str
    """The whole file."""


OPPOSITES = [kind() for kind in (m.Equal, m.NotEqual, m.Is, m.IsNot, m.In, m.NotIn)]


def negate(test: cst.BaseExpression) -> Iterator[cst.CSTNode]:
    """Unless an operator of mutmut's does: where the test is `not x`, or one of ==, !=, is, in."""
    has_opposite = m.Comparison(comparisons=[m.ComparisonTarget(m.OneOf(*OPPOSITES))])
    if not m.matches(test, m.UnaryOperation(m.Not()) | has_opposite):
        inside = test.with_changes(lpar=[*test.lpar, cst.LeftParen()], rpar=[*test.rpar, cst.RightParen()])
        yield cst.UnaryOperation(cst.Not(), inside)


def drop_arguments(node: cst.Call) -> Iterator[cst.CSTNode]:
    """Without its None in place of an argument, which mostly raises: whatever test passes there would kill it."""
    for changed in mutators.operator_arg_removal(node):
        if len(cst.ensure_type(changed, cst.Call).args) < len(node.args):
            yield changed


def swap_arguments(node: cst.Call) -> Iterator[cst.CSTNode]:
    if m.matches(node.func, m.Name("min") | m.Name("max") | m.Attribute(attr=m.Name("minimum") | m.Name("maximum"))):
        return  # the order does not matter there
    for i, (a, b) in enumerate(itertools.pairwise(node.args)):
        if not (a.keyword or b.keyword or a.star or b.star):
            swapped = [a.with_changes(value=b.value), b.with_changes(value=a.value)]
            yield node.with_changes(args=[*node.args[:i], *swapped, *node.args[i + 2 :]])


OPERATORS: list[tuple[type, Callable[..., Iterable[cst.CSTNode]]]] = [
    (cst.BaseNumber, mutators.operator_number),
    (cst.CSTNode, mutators.operator_swap_op),
    (cst.AugAssign, mutators.operator_augmented_assignment),
    (cst.UnaryOperation, mutators.operator_remove_unary_ops),
    (cst.Name, mutators.operator_name),
    (cst.CSTNode, mutators.operator_keywords),
    (cst.IfExp, mutators.operator_if_exp),
    (cst.Call, drop_arguments),
    (cst.Call, swap_arguments),
    (cst.Expr, lambda node: [cst.Pass()] if isinstance(node.value, cst.Call) else []),
]
UNTOUCHED = (cst.Annotation, cst.Decorator, cst.BaseString, cst.Raise, cst.Assert)
"""Types and messages."""


class Finder(cst.CSTVisitor):
    """Every change inside of functions, their defaults included: (function, node, what takes its place)."""

    def __init__(self) -> None:
        self.path: list[str] = []
        self.depth = 0
        self.found: list[tuple[str, cst.CSTNode, cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.path.append(node.name.value)
            self.depth += isinstance(node, cst.FunctionDef)
        elif self.depth and not isinstance(node, UNTOUCHED):
            for kind, operator in OPERATORS:
                if isinstance(node, kind):
                    self.found += [(".".join(self.path), node, changed) for changed in operator(node)]
            if isinstance(node, cst.If | cst.While | cst.CompIf):
                self.found += [(".".join(self.path), node.test, changed) for changed in negate(node.test)]
            elif isinstance(node, cst.For):
                self.found.append((".".join(self.path), node.iter, cst.parse_expression("()")))
        return not isinstance(node, UNTOUCHED)

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.FunctionDef | cst.ClassDef):
            self.path.pop()
            self.depth -= isinstance(original_node, cst.FunctionDef)


def mutants(file: str) -> list[Mutant]:
    """All mutants of a file, in the order of the source."""
    source = (ROOT / PACKAGE / file).read_text(encoding="utf-8")
    wrapper, finder = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True), Finder()
    wrapper.module.visit(finder)
    spans = wrapper.resolve(WhitespaceInclusivePositionProvider)
    lines = source.splitlines(keepends=True)
    offsets = list(itertools.accumulate(map(len, lines), initial=0))
    found: dict[str, Mutant] = {}
    for function, node, changed in finder.found:
        start, end = (offsets[at.line - 1] + at.column for at in (spans[node].start, spans[node].end))
        code = source[:start] + wrapper.module.code_for_node(changed) + source[end:]
        with contextlib.suppress(SyntaxError):
            compile(code, file, "exec")
            if code != source:
                found.setdefault(code, Mutant(f"{file} {function}: {difference(source, code)}", file, code))
    return list(found.values())


def difference(old: str, new: str) -> str:
    """The lines that differ as `before -> after`, with a number if the file has the first of them more than once."""
    a, b = ([line.strip() for line in text.splitlines()] for text in (old, new))
    most = min(len(a), len(b))
    first = next(i for i in range(most) if a[i] != b[i])
    last = next(i for i in range(most) if a[-1 - i] != b[-1 - i] or i == most - first - 1)
    number = f" (#{a[:first].count(a[first]) + 1})" if a.count(a[first]) > 1 else ""
    return f"{' '.join(a[first : len(a) - last])} -> {' '.join(b[first : len(b) - last])}{number}"


def sample(size: int, seed: int, only: str) -> list[Mutant]:
    """Of every file a share in proportion, but `AT_LEAST` of a small one; size 0 takes all."""
    everything = {file: mutants(file) for file in FILES}
    total = sum(map(len, everything.values()))
    chosen: list[Mutant] = []
    for file, found in everything.items():
        count = min(len(found), max(AT_LEAST, round(size * len(found) / total))) if size else len(found)
        if only in file:
            chosen += random.Random(f"{seed} {file}").sample(found, count)
    return chosen


def faults(only: str) -> list[Mutant]:
    """The faults made by hand. Ends the program where the source no longer has the text of one."""
    made: list[Mutant] = []
    for fault in yaml.safe_load((Path(__file__).parent / "faults.yaml").read_text(encoding="utf-8")):
        source = (ROOT / PACKAGE / fault["file"]).read_text(encoding="utf-8")
        if source.count(fault["old"]) != 1:
            sys.exit(f"faults.yaml: the text of '{fault['name']}' is not once in {fault['file']}; bring it up to date.")
        if only in fault["file"]:
            made.append(Mutant(FAULT + fault["name"], fault["file"], source.replace(fault["old"], fault["new"])))
    return made
