"""Hostile bytes made from good ones: flips, cuts, splices, doubled and swapped lines, edited numbers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence

TOKENS = (
    b"\n", b"\n\n", b"\r\n", b"\0", b" ", b"\t", b"=", b"==", b"+", b"-", b"/", b"..", b"%2e", b'"', b"\\",
    b"\\u0000", b"{", b"}", b"[", b"]", b"[" * 300, b'{"a":' * 300, b",", b":", b"null", b"true", b"NaN",
    b"-0", b"1e999", b"0x10", "\u2014 ".encode(), "\u0660".encode(), "\u202e".encode(), b"\xff",
    b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"A" * 4096, b"\n" * 300, b"old 0\n", b"index 0\n",
    b"quorum none\n", b"PK\3\4", b"PK\5\6", b"AA==\n",
)  # fmt: skip
NUMBERS = (
    b"0", b"1", b"-1", b"00", b"+1", b"1_0", b"255", b"256", b"65536", b"2147483648", b"4294967296",
    b"9223372036854775807", b"9223372036854775808", b"18446744073709551616", b"9" * 400, b"1.0", b"1e5",
    "\u0661".encode(),
)  # fmt: skip
_DIGITS = re.compile(rb"[0-9]+")
_Step = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def _flip(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = int(draw.random() * len(data))
    return data[:at] + bytes([data[at] ^ 1 << draw.getrandbits(3)]) + data[at + 1 :]


def _byte(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = int(draw.random() * len(data))
    return data[:at] + bytes([draw.getrandbits(8)]) + data[at + 1 :]


def _span(draw: random.Random, data: bytes) -> tuple[int, int]:
    start = int(draw.random() * len(data))
    return start, start + 1 + int(draw.random() ** 3 * (len(data) - start))


def _drop(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, stop = _span(draw, data)
    return data[:start] + data[stop:]


def _double(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, stop = _span(draw, data)
    times = 2 if draw.random() < 0.9 else 120
    return data[:start] + data[start:stop] * times + data[stop:]


def _cut(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: int(draw.random() * len(data))]


def _insert(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = int(draw.random() * (len(data) + 1))
    return data[:at] + draw.choice(TOKENS) + data[at:]


def _splice(draw: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    other = draw.choice(seeds)
    return data[: int(draw.random() * len(data))] + other[int(draw.random() * (len(other) + 1)) :]


def _number(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    found = _DIGITS.search(data, int(draw.random() * len(data)))
    if found is None:
        return _flip(draw, data, ())
    if draw.random() < 0.5 and len(found[0]) < 19:
        new = b"%d" % (int(found[0]) + draw.choice((-1, 1, 255)))
    else:
        new = draw.choice(NUMBERS)
    return data[: found.start()] + new + data[found.end() :]


def _lines(draw: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    lines = data.split(b"\n")
    one, two = int(draw.random() * len(lines)), int(draw.random() * len(lines))
    kind = draw.random()
    if kind < 0.4:
        lines[one], lines[two] = lines[two], lines[one]
    elif kind < 0.7:
        lines.insert(one, lines[two])
    else:
        del lines[one]
    return b"\n".join(lines)


_STEPS: tuple[_Step, ...] = (
    _flip, _flip, _byte, _drop, _double, _cut, _insert, _insert, _splice, _number, _number, _lines,
)  # fmt: skip
MAX_BYTES = 1 << 17


def mutants(draw: random.Random, seeds: Sequence[bytes]) -> Iterator[bytes]:
    """Yield hostile inputs without end: one to four changes to a seed."""
    while True:
        data = draw.choice(seeds)
        for _ in range(1 + int(draw.random() ** 2 * 4)):
            if data:
                data = _STEPS[int(draw.random() * len(_STEPS))](draw, data, seeds)
        yield data[:MAX_BYTES]
