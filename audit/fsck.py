"""The ledger's own examination: every column, index, node, head and note derived again from the stored bytes.

A Merkle root over bodies does not protect the search columns, the indices or the tiles; this does. It
reads the file through a read-only connection of its own and believes no type that SQLite reports.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine

from audit import _store
from audit.canonical import parse_strict
from audit.checkpoints import Checkpoint, open_checkpoint, parse_checkpoint_note
from audit.entries import IndexColumns
from audit.errors import AuditError
from audit.merkle import CompactRange, hash_leaf
from audit.notes import NoteVerifier
from audit.tables import APPLICATION_ID, SCHEMA_VERSION, TILE_HEIGHT, LedgerTable

ColumnsOf = Callable[[bytes], IndexColumns]
EventIdOf = Callable[[bytes], str]

_COLUMNS = tuple(field.name for field in fields(IndexColumns))


@dataclass(frozen=True, slots=True)
class FsckReport:
    """What the examination found; `problem` is a stable code, empty when `ok`."""

    ok: bool
    problem: str
    where: str  # table and row of the first bad thing
    detail: str
    entries: int  # leaves that were found good


class _Text(bytes):
    """A value that SQLite stores as TEXT, undecoded; a BLOB stays plain `bytes`."""


class _FoundError(Exception):
    def __init__(self, problem: str, where: str, detail: str) -> None:
        super().__init__(detail)
        self.problem, self.where, self.detail = problem, where, detail


def event_id_of(body: bytes) -> str:
    """Return the `event_id` that an entry's own bytes state."""
    document = parse_strict(body)
    value = document.get("event_id") if isinstance(document, dict) else None
    return value if isinstance(value, str) else ""


def fsck(
    path: Path | str,
    *,
    columns_of: ColumnsOf,
    event_id_of: EventIdOf = event_id_of,
    origin: str | None = None,
    log: NoteVerifier | None = None,
) -> FsckReport:
    """Examine a ledger file without changing it, and name the first bad thing.

    With `origin` the log must bear that name, with `log` every stored checkpoint must bear its signature.
    Problems: `unreadable`, `schema`, `integrity`, `head`, `leaf_order`, `leaf_hash`, `event_id`, `columns`,
    `node`, `checkpoint`.
    """
    examination = _Examination(columns_of, event_id_of, origin, log)
    try:
        connection = _store.connect(Path(path), mode="ro")
    except sqlite3.Error as error:
        return FsckReport(False, "unreadable", str(path), str(error), 0)
    try:
        connection.text_factory = _Text
        connection.execute("BEGIN")  # one snapshot, whatever writers do meanwhile
        examination.run(connection)
    except _FoundError as found:
        return FsckReport(False, found.problem, found.where, found.detail, examination.entries)
    except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
        return FsckReport(False, "unreadable", str(path), str(error), examination.entries)
    finally:
        connection.close()
    return FsckReport(True, "", "", "", examination.entries)


class _Examination:
    def __init__(
        self, columns_of: ColumnsOf, event_id_of: EventIdOf, origin: str | None, log: NoteVerifier | None
    ) -> None:
        self.columns_of, self.event_id_of, self.log = columns_of, event_id_of, log
        self.origin = origin
        self.entries = 0
        self.edge = CompactRange()
        self.checkpoints: dict[int, Checkpoint] = {}

    def run(self, connection: sqlite3.Connection) -> None:
        self.schema(connection)
        for (line,) in connection.execute("PRAGMA integrity_check(1)"):
            if line != b"ok":
                raise _FoundError("integrity", "database", line.decode(errors="replace"))
        size, edge = self.head(connection)
        self.notes(connection, size)
        self.leaves(connection)
        if self.edge.size != size or b"".join(self.edge.hashes) != edge:
            raise _FoundError("head", "head", f"says {size} entries, the leaves make {self.edge.size}")

    def schema(self, connection: sqlite3.Connection) -> None:
        if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise _FoundError("schema", "file header", "the file is not an Affidavit log")
        found = _schema_of(connection)
        for name in sorted(found.keys() | _expected_schema().keys()):
            if found.get(name) != _expected_schema().get(name):
                where = name.decode(errors="replace")
                raise _FoundError("schema", where, "is not as this release defines it")

    def head(self, connection: sqlite3.Connection) -> tuple[int, bytes]:
        rows = connection.execute("SELECT id, schema_version, origin, size, edge FROM head").fetchall()
        match rows:
            case [(1, int(version), _Text() as name, int(size), edge)] if (
                version == SCHEMA_VERSION and type(edge) is bytes
            ):
                origin = name.decode(errors="replace")
                if self.origin not in (None, origin):
                    raise _FoundError("head", "head.origin", f"is {origin!r}, expected {self.origin!r}")
                self.origin = origin
                return size, edge
        raise _FoundError("head", "head", "is not one row of this schema")

    def notes(self, connection: sqlite3.Connection, size: int) -> None:
        query = "SELECT tree_size, note, note_hash FROM checkpoint ORDER BY tree_size"
        for tree_size, note, note_hash in connection.execute(query):
            where = f"checkpoint {tree_size!r}"
            if (
                type(note) is not bytes
                or type(note_hash) is not bytes
                or hashlib.sha256(note).digest() != note_hash
            ):
                raise _FoundError("checkpoint", where, "the note is not the one that was stored")
            try:
                checkpoint = parse_checkpoint_note(note)
                if self.log is not None:
                    open_checkpoint(note, log=self.log, now=0)
            except AuditError as error:
                raise _FoundError("checkpoint", where, str(error)) from error
            if checkpoint.tree_size != tree_size or not 0 <= tree_size <= size:
                raise _FoundError("checkpoint", where, f"note of size {checkpoint.tree_size}, log of {size}")
            if checkpoint.origin != self.origin:
                raise _FoundError("checkpoint", where, f"is of log {checkpoint.origin!r}")
            self.checkpoints[tree_size] = checkpoint
        self.root_matches()

    def leaves(self, connection: sqlite3.Connection) -> None:
        names = ", ".join(f'"{name}"' for name in _COLUMNS)
        nodes = connection.cursor().execute("SELECT level, idx, hash FROM node ORDER BY idx, level")
        stored = {(level, index): node for level, index, node in nodes}
        rows: Iterator[Any] = connection.cursor().execute(  # every name is a field of ours
            f"SELECT idx, event_id, leaf_hash, body, {names} FROM leaf ORDER BY idx"  # noqa: S608
        )
        for index, event_id, leaf_hash, body, *columns in rows:
            where = f"leaf {index!r}"
            if index != self.edge.size:
                raise _FoundError("leaf_order", where, f"expected leaf {self.edge.size}")
            if type(body) is not bytes or type(leaf_hash) is not bytes or hash_leaf(body) != leaf_hash:
                raise _FoundError("leaf_hash", where, "the body does not have the stored leaf hash")
            self.derived(where, body, event_id, columns)
            self.edge.append(hash_leaf(body), lambda *node: self.node(stored, *node))
            self.root_matches()
            self.entries += 1
        for level, index in stored:
            raise _FoundError("node", f"node {level}/{index}", "stands for no complete subtree")

    def derived(self, where: str, body: bytes, event_id: object, columns: list[object]) -> None:
        try:
            expected_id, expected = self.event_id_of(body), self.columns_of(body)
        except AuditError as error:
            raise _FoundError("columns", where, f"the body is no entry: {error}") from error
        if event_id != _Text(expected_id.encode()) or type(event_id) is not _Text:
            raise _FoundError("event_id", where, f"is not {expected_id!r}, which the body states")
        for name, value in zip(_COLUMNS, columns, strict=True):
            derived = getattr(expected, name)
            stored = _Text(derived.encode()) if isinstance(derived, str) else derived
            if value != stored or type(value) is not type(stored):
                raise _FoundError("columns", f"{where}.{name}", f"is not {derived!r}, which the body states")

    def node(self, stored: dict[tuple[int, int], object], level: int, index: int, node: bytes) -> None:
        if level % TILE_HEIGHT:
            return
        found = stored.pop((level, index), None)
        if found != node or type(found) is not bytes:
            raise _FoundError("node", f"node {level}/{index}", "is not the hash of its leaves")

    def root_matches(self) -> None:
        checkpoint = self.checkpoints.pop(self.edge.size, None)
        if checkpoint is not None and checkpoint.root_hash != self.edge.root():
            where = f"checkpoint {checkpoint.tree_size}"
            raise _FoundError("checkpoint", where, "its root is not the root of the stored leaves")


def _schema_of(connection: sqlite3.Connection) -> dict[bytes, tuple[object, ...]]:
    rows = connection.execute("SELECT name, type, tbl_name, sql FROM sqlite_master").fetchall()
    return {bytes(name): tuple(rest) for name, *rest in rows}


@cache
def _expected_schema() -> dict[bytes, tuple[object, ...]]:
    engine = create_engine("sqlite://")
    try:
        with engine.begin() as connection:
            LedgerTable.metadata.create_all(connection)
            raw = connection.connection.driver_connection
            assert isinstance(raw, sqlite3.Connection)  # noqa: S101
            raw.text_factory = _Text
            return _schema_of(raw)
    finally:
        engine.dispose()
