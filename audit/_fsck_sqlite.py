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
from audit.tables import APPLICATION_ID, LEAF, SCHEMA_VERSION, schema

_SINCE_2: Final = (b"lease", b"ledger_migration")  # tables that a log of the first release lacks
_SINCE_3: Final = "subject"  # the column of `leaf` that came with schema 3

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
        self._version = SCHEMA_VERSION

    def check_schema(self) -> None:
        if self._connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise FoundError("schema", "file header", "the file is not an Affidavit log")
        found = _schema_of(self._connection)
        self._version = _version_of(self._connection, found)
        expected = _expected_schema(min(self._version, SCHEMA_VERSION))
        if self._version == 1:
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
        query = leaf_rows(columns)
        if self._version < 3:
            query = query.replace(f'"{_SINCE_3}"', "NULL")
        return self._connection.cursor().execute(query)


def _version_of(connection: sqlite3.Connection, found: _Schema) -> int:
    """Return the schema's number if it is an older one's; the present one otherwise."""
    rows = connection.execute("SELECT schema_version FROM head").fetchall() if b"head" in found else []
    return int(rows[0][0]) if rows in ([(1,)], [(2,)], [(3,)]) else SCHEMA_VERSION


def _schema_of(connection: sqlite3.Connection) -> _Schema:
    """Return SQLite's record of the schema; a column that was added later is set in other white space."""
    rows = connection.execute("SELECT name, type, tbl_name, sql FROM sqlite_master").fetchall()
    return {
        bytes(name): (kind, table, b" ".join(sql.split()) if isinstance(sql, bytes) else sql)
        for name, kind, table, sql in rows
    }


@cache
def _expected_schema(version: int) -> _Schema:
    engine = create_engine("sqlite://")
    try:
        with engine.begin() as connection:
            schema().create_all(connection)
            if version < 4:
                for index in LEAF.indexes:
                    whole = f"CREATE INDEX {index.name} ON leaf ({index.columns.keys()[0]})"
                    connection.exec_driver_sql(f"DROP INDEX {index.name}")
                    connection.exec_driver_sql(whole)
            if version < 3:
                connection.exec_driver_sql(f"DROP INDEX ix_leaf_{_SINCE_3}")
                connection.exec_driver_sql(f"ALTER TABLE leaf DROP COLUMN {_SINCE_3}")
            raw = connection.connection.driver_connection
            assert isinstance(raw, sqlite3.Connection)  # noqa: S101
            raw.text_factory = Text
            return _schema_of(raw)
    finally:
        engine.dispose()
