"""Looks for what must not be there in every byte below a folder, in whatever form it might have been written.

A needle is text or bytes; numbers are given in the forms that files and logs hold them in. Hex and base64 of
each form are looked for too, base64 in its three alignments.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MIN_BYTES = 6  # shorter needles would be found by chance


@dataclass(frozen=True, slots=True)
class Hit:
    file: str
    offset: int
    what: str


def text_forms(text: str) -> Iterator[bytes]:
    for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
        yield text.encode(encoding)


def number_forms(value: float) -> Iterator[bytes]:
    """Return a number's bytes as float64, float32 and, where it is whole, int64, in both byte orders."""
    for order in "<>":
        yield struct.pack(f"{order}d", value)
        if float(value).is_integer():
            yield struct.pack(f"{order}q", int(value))
    if float(value).is_integer() and abs(value) >= 10**9:
        yield str(int(value)).encode()


def vector_forms(values: Sequence[float]) -> Iterator[bytes]:
    """Return a whole vector's bytes as float64, float32, int64 and int32, in both byte orders."""
    whole = all(float(value).is_integer() for value in values)
    for order in "<>":
        yield struct.pack(f"{order}{len(values)}d", *values)
        yield struct.pack(f"{order}{len(values)}f", *values)
        if whole:
            yield struct.pack(f"{order}{len(values)}q", *map(int, values))
        if whole and all(abs(value) < 1 << 31 for value in values):
            yield struct.pack(f"{order}{len(values)}i", *map(int, values))


def armoured(form: bytes) -> Iterator[bytes]:
    """Return the form itself, in hex, and in base64 wherever it may begin in what was encoded."""
    yield form
    if len(form) < 2 * MIN_BYTES:  # six characters of base64 are found by chance
        yield from (form.hex().encode(), form.hex().upper().encode())
        return
    yield from (form.hex().encode(), form.hex().upper().encode())
    for lead in range(3):
        encoded = base64.b64encode(b"\0" * lead + form)
        yield encoded[4 if lead else 0 : len(encoded) - 4]


def halves(raw: bytes) -> tuple[bytes, ...]:
    """Return both halves of what is long enough for chance to find neither; of the rest the whole.

    A database cuts what it writes where a page ends and puts a header in between: one key in a hundred stands
    in PostgreSQL's write-ahead log in two pieces, and then one of its halves is whole.
    """
    middle = len(raw) // 2
    return (raw[:middle], raw[middle:]) if middle >= 4 * MIN_BYTES else (raw,)


def scan(folders: Iterable[Path], needles: Iterable[tuple[str, bytes]]) -> list[Hit]:
    """Return where any needle, or a half of it, stands in a file's bytes, its name included."""
    wanted = [
        (what, form)
        for what, raw in needles
        for half in halves(raw)
        for form in armoured(half)
        if len(form) >= MIN_BYTES
    ]
    hits = []
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            data = str(path).encode() + b"\0" + path.read_bytes()
            for what, form in wanted:
                at = data.find(form)
                if at >= 0:
                    hits.append(Hit(str(path), at, what))
    return hits


def size_of(folders: Iterable[Path]) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
