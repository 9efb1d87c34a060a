"""A log's SQLite file read with the standard library alone: every leaf's bytes, and the notes beside them.

Nothing in the file is believed: indices must be consecutive, hashes are computed from the bytes, and a
checkpoint counts only for the root that these leaves give. Columns and tree nodes are not looked at; that
is what `audit.fsck` is for.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from audit.checkpoints import parse_checkpoint_note
from audit.entries import Entry, decode_entry
from audit.errors import AuditError
from audit.merkle import EMPTY_ROOT, CompactRange, hash_leaf

MAX_ENTRIES = 5_000_000


class LogFileError(AuditError):
    """The file is no log, or contradicts itself."""

    code = "log.unreadable"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One entry of a log file, decoded from its bytes."""

    index: int
    leaf_hash: str
    entry: Entry


class LogFile:
    """One log file. Reading it twice reads the same snapshot only if nobody writes to it."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            with closing(self._connect()) as connection:
                (self.origin,) = connection.execute("SELECT origin FROM head").fetchone()
                stored = connection.execute("SELECT note FROM checkpoint ORDER BY tree_size DESC").fetchall()
        except (sqlite3.Error, TypeError) as error:
            raise LogFileError(f"{self.path.name}: is no log of this release: {error}") from error
        self.notes: tuple[bytes, ...] = tuple(bytes(note) for (note,) in stored)
        """Every checkpoint, the largest tree's first."""
        self.roots: dict[int, bytes] = {0: EMPTY_ROOT}

    def entries(self) -> Iterator[FileEntry]:
        """Yield every entry in order, and fill `roots` for the size of every checkpoint on the way.

        Raises:
            LogFileError: an entry is missing or is none; names its index.
        """
        wanted = set()
        for note in self.notes:
            try:
                wanted.add(parse_checkpoint_note(note).tree_size)
            except AuditError as error:
                raise LogFileError(f"{self.path.name}: holds a malformed checkpoint: {error}") from error
        edge = CompactRange()
        try:
            with closing(self._connect()) as connection:
                rows = connection.execute("SELECT idx, body FROM leaf ORDER BY idx")
                for expected, (index, body) in enumerate(rows):
                    if index != expected or not isinstance(body, bytes) or expected >= MAX_ENTRIES:
                        raise LogFileError(f"{self.path.name}: entry {expected} is missing or no bytes")
                    leaf_hash = hash_leaf(body)
                    edge.append(leaf_hash)
                    if edge.size in wanted:
                        self.roots[edge.size] = edge.root()
                    try:
                        entry = decode_entry(body)
                    except AuditError as error:
                        raise LogFileError(f"{self.path.name}: entry {index}: {error}") from error
                    yield FileEntry(index, leaf_hash.hex(), entry)
        except sqlite3.Error as error:
            raise LogFileError(f"{self.path.name}: cannot be read: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True)
