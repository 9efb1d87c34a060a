"""A SQLite file as the examination reads it: raw values, SQLite's own check, and its record of the schema."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

from sqlalchemy import create_engine

from audit import _store
from audit._fsck_rows import HEAD_ROWS, NODE_ROWS, NOTE_ROWS, REVISION_ROWS, FoundError, Text, leaf_rows
from audit.tables import APPLICATION_ID, LedgerTable

_SINCE_2: Final = (b"lease", b"ledger_migration")  # tables that a log of the first release lacks

_Schema = dict[bytes, tuple[object, ...]]


@contextmanager
def examining_file(path: Path) -> Iterator[FileRows]:
    """Open one snapshot of the file, whatever writers do meanwhile.

    Raises:
        FoundError: inside the block too, when SQLite cannot read on.
    """
    try:
        connection = _store.connect(path, mode="ro")
    except sqlite3.Error as error:
        raise FoundError("unreadable", "", str(error)) from error
    try:
        connection.text_factory = Text
        connection.execute("BEGIN")
        yield FileRows(connection)
    except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
        raise FoundError("unreadable", "", str(error)) from error
    finally:
        connection.close()


class FileRows:
    """`LogRows` of a file."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def check_schema(self) -> None:
        if self._connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise FoundError("schema", "file header", "the file is not an Affidavit log")
        found, expected = _schema_of(self._connection), _expected_schema()
        if _is_first_release(self._connection, found):
            expected = {name: rest for name, rest in expected.items() if rest[1] not in _SINCE_2}
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                where = name.decode(errors="replace")
                raise FoundError("schema", where, "is not as this release defines it")

    def check_integrity(self) -> None:
        for (line,) in self._connection.execute("PRAGMA integrity_check(1)"):
            if line != b"ok":
                raise FoundError("integrity", "database", line.decode(errors="replace"))

    def head(self) -> Iterable[Any]:
        return self._connection.execute(HEAD_ROWS).fetchall()

    def revisions(self) -> Iterable[Any]:
        return self._connection.execute(REVISION_ROWS).fetchall()

    def notes(self) -> Iterable[Any]:
        return self._connection.cursor().execute(NOTE_ROWS)

    def nodes(self) -> Iterable[Any]:
        return self._connection.cursor().execute(NODE_ROWS)

    def leaves(self, columns: Sequence[str]) -> Iterable[Any]:
        return self._connection.cursor().execute(leaf_rows(columns))


def _is_first_release(connection: sqlite3.Connection, found: _Schema) -> bool:
    if b"head" not in found:
        return False
    return connection.execute("SELECT schema_version FROM head").fetchall() == [(1,)]


def _schema_of(connection: sqlite3.Connection) -> _Schema:
    rows = connection.execute("SELECT name, type, tbl_name, sql FROM sqlite_master").fetchall()
    return {bytes(name): tuple(rest) for name, *rest in rows}


@cache
def _expected_schema() -> _Schema:
    engine = create_engine("sqlite://")
    try:
        with engine.begin() as connection:
            LedgerTable.metadata.create_all(connection)
            raw = connection.connection.driver_connection
            assert isinstance(raw, sqlite3.Connection)  # noqa: S101
            raw.text_factory = Text
            return _schema_of(raw)
    finally:
        engine.dispose()
