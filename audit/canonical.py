"""RFC 8785 canonical JSON and the strict parser that pairs with it.

An entry is written once through `canonical_bytes`; afterwards the stored bytes are the truth and nobody
canonicalises again. `parse_strict` is for bytes of others, `parse_canonical` for bytes that we ourselves
promise to write. Entries use integers and strings only; floats exist here because RFC 8785 has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

from audit.errors import CanonicalError, MalformedJsonError, NotCanonicalError

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"

MAX_INTEGER = 2**53 - 1
MAX_DEPTH = 32
MAX_BYTES = 1 << 24  # that are parsed unless a caller says otherwise
_FLAT = {str, bool, type(None)}
_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _simple_writer() -> Callable[[Any], str]:
    """`_encoder.encode` without what it makes anew for each value, where the interpreter offers that."""
    try:
        made: Any = json.encoder.c_make_encoder(  # type: ignore[attr-defined] # typeshed knows it not
            None, _encoder.default, json.encoder.encode_basestring, None, ":", ",", True, False, False
        )
        made([""], 0)
    except (AttributeError, TypeError):
        return _encoder.encode
    return lambda value: "".join(made(value, 0))


_write_simple = _simple_writer()


def canonical_bytes(value: JsonValue) -> bytes:
    """Return the RFC 8785 form of `value` as UTF-8.

    Raises:
        CanonicalError: an integer beyond +-(2**53-1), NaN or infinity, a lone surrogate, a key that is not a
            string, a type JSON lacks, or nesting deeper than `MAX_DEPTH`.
    """
    try:
        if _is_simple(value, 0):
            # ASCII keys sort alike by code point and by UTF-16 unit; the escapes of `json` are RFC 8785's.
            return _write_simple(value).encode()
        parts: list[str] = []
        _write(value, parts, 0)
        return "".join(parts).encode()
    except UnicodeEncodeError as error:
        raise CanonicalError(f"a string holds a lone surrogate at position {error.start}") from error


def _is_simple(value: object, depth: int) -> bool:
    """Whether `json.dumps` gives the canonical form: no floats, ASCII keys, exact built-in types."""
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return True
    if kind is int:
        return -MAX_INTEGER <= value <= MAX_INTEGER  # type: ignore[operator]
    if depth >= MAX_DEPTH:
        return False
    if kind is dict:
        flat: Any = value  # texts by names: a row, as it is committed to
        if set(map(type, flat.values())) <= _FLAT and set(map(type, flat)) <= {str}:
            return "".join(flat).isascii()
        for key, item in value.items():  # type: ignore[attr-defined]
            if type(key) is not str or not key.isascii():
                return False
            if type(item) not in _FLAT and not _is_simple(item, depth + 1):
                return False
        return True
    if kind is list or kind is tuple:
        if set(map(type, value)) <= _FLAT:  # type: ignore[call-overload]  # names of hundreds of sites
            return True
        return all(_is_simple(item, depth + 1) for item in value)  # type: ignore[attr-defined]
    return False


def _write(value: object, parts: list[str], depth: int) -> None:
    if isinstance(value, str):
        parts.append(json.dumps(str(value), ensure_ascii=False))
    elif value is None or value is True or value is False:
        parts.append({None: "null", True: "true", False: "false"}[value])
    elif isinstance(value, int):
        if not -MAX_INTEGER <= value <= MAX_INTEGER:
            raise CanonicalError("an integer is beyond 2**53-1; carry it as a decimal string")
        parts.append(int.__repr__(value))
    elif isinstance(value, float):
        parts.append(format_number(value))
    elif depth >= MAX_DEPTH:
        raise CanonicalError(f"nesting is deeper than {MAX_DEPTH}")
    elif isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CanonicalError(f"object key {key!r} is not a string")
        parts.append("{")
        for position, key in enumerate(sorted(value, key=_utf16)):
            parts.append("," if position else "")
            _write(key, parts, depth)
            parts.append(":")
            _write(value[key], parts, depth + 1)
        parts.append("}")
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        parts.append("[")
        for position, item in enumerate(value):
            parts.append("," if position else "")
            _write(item, parts, depth + 1)
        parts.append("]")
    else:
        raise CanonicalError(f"a value of type {type(value).__name__} is not JSON")


def _utf16(key: str) -> bytes:
    return key.encode("utf-16-be")


def format_number(value: float) -> str:
    """Return ECMAScript's Number::toString of `value` (RFC 8785 section 3.2.2.3).

    Raises:
        CanonicalError: NaN or infinity.
    """
    if not math.isfinite(value):
        raise CanonicalError(f"{value!r} has no JSON form")
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    mantissa, _, exponent_text = float.__repr__(abs(value)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).rstrip("0")
    point = len(whole) + int(exponent_text or 0)
    stripped = digits.lstrip("0")
    point -= len(digits) - len(stripped)
    digits, count = stripped, len(stripped)
    if count <= point <= 21:
        return sign + digits + "0" * (point - count)
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    head = digits if count == 1 else f"{digits[0]}.{digits[1:]}"
    return f"{sign}{head}e{'+' if point > 0 else '-'}{abs(point - 1)}"


def parse_strict(data: bytes, *, allow_floats: bool = False, max_bytes: int = MAX_BYTES) -> JsonValue:
    """Parse UTF-8 JSON, refusing everything two parsers could read differently.

    Raises:
        MalformedJsonError: not UTF-8, not JSON, a duplicate key, NaN or infinity, a float unless allowed,
            an integer beyond +-(2**53-1), a lone surrogate, nesting deeper than `MAX_DEPTH`, or too long.
    """
    if len(data) > max_bytes:
        raise MalformedJsonError(f"JSON of {len(data)} bytes is over the cap of {max_bytes}")
    try:
        text = data.decode("utf-8")
        value: JsonValue = _decoders[allow_floats].decode(text)
    except UnicodeDecodeError as error:
        raise MalformedJsonError(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise MalformedJsonError(f"not JSON at character {error.pos}: {error.msg}") from error
    except RecursionError as error:
        raise MalformedJsonError(f"nesting is deeper than {MAX_DEPTH}") from error
    if b"\\u" in data or data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _check_depth_and_text(value, 0)
    return value


def parse_canonical(data: bytes, *, allow_floats: bool = False) -> JsonValue:
    """Parse bytes that must already be in canonical form.

    Raises:
        MalformedJsonError: as `parse_strict`.
        NotCanonicalError: the same value has other canonical bytes.
    """
    value = parse_strict(data, allow_floats=allow_floats)
    if canonical_bytes(value) != data:
        raise NotCanonicalError("the bytes are JSON, but not in RFC 8785 form")
    return value


def canonical_around(value: Mapping[str, JsonValue], name: str) -> tuple[bytes, bytes]:
    """Return what the RFC 8785 form of an object has before and after the value of member `name`."""
    own, form = _utf16(name), canonical_bytes(value)
    first = {key: item for key, item in value.items() if _utf16(key) < own}
    before = canonical_bytes(first)[:-1] + (b"," if first else b"") + canonical_bytes(name) + b":"
    return before, form[len(before) + len(canonical_bytes(value[name])) :]


class AlikeObjects:
    """Reads canonical objects that differ in one member as `parse_canonical` does, the rest of them once.

    An object's canonical form is that of its members in the order of their keys. So bytes that begin and end
    as those of the last object read, with the canonical form of one value in between, are the canonical form
    of that object with another value in that place. Whatever does not is read as a whole. What two results
    share is not to be changed. Thread-safe.
    """

    def __init__(self, name: str) -> None:
        """`name`: the member that differs."""
        self._name = name
        self._last: tuple[bytes, bytes, dict[str, JsonValue]] = (b"", b"", {})

    def parse(self, data: bytes) -> JsonValue:
        """Return what `parse_canonical(data)` returns; raises what it raises."""
        before, after, members = self._last
        end = len(data) - len(after)
        if (
            members
            and len(before) < end <= MAX_BYTES - len(after)
            and data.startswith(before)
            and data.endswith(after)
        ):
            middle = data[len(before) : end]
            if middle.count(b"[") + middle.count(b"{") < MAX_DEPTH:
                try:
                    return {**members, self._name: parse_canonical(middle)}
                except (MalformedJsonError, NotCanonicalError):
                    pass  # read as a whole, it may be another object; or the error names the right place
        value = parse_canonical(data)
        if type(value) is dict and self._name in value:
            self._last = (*canonical_around(value, self._name), value)
        return value


def _object_without_duplicates(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise MalformedJsonError(f"key {key!r} occurs twice in one object")
            seen.add(key)
    return found


def _parse_integer(text: str) -> int:
    if len(text) > 17 or not -MAX_INTEGER <= (number := int(text)) <= MAX_INTEGER:
        raise MalformedJsonError(f"integer {text[:24]} is beyond 2**53-1; carry it as a decimal string")
    return number


def _parse_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise MalformedJsonError(f"number {text[:24]} is beyond a double")
    return number


def _refuse_float(text: str) -> NoReturn:
    raise MalformedJsonError(f"number {text[:24]} is not an integer; carry it as a decimal string")


def _refuse_constant(text: str) -> NoReturn:
    raise MalformedJsonError(f"{text} is not JSON")


_decoders = {
    allow_floats: json.JSONDecoder(
        object_pairs_hook=_object_without_duplicates,
        parse_int=_parse_integer,
        parse_float=_parse_float if allow_floats else _refuse_float,
        parse_constant=_refuse_constant,
    )
    for allow_floats in (False, True)
}


def _check_depth_and_text(value: JsonValue, depth: int) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise MalformedJsonError("a string holds a lone surrogate") from error
    elif isinstance(value, (list, dict)):
        if depth >= MAX_DEPTH:
            raise MalformedJsonError(f"nesting is deeper than {MAX_DEPTH}")
        if isinstance(value, dict):
            for key in value:
                _check_depth_and_text(key, depth)
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth_and_text(item, depth + 1)
