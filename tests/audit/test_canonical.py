from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from audit.canonical import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_INTEGER,
    AlikeObjects,
    canonical_around,
    canonical_bytes,
    format_number,
    parse_canonical,
    parse_strict,
)
from audit.errors import AuditError, CanonicalError, MalformedJsonError, NotCanonicalError
from tests.soak_report import Report

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-MAX_INTEGER, MAX_INTEGER),
    TEXT,
    st.floats(allow_nan=False, allow_infinity=False),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(TEXT, inner, max_size=5)),
    max_leaves=20,
)
NARROW = st.recursive(
    st.one_of(st.integers(-MAX_INTEGER, MAX_INTEGER), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=15,
)


@pytest.mark.reported
def test_rfc8785_vectors_canonicalise_to_their_bytes(shared_vectors: Path, report: Report) -> None:
    names = sorted(path.stem for path in (shared_vectors / "jcs/input").iterdir())
    assert names == ["arrays", "french", "structures", "unicode", "values", "weird"]
    for name in names:
        value = parse_strict((shared_vectors / "jcs/input" / f"{name}.json").read_bytes(), allow_floats=True)
        expected = bytes.fromhex((shared_vectors / "jcs/outhex" / f"{name}.txt").read_text())
        assert canonical_bytes(value) == expected, name
    report("vectors", size="6 canonical JSON documents (RFC 8785)", result="6 to the byte")


@given(VALUES)
def test_canonical_form_is_the_oracles(value: object) -> None:
    assert canonical_bytes(value) == rfc8785.dumps(value)  # type: ignore[arg-type]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_number_reads_back_as_itself_and_is_the_oracles(value: float) -> None:
    assert float(format_number(value)) == value
    assert format_number(value).encode() == rfc8785.dumps(value)


@given(NARROW)
def test_canonical_bytes_parse_back_to_the_value(value: object) -> None:
    data = canonical_bytes(value)  # type: ignore[arg-type]
    assert parse_canonical(data) == value


@given(st.binary(max_size=60))
def test_parsing_arbitrary_bytes_raises_the_declared_error_only(data: bytes) -> None:
    try:
        value = parse_strict(data)
    except MalformedJsonError:
        return
    assert parse_canonical(canonical_bytes(value)) == value


@pytest.mark.parametrize(
    "value",
    [
        MAX_INTEGER + 1,
        -MAX_INTEGER - 1,
        math.nan,
        math.inf,
        -math.inf,
        "\ud800",
        {"\udfff": 1},
        {1: "a"},
        {None: "a"},
        b"bytes",
        {"a": {1, 2}},
        object(),
        [1, [2, math.nan]],
    ],
)
def test_value_without_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(CanonicalError):
        canonical_bytes(value)  # type: ignore[arg-type]


def test_nesting_is_capped_alike_by_writer_and_parser() -> None:
    good: object = 1
    for _ in range(MAX_DEPTH):
        good = [good]
    assert parse_canonical(canonical_bytes(good)) == good  # type: ignore[arg-type]
    with pytest.raises(CanonicalError):
        canonical_bytes([good])  # type: ignore[list-item]
    for depth in (MAX_DEPTH + 1, 500, 100_000):
        with pytest.raises(MalformedJsonError):
            parse_strict(b"[" * depth + b"]" * depth)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"a":1,"a":1}',
        b'{"a":1,"\\u0061":2}',
        b'{"a":{"b":1,"b":2}}',
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1.0",
        b"1e3",
        b"9007199254740992",
        b"-9007199254740992",
        b"1" * 5000,
        b'"\\ud800"',
        b'{"\\udc00":1}',
        b'"\xff"',
        b"\xef\xbb\xbf{}",
        b"{} {}",
        b"[1,]",
        b"'a'",
        b"01",
        b'"\x01"',
    ],
)
def test_ambiguous_json_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedJsonError):
        parse_strict(data)


@pytest.mark.parametrize(
    "data",
    [b' {"a":1}', b'{"a": 1}', b'{"b":1,"a":2}', b'"\\u0061"', b'"\\/"', b"-0", b"[1]\n", b'"\\u000a"'],
)
def test_other_spelling_of_a_value_is_not_canonical(data: bytes) -> None:
    parse_strict(data)
    with pytest.raises(NotCanonicalError) as caught:
        parse_canonical(data)
    assert caught.value.code == "audit.not_canonical"


def test_floats_beyond_a_double_are_refused() -> None:
    with pytest.raises(MalformedJsonError):
        parse_strict(b"1e400", allow_floats=True)


def test_keys_sort_by_utf16_units_not_code_points() -> None:
    assert canonical_bytes({"\U0001f600": 1, "\ue000": 2}) == '{"\U0001f600":1,"\ue000":2}'.encode()


def test_size_cap_is_enforced() -> None:
    with pytest.raises(AuditError, match="over the cap"):
        parse_strict(b'"aaaaaaaaaa"', max_bytes=8)


def same_outcome(reader: AlikeObjects, data: bytes) -> None:
    """A reader says of any bytes exactly what `parse_canonical` says."""
    try:
        expected = parse_canonical(data)
    except AuditError as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            reader.parse(data)
    else:
        found = reader.parse(data)
        assert canonical_bytes(found) == data
        assert found == expected


@given(
    st.dictionaries(TEXT, NARROW, max_size=4),
    st.lists(st.tuples(NARROW, st.binary(max_size=3), st.integers(0, 60)), min_size=1, max_size=6),
)
def test_objects_alike_are_read_as_each_alone(
    shared: dict[str, object], others: list[tuple[object, bytes, int]]
) -> None:
    reader = AlikeObjects("own")
    for own, damage, place in others:
        data = canonical_bytes({**shared, "own": own})
        same_outcome(reader, data)
        same_outcome(reader, data[:place] + damage + data[place + len(damage) :])


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"own":2,"z":3}',  # as the first, again
        b'{"a":1,"own":2,"b":5,"z":3}',  # another member, in the wrong place
        b'{"a":1,"own":2,"own":4,"z":3}',
        b'{"a":1,"own":,"z":3}',
        b'{"a":1,"own": 2,"z":3}',
        b'{"a":1,"own":"\\u0041","z":3}',
        b'{"a":1,"own":{"own":2,"z":3},"z":3}',
        b'{"a":1,"own":2},{"own":2,"z":3}',
        b'{"a":1,"own":2,"z":4}',
        b'{"a":1,"own":\xff,"z":3}',
        b'{"a":1,"own":1.5,"z":3}',
        b'{"a":1,"own":"x","y":"q","z":3}',  # canonical, and another object
        b'{"a":1,"own":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b',"z":3}',
        b'{"a":1,"own":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b',"z":3}',
        b'{"a":1,"own":"' + b"x" * MAX_BYTES + b'","z":3}',
        b'{"a":1,"own":',
        b',"z":3}',
        b"",
    ],
    ids=lambda data: repr(data[:30]),
)
def test_a_reader_of_alike_objects_takes_nothing_for_granted(data: bytes) -> None:
    reader = AlikeObjects("own")
    assert reader.parse(b'{"a":1,"own":"first","z":3}') == {"a": 1, "own": "first", "z": 3}
    same_outcome(reader, data)
    same_outcome(reader, b'{"a":1,"own":null,"z":3}')


@given(st.dictionaries(TEXT, VALUES, max_size=5), TEXT, VALUES, VALUES)
def test_what_is_around_a_member_is_the_same_for_any_value_of_it(value, name, told, other) -> None:
    before, after = canonical_around({**value, name: told}, name)
    assert before + canonical_bytes(other) + after == canonical_bytes({**value, name: other})
