from pathlib import Path

import pytest

from customized_grpo.errors import UserError
from customized_grpo.store.yaml_text import MAX_DEPTH, dump_yaml, missing_space, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("{a: [1, -2.5, yes, null, text], b: {c: 'd'}}", {"a": [1, -2.5, True, None, "text"], "b": {"c": "d"}}),
        ("[1e-3, 1E3, 0x1f, 1_000]", [0.001, 1000.0, 31, 1000]),
        ("[2024-01-01, =, <<]", ["2024-01-01", "=", "<<"]),
        ("{1: a, yes: b, ~: c, 1.5: d, '': e}", {"1": "a", "yes": "b", "~": "c", "1.5": "d", "": "e"}),
        ("{a: &x {b: 1}, c: *x, d: [*x]}", {"a": {"b": 1}, "c": {"b": 1}, "d": [{"b": 1}]}),
        ("{a: &x {b: 1, c: 2}, d: {<<: *x, b: 3}}", {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}}),
        ("[&x {<<: {b: 1}, b: 2}, *x]", [{"b": 2}, {"b": 2}]),
        ("{url: http://host:80/v1, use: mine:reward, path: toyworld:clip}",
         {"url": "http://host:80/v1", "use": "mine:reward", "path": "toyworld:clip"}),
        ("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1), [[]]),
    ],
)  # fmt: skip
def test_plain_data_is_read(text: str, value: object) -> None:
    found = parse_yaml(text, "here")
    while value == [[]] and found != [[]]:
        (found,) = found
    assert found == value


def test_two_places_of_an_anchor_are_two_values() -> None:
    found = parse_yaml("{a: &x {b: 1}, c: *x}", "here")
    found["a"]["b"] = 2
    assert found["c"] == {"b": 1}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: !!set {b}", "here: the tag !!set is not read; write text, a number, a list or a mapping"),
        ("a: !!binary aGk=", "the tag !!binary is not read"),
        ("a: !!python/object/apply:os.getcwd []", "the tag !!python/object/apply:os.getcwd is not read"),
        ("a: !mine 5", "the tag !mine is not read"),
        ("b: 1\na: 1\nb: 2", "here, line 3: duplicate key 'b'"),
        ("{yes: 1, 'yes': 2}", "duplicate key 'yes'"),
        ("? [a]\n: 1", "a list stands where a name is expected"),
        ("{{a: 1}: 2}", "a mapping stands where a name is expected"),
        ("a: &a [*a]", "an anchor names what it is a part of"),
        ("&a {b: {c: *a}}", "an anchor names what it is a part of"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deeply; expected at most 50 levels"),
        ("[" * 3000 + "]" * 3000, "nested too deeply; expected at most 50 levels"),
        ("9" * 5000, "here: 9{37}... is too large; expected a number of at most 18 digits"),
        (str(2**63), "is too large"),
        ("a: .inf", ".inf is not finite"),
        ("a: .nan", ".nan is not finite"),
        ("a: 1e999", "1e999 is not finite"),
        ('a: "\\ud800"', r"text holds '\\ud800', which is no character"),
        ('"\\udfff": 1', r"text holds '\\udfff', which is no character"),
        ('a: "\\0"', r"text holds '\\x00', which is no character"),
        ("a: \x07", "it holds a control character"),
        ("a: [1", "a bracket or a brace is not closed"),
        ("a: '", "a quote is not closed"),
        ("a:\n\tb: 1", "line 2: invalid YAML: a line begins with a tab"),
        ("a: *b", "names an anchor, and there is none"),
        ("a: 1\n---\nb: 2", "a second document begins"),
        ("a:\n  b: 1\n c: 2", "the indentation does not fit"),
        ("{<<: 5}", "expected a mapping or list of mappings for merging"),
    ],
)
def test_what_is_not_plain_data_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        parse_yaml(text, "here")
    assert str(caught.value).startswith("here")
    assert "\n" not in str(caught.value)


def test_anchors_that_repeat_each_other_do_not_fill_the_memory() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    with pytest.raises(UserError, match="its anchors stand for more than 10,000 values"):
        parse_yaml("\n".join(lines), "here")


@pytest.mark.parametrize(
    ("text", "seen", "meant"),
    [
        ("{use:x}", "use:x", "use: x"),
        ("{use: x, path:toyworld:clip}", "path:toyworld:clip", "path: toyworld:clip"),
        ("a: 1\nb: {\n  use:x\n}", "use:x", "use: x"),
    ],
)
def test_a_missing_space_is_named(text: str, seen: str, meant: str) -> None:
    told = f"'{seen}' is read as one name; a space is missing after the colon, write '{meant}'"
    with pytest.raises(UserError, match=told):
        parse_yaml(text, "here")


def test_a_missing_space_that_breaks_the_rest_is_named() -> None:
    with pytest.raises(UserError, match=r"invalid YAML: .*; a space is missing after the colon, write 'seed: 5'"):
        parse_yaml("seed:5\ntraining: {iterations: 2}", "here")
    with pytest.raises(UserError, match=r"not closed.$"):
        parse_yaml("{path: toyworld:clip, url: http://host", "here")


@pytest.mark.parametrize("text", ["toyworld", "", None, 5, "a: b", "http: //x"])
def test_other_values_miss_no_space(text: object) -> None:
    assert missing_space(text) == ""


@pytest.mark.parametrize(
    "text", ["1e3", "1e-3", "2024-01-01", "yes", "~", "<<", "=", "", ".inf", "é\U0001f600", "a: b"]
)
def test_what_is_written_reads_back_as_it_is(text: str) -> None:
    assert parse_yaml(dump_yaml({text: [text, 1, 0.5, None, True]}), "here") == {text: [text, 1, 0.5, None, True]}


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\nb: [")
    with pytest.raises(UserError, match=r"a.yaml', line 2: invalid YAML"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_bytes("a: é".encode("utf-16"))
    assert read_yaml(tmp_path / "a.yaml") == {"a": "é"}
