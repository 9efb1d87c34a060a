"""JSON of requests and answers by orjson, where that reads the very value that the strict parser would.

`audit.canonical.parse_strict` is the rule: it refuses what two parsers could read differently. What
`parse_request` returns is its value, in a fraction of its time; where there is any doubt it is asked itself,
and its word, or its error, is what the caller gets. `write_json` writes what is to be sent, never what is
hashed or signed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import orjson

from audit.canonical import MAX_DEPTH, MAX_INTEGER, JsonValue, parse_strict
from audit.encoding import number_texts

_NUMBERS: Final = {float, int}
_LONG: Final = 1 << 20  # the strict parser has a limit, above this


def parse_request(data: bytes, check: Callable[[JsonValue], None] | None = None) -> JsonValue:
    """Return what `parse_strict(data, allow_floats=True)` does; errors as there.

    `check` is shown the value before anything else is done with it, and may refuse it by an error of its own:
    what is far too much need not be read strictly.
    """
    if len(data) <= _LONG:
        try:
            value: JsonValue = orjson.loads(data)
        except ValueError:
            value = None  # the strict parser says why
        else:
            if check is not None:
                check(value)
            # A key is followed by a colon. Where there are as many colons as keys in the value, no key was
            # given twice; a text that holds one makes them more, and then the strict parser looks.
            if _keys_of(value) == data.count(b":"):
                return value
    value = parse_strict(data, allow_floats=True)
    if check is not None:
        check(value)
    return value


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
    """How many keys the value's objects have; -1, which is no count of colons, where a number is in doubt, or
    whether it is nested too deep.
    """
    count, left, end, depth = 0, [value], 1, 0
    for place, item in enumerate(left):  # which grows by what is found inside
        if place == end:  # all before stood less deep
            end, depth = len(left), depth + 1
            if depth >= MAX_DEPTH:
                return -1
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
