"""The quick parser gives the strict parser's value or its error, whatever it is given."""

from __future__ import annotations

import json
import struct
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from audit.canonical import MAX_DEPTH, MAX_INTEGER, parse_strict
from audit.encoding import number_texts
from audit.errors import MalformedJsonError
from server.fast_json import parse_request, texts_of, write_json


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


def around(inner: bytes, depth: int, in_arrays: bool) -> bytes:
    before, after = (b"[", b"]") if in_arrays else (b'{"k":', b"}")
    return before * depth + inner + after * depth


@pytest.mark.parametrize("in_arrays", [True, False])
@pytest.mark.parametrize("depth", range(MAX_DEPTH + 2))
def test_keys_given_twice_are_found_at_every_depth(depth, in_arrays):
    for twice in (b'{"a":1,"a":1}', b'{"a":{"x":1,"y":2},"a":{}}', b'{"a":[],"b":0,"a":[{"c":":"}]}'):
        data = around(twice, depth, in_arrays)
        with pytest.raises(MalformedJsonError):
            parse_request(data)
        same(data)
    same(around(b'{"a":1,"b":":","c:":{"a":":::"}}', depth, in_arrays))


NESTED = st.recursive(
    st.sampled_from(
        ["1", '":"', '"\\u003a"', '"{\\"a\\":1}"', "0.5", "true", "[]", "{}", "9007199254740992"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(st.tuples(st.sampled_from(["a", "b", ":", "\\u0061", "a:b"]), inner), max_size=3).map(
            lambda pairs: "{" + ",".join(f'"{key}" :{value}' for key, value in pairs) + "}"
        )
    ),
    max_leaves=10,
)


@given(NESTED)
@example('{"a":{"a":1,"a":":"},"b":"::"}')
@example('[{"a":":"},{"a":1,"a":2}]')
def test_colons_in_texts_never_hide_a_key_given_twice(text):
    same(text.encode())


@pytest.mark.parametrize(
    "number", [MAX_INTEGER, MAX_INTEGER + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**19, 10**25]
)
@pytest.mark.parametrize(
    "text",
    ["{0}", "[{0}]", "[1,{0}]", "[0.5,{0}]", "[{0},0.5]", "[null,{0}]", "[true,{0}]", '["",[{0}]]',
     '{{"a":{0}}}', '[{{"a":[1.5,{0}]}},{0}]', "[{0}.0]", "[{0}.5]", "[{0}e0]", "[{0}E-1]",
     '{{"a":[],"b":{0}}}'],
)  # fmt: skip
def test_whole_number_is_in_bounds_or_refused_wherever_it_stands(number, text):
    same(text.format(number).encode())
    same(text.format(-number).encode())


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity", "nan", "inf", "-NaN", "1e309", "-1e309"])
def test_what_is_no_finite_number_is_refused_wherever_it_stands(name):
    for text in (name, f"[0.5,{name}]", f'{{"a":{name}}}', f'[{{"a":[{name}]}}]', f'[null,"{name}",{name}]'):
        same(text.encode())
        with pytest.raises(MalformedJsonError):
            parse_request(text.encode())


@given(
    st.from_regex(r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,4})?", fullmatch=True)
    | st.integers(1, 700).map(lambda zeros: f"1{'0' * zeros}e-{zeros}")
    | st.floats(allow_nan=False, allow_infinity=False).map(lambda number: format(Decimal(number), "f"))
)
@example("2.2250738585072011e-308")
@example("9007199254740993.0")
@example("0." + "0" * 400 + "1e400")
@example("-0e5")
def test_number_in_any_spelling_is_read_alike(text):
    same(f"[{text}]".encode())
    same(f'{{"a":{text}}}'.encode())


NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53)
EDGES = [
    0, 0.0, -0.0, 1, -1, 1.0, 10.0, -10.0, -100.0, 0.5, -0.5, 0.1, 1e-4, 1e-5, 1e-6, 1e-7, -1e-7, 9.999e-5,
    123e-7, 1e15, 1e16, 1e17, 1e20, 1e21, 1e22, 1e23, -1e22, 1.5e300, 5e-324, 1.7976931348623157e308,
    2.2250738585072014e-308, 2**53, -(2**53), 2.0**53, 9007199254740991.0, 9999999999999998.0,
    1234567890123456.8, 100.05, 0.30000000000000004, 1.05, 10.01, 20.0e1,
]  # fmt: skip


@given(st.lists(NUMBERS, max_size=12))
@example([])
@example(EDGES)
@example(EDGES[3:12])
def test_texts_of_numbers_are_the_canonical_ones(numbers):
    assert texts_of(numbers) == number_texts(numbers)


@pytest.mark.parametrize("number", EDGES, ids=repr)
def test_number_beside_any_other_has_its_own_text(number):
    for numbers in ([number], [number, 1.0], [1.0, number], [-10.0, number, 0.25], [number] * 3):
        assert texts_of(numbers) == number_texts(numbers)


@given(st.integers(0, 2**64 - 1))
def test_every_double_has_its_canonical_text(bits):
    (number,) = struct.unpack("<d", struct.pack("<Q", bits))
    if number - number == 0:
        assert texts_of([number, 2.0]) == number_texts([number, 2.0])


def test_number_of_every_size_has_its_canonical_text():
    for exponent in range(-330, 308):
        numbers = [
            float(f"{digits}e{exponent}") for digits in ("1", "-1", "1.5", "-9.87654321", "9.999999999999999")
        ]
        for number in numbers:
            assert texts_of([number]) == number_texts([number])
        assert texts_of(numbers) == number_texts(numbers)


def many(rows: int, inner: bytes = b'{"a":[1]}') -> bytes:
    return b"[" + b",".join([inner] * rows) + b"]"


@pytest.mark.parametrize(
    "data",
    [
        many(100), many(100, b'{"a":1,"a":1}'), many(100, b'{"a":":"}'), many(100, b"9007199254740993"),
        many(40, around(b"1", MAX_DEPTH - 1, True)), many(40, around(b"1", MAX_DEPTH, True)),
        many(40, around(b"", MAX_DEPTH - 1, True)), many(40, around(b"", MAX_DEPTH, True)),
        many(40, around(b"1", MAX_DEPTH - 1, False)), many(40, around(b"1", MAX_DEPTH, False)),
        many(99, b'["[{"]'), many(99, b'"\\ud800"'),
    ],
    ids=lambda data: repr(data[:24]),
)  # fmt: skip
def test_many_brackets_are_read_alike(data):
    same(data)


def test_what_is_refused_at_first_sight_is_read_no_further():
    class FirstSightError(Exception):
        pass

    def refuse(value):
        raise FirstSightError(len(value))

    for data in (many(3), many(3, b'{"a":1,"a":":"}'), b'"' + b"x" * (1 << 20) + b'"'):
        with pytest.raises(FirstSightError):
            parse_request(data, refuse)
    seen = []
    assert parse_request(b'[":", 1]', seen.append) == [":", 1]
    assert seen[-1] == [":", 1]
    with pytest.raises(MalformedJsonError):
        parse_request(b"[1,]", refuse)
