"""One reading only: whatever two YAML readers could read differently is refused with its line."""

from __future__ import annotations

import contextlib
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.errors import CharterFileError
from federation.strict_yaml import parse_yaml


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\na: 2\n", 2),
        ("a: {b: 1, b: 2}\n", 1),
        ("a: &x 1\nb: *x\n", 1),
        ("b: 1\na: *x\n", 2),
        ("a: !!str 1\n", 1),
        ("a: !python/object:os.system {}\n", 1),
        ("a:\n  <<: {b: 1}\n", 2),
        ("%YAML 1.1\n---\na: 1\n", 1),
        ("a: 1\n---\nb: 2\n", 2),
        ("a: .inf\n", 1),
        ("a: .nan\n", 1),
        ("a: 0777\n", 1),
        ("a: -01\n", 1),
        ("? [1, 2]\n: x\n", 1),
        ("a: [1, 2\n", 2),
        ("a: 'open\n", 2),
        ("\tx: 1\n", 1),
    ],
)
def test_ambiguous_yaml_is_refused_with_its_line(text, line):
    with pytest.raises(CharterFileError) as caught:
        parse_yaml(text, source="c.yaml")
    assert caught.value.line == line
    assert f"c.yaml:{line}" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "# only a comment\n", "a: " + "[" * 40 + "]" * 40, "x: " + "1" * 60, "a" * 2_000_000]
)
def test_empty_deep_or_huge_files_are_refused(text):
    with pytest.raises(CharterFileError):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("on", "on"),
        ("No", "No"),
        ("12:30:45", "12:30:45"),
        ("1_000", "1_000"),
        ("0x1F", "0x1F"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("~", None),
        ("'3'", "3"),
        ('"true"', "true"),
        ("7", 7),
        ("-7", -7),
        ("1e-5", Decimal("0.00001")),
        ("0.10", Decimal("0.1")),
        ("1E3", Decimal(1000)),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    found = parse_yaml(f"a: {text}\n").value
    assert found == {"a": value}
    assert type(found["a"]) is type(value)


def test_key_paths_keep_their_lines():
    document = parse_yaml("a: 1\nb:\n  - c: 2\n  - d: 3\n    e: 4\n")
    assert document.line_of(("b", 1, "e")) == 5
    assert document.line_of(("b", 0, "missing")) == 3
    assert document.line_of(("nothing",)) == 1


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused_on_purpose(text):
    with contextlib.suppress(CharterFileError):
        parse_yaml(text)
