"""Many small files in one: what a round of hundreds of sites leaves, written once and synced once.

A pack is `<first line>\\n<bytes>`: the line is JSON, a list of [digest, size] in the order of the bytes
behind it. Its name is the SHA-256 of that line. A pack is written whole or not at all and never changed;
nothing in it is believed: whoever reads a blob compares its digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Final

from federation.errors import BlobMissingError

_MAX_LINE_BYTES: Final = 1 << 20


class Packs:
    """The packs of one folder; where what lies is learnt when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._read: set[str] = set()
        self._places: dict[str, tuple[str, int, int]] = {}  # digest -> pack, offset, size

    def put(self, items: Mapping[str, bytes], sync: Callable[[BinaryIO], None]) -> None:
        """Write one pack of `items`, by digest; `sync` makes it durable."""
        line = json.dumps([[digest, len(data)] for digest, data in items.items()], separators=(",", ":"))
        name = hashlib.sha256(line.encode()).hexdigest()
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f".{name}.{secrets.token_hex(4)}"
        try:
            with open(partial, "xb") as file:
                file.write(b"".join([line.encode(), b"\n", *items.values()]))
                sync(file)
            os.replace(partial, self._folder / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def get(self, digest: str) -> bytes:
        """Return what a pack holds under `digest`, unchecked.

        Raises:
            BlobMissingError: none holds it.
        """
        with self._lock:
            if digest not in self._places:
                self._look()
            place = self._places.get(digest)
        if place is None:
            raise BlobMissingError(digest)
        name, offset, size = place
        try:
            with open(self._folder / name, "rb") as file:
                file.seek(offset)
                return file.read(size)
        except FileNotFoundError as error:
            raise BlobMissingError(digest) from error

    def _look(self) -> None:
        """Read the first lines of packs that are new."""
        try:
            names = set(os.listdir(self._folder))
        except FileNotFoundError:
            return
        for name in sorted(names - self._read):
            if name.startswith("."):
                continue
            with open(self._folder / name, "rb") as file:
                line = file.readline(_MAX_LINE_BYTES)
            self._read.add(name)
            offset = len(line)
            for digest, size in _contents(line):
                self._places[digest] = (name, offset, size)
                offset += size


def _contents(line: bytes) -> list[tuple[str, int]]:
    """Return what a first line lists; nothing where it cannot be read: its blobs are missing then."""
    try:
        found = [(digest, size) for digest, size in json.loads(line)]
    except (ValueError, TypeError):
        return []
    is_list = all(type(digest) is str and type(size) is int and size >= 0 for digest, size in found)
    return found if is_list else []
