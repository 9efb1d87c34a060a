"""How a batch enters the log: number what is new, extend the tree, insert, commit.

New event ids are the rule, so a batch is first written as if all of its were; the database's unique index
refuses it when one is known, and the batch is written again with the known ones looked up.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Engine, Select, bindparam, func, or_, select, update

from audit import _store
from audit._bulk import KnownRowError, insert_rows, run
from audit.errors import (
    AuditError,
    EventIdConflictError,
    LedgerCorruptError,
    LedgerUnreachableError,
    StaleViewError,
    TreeRangeError,
)
from audit.merkle import HASH_SIZE, CompactRange
from audit.tables import HEAD, LEAF, NODE, TILE_HEIGHT

_RETRIES_S: Final = (0.05, 0.25, 1.0)
_HEAD: Final = select(HEAD.c.size, HEAD.c.edge).where(HEAD.c.id == 1)
_MOVE_HEAD: Final = (
    update(HEAD).where(HEAD.c.id == 1).values(size=bindparam("new_size"), edge=bindparam("new_edge"))
)


class Sequenced(NamedTuple):  # one an append: a dataclass would cost four times as much to make
    """An entry is durable at this index; `tree_size` is a size of the tree that contains it."""

    leaf_index: int
    leaf_hash: bytes
    event_id: str
    tree_size: int


class Guard(NamedTuple):
    """The view that an entry rests on: it may only follow it, with no entry of these types between."""

    types: tuple[str, ...]
    after: int  # the last leaf index that the view has read; -1 for none


class AppendRequest(NamedTuple):
    event_id: str
    leaf_hash: bytes
    body: bytes
    columns: tuple[Any, ...]  # the values of `IndexColumns`, in the order of its fields
    guard: Guard | None = None


def commit_batch(engine: Engine, batch: list[AppendRequest]) -> list[Sequenced | AuditError]:
    """Insert the new entries of `batch`, integrate them and commit, in one durable transaction.

    When the database server goes away in the middle, the batch is offered again: what a commit whose answer
    was lost has written is found by its event ids, so nothing is doubled.

    Returns:
        For each request its place, or `EventIdConflictError`, or `StaleViewError`: it was not written,
        because an entry of a type that its guard names came in between.

    Raises:
        LedgerUnreachableError: the server stayed away; parts of the batch may be durable.
        AuditError: nothing of the batch was written.
    """
    for pause_s in _RETRIES_S:
        try:
            return _commit_batch(engine, batch)
        except LedgerUnreachableError:
            time.sleep(pause_s)
    return _commit_batch(engine, batch)


def _commit_batch(engine: Engine, batch: list[AppendRequest]) -> list[Sequenced | AuditError]:
    try:
        return _write(engine, batch, look_up=False)
    except KnownRowError:
        return _write(engine, batch, look_up=True)


def _write(engine: Engine, batch: list[AppendRequest], *, look_up: bool) -> list[Sequenced | AuditError]:
    with _store.writing(engine) as connection:
        edge = read_edge(connection)
        index = edge.size
        rows: list[tuple[Any, ...]] = []
        placed: list[tuple[int, bytes] | AuditError] = []
        newest = _newest_of_guarded(connection, batch)
        passed = any(guard and newest[guard.types] > guard.after for *_, guard in batch)
        known = _known(connection, batch) if look_up or passed else {}
        guarded = {name for types in newest for name in types}
        for event_id, leaf_hash, body, columns, guard in batch:
            found = known.get(event_id)
            if found is None:
                if guard is not None and newest[guard.types] > guard.after:
                    placed.append(StaleViewError(after=guard.after, newest=newest[guard.types]))
                    continue
                if columns[0] in guarded:
                    for types in newest:
                        if columns[0] in types:
                            newest[types] = index
                found = known[event_id] = (index, leaf_hash)
                rows.append((index, event_id, leaf_hash, body, *columns))
                index += 1
            if found[1] == leaf_hash:
                placed.append(found)
            else:
                placed.append(EventIdConflictError(event_id=event_id, leaf_index=found[0]))
        if rows:
            nodes: list[tuple[int, int, bytes]] = []

            def keep(level: int, first: int, hashes: list[bytes]) -> None:
                if level % TILE_HEIGHT == 0:
                    nodes.extend((level, first + i, node) for i, node in enumerate(hashes))

            edge.extend([row[2] for row in rows], keep)
            insert_rows(connection, LEAF, rows, unless_known=not look_up)
            if nodes:
                insert_rows(connection, NODE, nodes)
            moved = {"new_size": edge.size, "new_edge": b"".join(edge.hashes)}
            changed = run(connection, _MOVE_HEAD, moved)
            if changed.rowcount != 1:
                raise LedgerCorruptError("the log has no head; run fsck")
    size = edge.size
    return [
        item if isinstance(item, AuditError) else Sequenced(item[0], item[1], request.event_id, size)
        for item, request in zip(placed, batch, strict=True)
    ]


def _newest_of_guarded(connection: Connection, batch: list[AppendRequest]) -> dict[tuple[str, ...], int]:
    """Return, for each set of types that a guard names, the newest such leaf after the oldest view."""
    oldest: dict[tuple[str, ...], int] = {}
    for request in batch:
        if request.guard is not None:
            types, after = request.guard
            oldest[types] = min(after, oldest.get(types, after))
    newest = {}
    for types, after in oldest.items():
        (found,) = run(connection, newest_query(types), {"after": after}).fetchone()
        newest[types] = -1 if found is None else int(found)
    return newest


@cache
def newest_query(types: tuple[str, ...]) -> Select[Any]:
    one_of = or_(*[LEAF.c.type == type for type in types])
    return select(func.max(LEAF.c.idx)).where(one_of, LEAF.c.idx > bindparam("after", type_=LEAF.c.idx.type))


def _known(connection: Connection, batch: list[AppendRequest]) -> dict[str, tuple[int, bytes]]:
    wanted = {request.event_id for request in batch}
    query = select(LEAF.c.idx, LEAF.c.event_id, LEAF.c.leaf_hash).where(LEAF.c.event_id.in_(wanted))
    return {row.event_id: (row.idx, row.leaf_hash) for row in connection.execute(query)}


def read_edge(connection: Connection) -> CompactRange:
    row = run(connection, _HEAD).fetchone()
    if row is None or type(row[0]) is not int or type(row[1]) is not bytes:
        raise LedgerCorruptError("the log has no head; run fsck")
    size, edge = row
    hashes = [edge[i : i + HASH_SIZE] for i in range(0, len(edge), HASH_SIZE)]
    try:
        return CompactRange(size, hashes)
    except TreeRangeError as error:
        raise LedgerCorruptError(f"the log's head is damaged: {error}; run fsck") from error
