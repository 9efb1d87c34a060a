"""The ledger's own examination: every column, index, node, head and note derived again from the stored bytes.

A Merkle root over bodies does not protect the search columns, the indices or the tiles; this does. It reads
one snapshot through a read-only connection of its own (`audit._fsck_sqlite`, `audit._fsck_postgresql`) and
believes no type that the database reports.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from audit import entries
from audit._fsck_rows import FoundError, LogRows, Text
from audit._fsck_sqlite import examining_file
from audit.canonical import parse_strict
from audit.checkpoints import Checkpoint, open_checkpoint, parse_checkpoint_note
from audit.entries import IndexColumns
from audit.errors import AuditError
from audit.location import Location
from audit.merkle import CompactRange, hash_leaf
from audit.notes import NoteVerifier
from audit.tables import REVISION, SCHEMA_VERSION, TILE_HEIGHT, TILE_WIDTH

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


def event_id_of(body: bytes) -> str:
    """Return the `event_id` that an entry's own bytes state."""
    document = parse_strict(body)
    value = document.get("event_id") if isinstance(document, dict) else None
    return value if isinstance(value, str) else ""


_stated_event_id = event_id_of


def fsck(
    place: Location | Path | str,
    *,
    columns_of: ColumnsOf,
    event_id_of: EventIdOf = event_id_of,
    origin: str | None = None,
    log: NoteVerifier | None = None,
) -> FsckReport:
    """Examine a ledger (a SQLite file or a database URL) without changing it, and name the first bad thing.

    With `origin` the log must bear that name, with `log` every stored checkpoint must bear its signature.
    Problems: `unreadable`, `schema`, `integrity`, `head`, `leaf_order`, `leaf_hash`, `event_id`, `columns`,
    `node`, `checkpoint`.
    """
    examination = _Examination(columns_of, event_id_of, origin, log)
    try:
        location = Location.parse(place)
        if location.path is not None:
            with examining_file(location.path) as rows:
                examination.run(rows)
        else:
            from audit._fsck_postgresql import examining_server

            with examining_server(location) as rows:
                examination.run(rows)
    except FoundError as found:
        where = found.where or str(place if isinstance(place, Path) else location)
        return FsckReport(False, found.problem, where, found.detail, examination.entries)
    return FsckReport(True, "", "", "", examination.entries)


def _deriving(columns_of: ColumnsOf, event_id_of: EventIdOf) -> Callable[[bytes], tuple[str, IndexColumns]]:
    if columns_of is not entries.columns_of or event_id_of is not _stated_event_id:
        return lambda body: (event_id_of(body), columns_of(body))

    def both(body: bytes) -> tuple[str, IndexColumns]:
        entry = entries.decode_entry(body)
        return entry.event_id, entries.index_columns(entry)

    return both


class _Examination:
    def __init__(
        self, columns_of: ColumnsOf, event_id_of: EventIdOf, origin: str | None, log: NoteVerifier | None
    ) -> None:
        self.derive, self.log = _deriving(columns_of, event_id_of), log
        self.origin = origin
        self.entries = 0
        self.edge = CompactRange()
        self.checkpoints: dict[int, Checkpoint] = {}

    def run(self, rows: LogRows) -> None:
        rows.check_schema()
        rows.check_integrity()
        size, edge = self.head(rows)
        self.notes(rows, size)
        self.leaves(rows)
        if self.edge.size != size or b"".join(self.edge.hashes) != edge:
            raise FoundError("head", "head", f"says {size} entries, the leaves make {self.edge.size}")

    def head(self, rows: LogRows) -> tuple[int, bytes]:
        match list(rows.head()):
            case [(1, int(version), Text() as name, int(size), edge)] if (
                1 <= version <= SCHEMA_VERSION and type(edge) is bytes
            ):
                if version == SCHEMA_VERSION and list(rows.revisions()) != [(Text(REVISION.encode()),)]:
                    raise FoundError("schema", "ledger_migration", f"is not one row, {REVISION}")
                origin = name.decode(errors="replace")
                if self.origin not in (None, origin):
                    raise FoundError("head", "head.origin", f"is {origin!r}, expected {self.origin!r}")
                self.origin = origin
                return size, edge
        raise FoundError("head", "head", "is not one row of this schema")

    def notes(self, rows: LogRows, size: int) -> None:
        for tree_size, note, note_hash in rows.notes():
            where = f"checkpoint {tree_size!r}"
            if (
                type(note) is not bytes
                or type(note_hash) is not bytes
                or hashlib.sha256(note).digest() != note_hash
            ):
                raise FoundError("checkpoint", where, "the note is not the one that was stored")
            try:
                checkpoint = parse_checkpoint_note(note)
                if self.log is not None:
                    open_checkpoint(note, log=self.log, now=0)
            except AuditError as error:
                raise FoundError("checkpoint", where, str(error)) from error
            if checkpoint.tree_size != tree_size or not 0 <= tree_size <= size:
                raise FoundError("checkpoint", where, f"note of size {checkpoint.tree_size}, log of {size}")
            if checkpoint.origin != self.origin:
                raise FoundError("checkpoint", where, f"is of log {checkpoint.origin!r}")
            self.checkpoints[tree_size] = checkpoint
        self.root_matches()

    def leaves(self, rows: LogRows) -> None:
        stored = {(level, index): node for level, index, node in rows.nodes()}
        waiting: list[bytes] = []  # joins the tree where a node is due, or a checkpoint
        for index, event_id, leaf_hash, body, *columns in rows.leaves(_COLUMNS):
            where = f"leaf {index!r}"
            if index != self.entries:
                raise FoundError("leaf_order", where, f"expected leaf {self.entries}")
            if type(body) is not bytes or type(leaf_hash) is not bytes or hash_leaf(body) != leaf_hash:
                raise FoundError("leaf_hash", where, "the body does not have the stored leaf hash")
            self.derived(where, body, event_id, columns)
            waiting.append(leaf_hash)
            size = index + 1
            if size % TILE_WIDTH == 0 or size in self.checkpoints:
                self.grow(waiting, stored)
                waiting = []
            self.entries = size
        self.grow(waiting, stored)
        for level, index in stored:
            raise FoundError("node", f"node {level}/{index}", "stands for no complete subtree")

    def grow(self, leaf_hashes: list[bytes], stored: dict[tuple[int, int], object]) -> None:
        def due(level: int, first: int, nodes: list[bytes]) -> None:
            if level % TILE_HEIGHT == 0:
                for index, node in enumerate(nodes, first):
                    found = stored.pop((level, index), None)
                    if found != node or type(found) is not bytes:
                        raise FoundError("node", f"node {level}/{index}", "is not the hash of its leaves")

        self.edge.extend(leaf_hashes, due)
        self.root_matches()

    def derived(self, where: str, body: bytes, event_id: object, columns: list[object]) -> None:
        try:
            expected_id, expected = self.derive(body)
        except AuditError as error:
            raise FoundError("columns", where, f"the body is no entry: {error}") from error
        if event_id != Text(expected_id.encode()) or type(event_id) is not Text:
            raise FoundError("event_id", where, f"is not {expected_id!r}, which the body states")
        for name, value in zip(_COLUMNS, columns, strict=True):
            derived = getattr(expected, name)
            stored = Text(derived.encode()) if isinstance(derived, str) else derived
            if value != stored or type(value) is not type(stored):
                raise FoundError("columns", f"{where}.{name}", f"is not {derived!r}, which the body states")

    def root_matches(self) -> None:
        checkpoint = self.checkpoints.pop(self.edge.size, None)
        if checkpoint is not None and checkpoint.root_hash != self.edge.root():
            where = f"checkpoint {checkpoint.tree_size}"
            raise FoundError("checkpoint", where, "its root is not the root of the stored leaves")
