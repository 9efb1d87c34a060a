"""The log on disk: entries get consecutive indices, and an acknowledged entry is durable.

`append` queues an entry and returns a future; the sequencer inserts a batch, integrates it into the tree and
commits, all in one fully durable transaction, before any future completes. The database (a SQLite file, or
PostgreSQL) orders processes, so several may append to one log. Reads come from SQL rows; full tiles are
immutable and cached. An entry is *sequenced* when its future completes, *checkpointed* once the log signed a
tree with it (`wait_checkpointed`), *witnessed* once others signed that too (`wait_witnessed`).
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Row, Select, bindparam, func, inspect, select

from audit import _store, merkle
from audit._append_request import append_request
from audit._bulk import run
from audit._checkpoint_store import CheckpointStore
from audit._integrate import AppendRequest, Guard, Sequenced, commit_batch, newest_query, read_edge
from audit._search import matching
from audit._sequencer import LoopWaiter, Sequencer
from audit._store import blob
from audit._tiles import TileReader
from audit._wal_backfill import WalBackfill
from audit.checkpoints import Checkpoint
from audit.entries import IndexColumns
from audit.errors import (
    AuditError,
    EntryNotFoundError,
    LedgerCorruptError,
    LedgerMissingError,
    LedgerSchemaError,
    TreeRangeError,
)
from audit.lease import Lease
from audit.location import Location
from audit.merkle import CompactRange
from audit.tables import APPLICATION_ID, HEAD, LEAF, SCHEMA_VERSION

__all__ = [
    "MAX_BATCH",
    "MAX_PENDING",
    "MAX_SEARCH",
    "AppendRequest",
    "Guard",
    "Ledger",
    "LoopWaiter",
    "Sequenced",
    "StoredEntry",
    "append_request",
]

MAX_BATCH = 256
MAX_PENDING = 4096
MAX_SEARCH = 1000

_COLUMNS = tuple(field.name for field in fields(IndexColumns))
_open_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()
_left_to_parent: list[Engine] = []


@dataclass(frozen=True, slots=True)
class StoredEntry:
    leaf_index: int
    leaf_hash: bytes
    event_id: str
    body: bytes
    columns: IndexColumns


class Ledger:
    """One append-only log in one database. Make it with `create` or `open`, end it with `close`."""

    def __init__(self, location: Location, engine: Engine, origin: str) -> None:
        self.location, self.origin = location, origin
        self._engine = engine
        self._start()
        _open_ledgers.add(self)

    @classmethod
    def create(cls, place: Location | Path | str, origin: str) -> Ledger:
        """Create an empty log named `origin` and open it; `place` is a path (SQLite) or a database URL.

        Raises:
            LedgerExistsError: there is a log already.
            LedgerMissingError: its folder or database does not exist.
            LedgerWriteError: the disk refuses; nothing is left behind but perhaps a hidden file.
            LocationError: the URL is of no supported database.
            MalformedCheckpointError: `origin` cannot name a log.
        """
        Checkpoint(origin, 0, merkle.EMPTY_ROOT)
        location = Location.parse(place)
        _store.create(location, origin)
        return cls.open(location)

    @classmethod
    def open(cls, place: Location | Path | str) -> Ledger:
        """Open an existing log; never creates one.

        Raises:
            LedgerMissingError: there is no log at `place`.
            LedgerSchemaError: it is of another release; `affidavit db upgrade` brings an older one here.
            LedgerCorruptError: the database contradicts itself.
            LedgerUnreachableError, LedgerUnsafeError: the server is gone, or keeps nothing safe.
            LocationError: the URL is of no supported database.
        """
        location = Location.parse(place)
        if location.path is not None and not location.path.is_file():
            raise LedgerMissingError(str(location), "no such file")
        engine = _store.open_engine(location)
        try:
            with _store.reading(engine) as connection:
                _check_kind(connection, location)
                rows = connection.execute(select(HEAD.c.schema_version, HEAD.c.origin)).all()
                if len(rows) != 1 or not isinstance(rows[0][1], str):
                    raise LedgerCorruptError("the log has no head; run fsck")
                if rows[0][0] != SCHEMA_VERSION:
                    raise LedgerSchemaError(str(location), found=rows[0][0], expected=SCHEMA_VERSION)
                edge = read_edge(connection)
                last = connection.execute(select(func.max(LEAF.c.idx))).scalar()
                if edge.size != (0 if last is None else last + 1):
                    raise LedgerCorruptError(f"the head says {edge.size} entries, the last one is {last}")
        except AuditError:
            engine.dispose()
            raise
        return cls(location, engine, rows[0][1])

    def close(self) -> None:
        """Finish what was queued, then let go of the file. Safe to call twice."""
        self._sequencer.close()
        self._backfill.close()
        self._engine.dispose()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # writing

    def append(
        self, entry_bytes: bytes, *, event_id: str, index_columns: IndexColumns, guard: Guard | None = None
    ) -> Future[Sequenced]:
        """Queue an entry; the future completes once it is durable.

        With a guard the entry is written only if no entry of the guard's types came after the view that it
        rests on; else the future fails with `StaleViewError` and nothing was written.

        The same event id with the same bytes yields the index it has; with other bytes the future fails
        with `EventIdConflictError`.

        Raises:
            EntrySizeError, EventIdError, EntryColumnsError: refused before it was queued.
            LedgerBusyError: the queue is full.
            LedgerClosedError: after `close`.
        """
        return self._sequencer.submit(append_request(entry_bytes, event_id, index_columns, guard))

    def append_all(self, entries: Iterable[tuple[bytes, str, IndexColumns]]) -> list[Future[Sequenced]]:
        """`append` for several (bytes, event id, columns) at once, which share commits where they fit.

        Raises:
            AuditError: as `append`; then none of them was queued.
        """
        return self._sequencer.submit_all([append_request(*entry) for entry in entries])

    def append_from_loop(
        self, entry_bytes: bytes, *, event_id: str, index_columns: IndexColumns, guard: Guard | None = None
    ) -> asyncio.Future[Sequenced]:
        """`append` for coroutines: a future of the running loop, which is woken once for a whole batch."""
        return self._sequencer.submit_from_loop(append_request(entry_bytes, event_id, index_columns, guard))

    def append_waiting(self, requests: Sequence[tuple[AppendRequest, LoopWaiter[Sequenced]]]) -> None:
        """`append` several of what `append_request` made, for those who wait in the running loop.

        Raises:
            LedgerBusyError, LedgerClosedError: as `append`; none of these was queued.
        """
        self._sequencer.submit_waiting(requests)

    def append_wait(
        self,
        entry_bytes: bytes,
        *,
        event_id: str,
        index_columns: IndexColumns,
        timeout_s: float | None = 60.0,
    ) -> Sequenced:
        """`append` and wait until it is durable.

        Raises:
            AuditError: as `append` and its future.
            TimeoutError: not durable in time; it may become so later, and a retry with the same id is safe.
        """
        return self.append(entry_bytes, event_id=event_id, index_columns=index_columns).result(timeout_s)

    # reading the tree

    @property
    def tree_size(self) -> int:
        return self.edge().size

    @property
    def root_hash(self) -> bytes:
        return self.edge().root()

    def edge(self) -> CompactRange:
        """Return the current right edge: size and root of one moment."""
        with _store.reading(self._engine) as connection:
            edge = read_edge(connection)
        self._tiles.grow(edge.size)
        return edge

    def root_at(self, size: int) -> bytes:
        """Return the root of the first `size` entries.

        Raises:
            TreeRangeError: the log is smaller.
        """
        self._reach(size)
        return merkle.root_from(self._tiles.node, size)

    def inclusion_proof(self, leaf_index: int, tree_size: int) -> list[bytes]:
        """Return the proof that leaf `leaf_index` is in the tree of the first `tree_size` entries.

        Raises:
            TreeRangeError: unless leaf_index < tree_size <= the log's size.
        """
        self._reach(tree_size)
        return merkle.inclusion_proof(self._tiles.node, leaf_index, tree_size)

    def consistency_proof(self, size1: int, size2: int) -> list[bytes]:
        """Return the proof that the first `size2` entries extend the first `size1`; empty for size1 0.

        Raises:
            TreeRangeError: unless 0 <= size1 <= size2 <= the log's size.
        """
        self._reach(size2)
        return merkle.consistency_proof(self._tiles.node, size1, size2)

    def node(self, level: int, index: int) -> bytes:
        """Return the hash of the perfect subtree of 2**level leaves that begins at leaf index * 2**level.

        Raises:
            TreeRangeError: the log does not hold all of them.
        """
        if level < 0 or index < 0:
            raise TreeRangeError(f"no node {index} of level {level}")
        self._reach((index + 1) << level)
        return self._tiles.node(level, index)

    def warm(self, tree_size: int) -> None:
        """Read the nodes of the last, unfinished tiles at once: for a caller with many proofs to make."""
        self._reach(tree_size)
        self._tiles.warm(tree_size)

    # reading entries

    def entry(self, leaf_index: int) -> bytes:
        """Return the exact bytes of one leaf.

        Raises:
            EntryNotFoundError: the log has no such leaf.
        """
        return self.stored_entry(leaf_index).body

    def stored_entry(self, leaf_index: int) -> StoredEntry:
        """Return one leaf with its columns; raises `EntryNotFoundError`."""
        found = self._select(select(LEAF).where(LEAF.c.idx == leaf_index))
        if not found:
            raise EntryNotFoundError(leaf_index=leaf_index, tree_size=self.tree_size)
        return found[0]

    def entries(self, start: int, stop: int) -> list[bytes]:
        """Return the bytes of leaves start <= index < stop; fewer when the log is shorter."""
        return [blob(row[0], "leaf.body") for row in self._rows(select(LEAF.c.body), start, stop)]

    def leaf_hashes(self, start: int, stop: int) -> list[bytes]:
        """Return the hashes of leaves start <= index < stop; fewer when the log is shorter."""
        rows = self._rows(select(LEAF.c.leaf_hash), start, stop)
        return [blob(row[0], "leaf.leaf_hash") for row in rows]

    def find_event(self, event_id: str) -> StoredEntry | None:
        """Return the entry that an event id names."""
        found = self._select(select(LEAF).where(LEAF.c.event_id == event_id))
        return found[0] if found else None

    def logged_events(self, event_ids: Sequence[str]) -> set[str]:
        """Return which of these event ids, at most a few hundred, are in the log."""
        if not event_ids:
            return set()
        asked = 1 << (len(event_ids) - 1).bit_length()  # a few statements, each made once
        wanted = [*event_ids, *[event_ids[0]] * (asked - len(event_ids))]
        values = {f"id_{number}": event_id for number, event_id in enumerate(wanted)}
        with _store.reading(self._engine) as connection:
            return {row[0] for row in run(connection, _events_query(asked), values).fetchall()}

    def search(
        self,
        *,
        type: str | Sequence[str] | None = None,
        actor: str | None = None,
        model: str | None = None,
        version: str | None = None,
        run: str | None = None,
        site: str | None = None,
        round: int | None = None,
        principal: str | None = None,
        subject: str | None = None,
        since: str | None = None,
        until: str | None = None,
        after: int | None = None,
        limit: int = 100,
        newest_first: bool = False,
    ) -> list[StoredEntry]:
        """Return entries whose columns match all that is given, in index order.

        `type` is one type or several of which any matches; times are RFC 3339 UTC, since <= time < until;
        `after` is the last leaf index of the previous page (for `newest_first` the next page lies below it).
        The columns are the operator's index, not proof: completeness is shown by reading every leaf.

        Raises:
            TreeRangeError: the limit is out of range.
        """
        if not 1 <= limit <= MAX_SEARCH:
            raise TreeRangeError(f"limit is {limit}; give 1 to {MAX_SEARCH}")
        query = matching(
            select(LEAF),
            type=type, actor=actor, model=model, version=version, run=run, site=site,
            round=round, principal=principal, subject=subject, since=since, until=until,
        )  # fmt: skip
        if after is not None:
            query = query.where(LEAF.c.idx < after if newest_first else LEAF.c.idx > after)
        return self._select(query.order_by(LEAF.c.idx.desc() if newest_first else LEAF.c.idx).limit(limit))

    def has_since(self, types: str | tuple[str, ...], leaf_index: int) -> bool:
        """Whether an entry of one of these types came after a leaf: a cheaper question than what it is."""
        wanted = (types,) if isinstance(types, str) else types
        with _store.reading(self._engine) as connection:
            (found,) = run(connection, newest_query(wanted), {"after": leaf_index}).fetchone()
        return found is not None

    def count(self, *, before: int | None = None, after: int | None = None, **columns: Any) -> int:
        """Return how many entries `search` would find by these columns, after < leaf index < before."""
        query = matching(select(func.count()).select_from(LEAF), **columns)
        if after is not None:
            query = query.where(LEAF.c.idx > after)
        if before is not None:
            query = query.where(LEAF.c.idx < before)
        with _store.reading(self._engine) as connection:
            return int(connection.execute(query).scalar_one())

    # checkpoints

    def store_checkpoint(self, note: bytes, *, lease: Lease | None = None) -> bytes:
        """Keep a signed checkpoint of this log, merged with the signatures already held for its size.

        Signatures are not verified here. With `lease` nothing is written unless it is still held. Returns the
        merged note.

        Raises:
            OriginMismatchError, RootMismatchError, TreeRangeError: it is not of this tree.
            MalformedNoteError, MalformedCheckpointError: it is no checkpoint.
            LeaseLostError: another process publishes now.
        """
        return self._checkpoints.store(note, lease)

    def latest_checkpoint(self, accept: Callable[[bytes], bool] | None = None) -> bytes | None:
        """Return the note of the largest stored tree, or of the largest one that `accept`s its note."""
        return self._checkpoints.latest(accept)

    def checkpoint_at(self, tree_size: int) -> bytes | None:
        """Return the stored note for exactly this size."""
        return self._checkpoints.at(tree_size)

    def checkpoints(self) -> list[bytes]:
        """Return every stored note, smallest tree first; older ones thin out to one an hour."""
        return self._checkpoints.all()

    def prune_checkpoints(self) -> int:
        """Delete notes beyond the newest thousand that others make superfluous; return how many.

        Publishing does this by itself. One note an hour stays for each set of cosigners, so that the largest
        note that a policy accepts is never touched.
        """
        return self._checkpoints.prune()

    def wait_checkpointed(self, leaf_index: int, timeout_s: float = 10.0) -> bytes:
        """Return the note of a tree that holds this leaf, as soon as the log has signed one.

        Raises:
            TimeoutError: none was signed in time; is a publisher running?
        """
        return self._checkpoints.wait(leaf_index, timeout_s, None)

    def wait_witnessed(
        self, leaf_index: int, accept: Callable[[bytes], bool], timeout_s: float = 60.0
    ) -> bytes:
        """Return a note of a tree that holds this leaf and that `accept`s, which is where a policy decides.

        `accept` is usually `lambda note: policy.open(note, now=now).quorum.satisfied`.

        Raises:
            TimeoutError: no such note came in time.
        """
        return self._checkpoints.wait(leaf_index, timeout_s, accept)

    def lease(self, name: str, owner: str, *, ttl_s: float) -> Lease:
        """Return a lease that one owner at a time can hold in this log's database."""
        return Lease(self._engine, name, owner, ttl_s=ttl_s)

    # inside

    def _start(self) -> None:
        engine = self._engine
        self._tiles = TileReader(engine)
        self._checkpoints = CheckpointStore(engine, self.origin, self.root_at)
        self._backfill = backfill = WalBackfill(engine)

        def commit(batch: list[AppendRequest]) -> list[Sequenced | AuditError]:
            outcomes = commit_batch(engine, batch)
            backfill.committed(len(batch))
            return outcomes

        self._sequencer: Sequencer[AppendRequest, Sequenced] = Sequencer(
            commit, max_batch=MAX_BATCH, max_pending=MAX_PENDING
        )

    def _restart_in_child(self) -> None:
        """After fork: the parent's thread and connections are not ours, not even to close."""
        _left_to_parent.append(self._engine)
        self._engine = _store.open_engine(self.location)
        self._start()

    def _reach(self, size: int) -> None:
        if size > self._tiles.known_size and size > (actual := self.tree_size):
            raise TreeRangeError(f"the log has {actual} entries, not {size}")
        if size < 0:
            raise TreeRangeError("a tree size is not negative")

    def _rows(self, query: Select[Any], start: int, stop: int) -> Sequence[Row[Any]]:
        query = query.where(LEAF.c.idx >= start, LEAF.c.idx < stop).order_by(LEAF.c.idx)
        with _store.reading(self._engine) as connection:
            return connection.execute(query).all()

    def _select(self, query: Select[Any]) -> list[StoredEntry]:
        with _store.reading(self._engine) as connection:
            rows = connection.execute(query).all()
        return [
            StoredEntry(
                row.idx,
                blob(row.leaf_hash, "leaf.leaf_hash"),
                row.event_id,
                blob(row.body, "leaf.body"),
                IndexColumns(**{name: getattr(row, name) for name in _COLUMNS}),
            )
            for row in rows
        ]


@cache
def _events_query(count: int) -> Select[Any]:
    ids = [bindparam(f"id_{number}", type_=LEAF.c.event_id.type) for number in range(count)]
    return select(LEAF.c.event_id).where(LEAF.c.event_id.in_(ids))


def _check_kind(connection: Connection, location: Location) -> None:
    if location.path is None:
        found = inspect(connection).has_table(HEAD.name)
    else:
        found = connection.exec_driver_sql("PRAGMA application_id").scalar() == APPLICATION_ID
    if not found:
        what = "the file" if location.path is not None else "what the database holds"
        raise LedgerMissingError(str(location), f"{what} is not an Affidavit log")


def _after_fork_in_child() -> None:
    for ledger in list(_open_ledgers):
        ledger._restart_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
