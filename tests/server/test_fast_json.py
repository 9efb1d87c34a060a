"""The quick parser gives the strict parser's value or its error, whatever it is given."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from audit.canonical import MAX_DEPTH, parse_strict
from audit.errors import MalformedJsonError
from server.fast_json import parse_request, write_json


def outcome(parse, data):
    """What comes of it, kinds and signs included: 1, 1.0 and True are three values, 0.0 and -0.0 two."""
    try:
        return repr(parse(data))
    except MalformedJsonError as error:
        return (type(error), str(error))


def same(data: bytes) -> None:
    assert outcome(parse_request, data) == outcome(lambda given: parse_strict(given, allow_floats=True), data)


HOSTILE = [
    b'{"a":1,"a":2}',
    b'{"a":1,"\\u0061":2}',
    b'{"a":{"b":1,"b":1}}',
    b'[{"a":1,"a":1}]',
    b'{"a":"x:y","b":1,"b":2}',
    b'{"":1,"":2}',
    b'{"a\\u003a":1,"a:":2}',
    b"NaN", b"[NaN]", b"Infinity", b"[-Infinity]", b"[1e999]", b"[-1e999]", b'{"a":1e400}', b"[1e-999]",
    b"[9007199254740991]", b"[9007199254740992]", b"[-9007199254740992]", b"[18446744073709551616]",
    b"[1e16]", b"[9007199254740992.0]", b"1" * 400, b"[" + b"9" * 30 + b"]", b"9007199254740993",
    b"-0", b"-0.0", b"[-0]", b"[0, -0.0, 1, 1.0]", b"1E2", b"[01]", b"[1.]", b"[.5]", b"[+1]", b"[0x1]",
    b'"\\ud800"', b'{"\\ud800":1}', b'"\\ud83d\\ude00"', b'"\xed\xa0\x80"', b'"\xff"', b"\xef\xbb\xbf{}",
    b'"\x00"', b'"\\u0000"', b'"\x1f"', b'"\t"', b"", b" ", b"{}", b"[]", b"{} x", b"[1,]", b'{"a":1,}',
    b"// c\n1", b"'a'", b"tru", b"true", b"[true, 1, false, 0]", b"null", b"[null]", b"\x0b1", b"\xc2\xa01",
    b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
    b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
    b"[" * 5000,
    b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH,
    b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1),
    b'["' + b"[{" * 40 + b'"]',
]  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: repr(data[:24]))
def test_hostile_bytes_get_the_strict_parsers_word(data):
    same(data)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES, st.booleans())
def test_any_value_is_read_alike(value, ascii_only):
    same(json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "a:", "\\u0061", ""]), VALUES), max_size=4))
def test_keys_given_twice_are_refused_however_they_are_written(pairs):
    body = ",".join(f'"{key}":{json.dumps(value)}' for key, value in pairs)
    same(f"[{{{body}}}]".encode())


@given(st.binary(max_size=40))
@example(b'{"a":1e5}')
def test_any_bytes_are_read_alike(data):
    same(data)


@given(st.integers(0, 2**64 - 1))
def test_every_double_is_read_bit_for_bit(bits):
    (number,) = struct.unpack("<d", struct.pack("<Q", bits))
    same(f"[{number!r}, 0.5]".encode())


def test_huge_body_is_left_to_the_strict_parsers_limit():
    same(b'"' + b"x" * (1 << 24) + b'"')


def test_what_is_written_reads_back_and_is_compact():
    value = {"a": [1, 2.5, "\u00e9\u2028", None, True], "b": ({"c": "\\"},)}
    data = write_json(value)
    assert parse_strict(data, allow_floats=True) == json.loads(json.dumps(value))
    assert b" " not in data.replace(b"\xe2\x80\xa8", b"")


def test_lone_surrogate_is_never_written():
    with pytest.raises(TypeError):
        write_json({"a": "\ud800"})
