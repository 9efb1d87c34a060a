"""JSON of requests and answers by orjson, where that reads the very value that the strict parser would.

`audit.canonical.parse_strict` is the rule: it refuses what two parsers could read differently. What
`parse_request` returns is its value, in a fraction of its time; where there is any doubt it is asked itself,
and its word, or its error, is what the caller gets. `write_json` writes what is to be sent, never what is
hashed or signed.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from audit.canonical import MAX_DEPTH, MAX_INTEGER, JsonValue, parse_strict
from audit.encoding import number_texts

_NUMBERS: Final = {float, int}
_LONG: Final = 1 << 20  # the strict parser has a limit, above this


def parse_request(data: bytes) -> JsonValue:
    """Return what `parse_strict(data, allow_floats=True)` does; errors as there."""
    # every array and object opens with a bracket, so that as few of them cannot nest deeper
    if len(data) <= _LONG and data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        try:
            value: JsonValue = orjson.loads(data)
        except ValueError:
            return parse_strict(data, allow_floats=True)
        # A key is followed by a colon. Where there are as many colons as keys in the value, no key was given
        # twice; a text that holds one makes them more, and then the strict parser looks.
        if _keys_of(value) == data.count(b":"):
            return value
    return parse_strict(data, allow_floats=True)


def write_json(value: Any) -> bytes:
    """Return compact UTF-8 JSON."""
    return orjson.dumps(value)


def texts_of(numbers: list[Any]) -> list[str]:
    """Return `audit.encoding.number_texts` of numbers, in a fraction of its time."""
    written = orjson.dumps(numbers)[1:-1] + b","
    if b"e" in written or b"-0.0," in written:
        return number_texts(numbers)
    return written.replace(b".0,", b",")[:-1].decode().split(",") if numbers else []


def _keys_of(value: Any) -> int:
    """How many keys the value's objects have; -1, which is no count of colons, where a number is in doubt."""
    count, left = 0, [value]
    for item in left:  # which grows by what is found inside
        kind = type(item)
        if kind is dict:
            count += len(item)
            left += item.values()
        elif kind is list:
            if item and set(map(type, item)) <= _NUMBERS:  # the common long list
                if not -MAX_INTEGER <= min(item) <= max(item) <= MAX_INTEGER:
                    return -1
            else:
                left += item
        elif (kind is int or kind is float) and not -MAX_INTEGER <= item <= MAX_INTEGER:
            return -1  # whole numbers beyond 2**53-1 are refused; orjson makes doubles of the largest
    return count
