"""How a batch enters the log: look up event ids, number what is new, extend the tree, commit."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any, Final

from sqlalchemy import Connection, Engine, insert, select, update

from audit import _store
from audit.entries import IndexColumns
from audit.errors import (
    AuditError,
    EventIdConflictError,
    LedgerCorruptError,
    LedgerUnreachableError,
    TreeRangeError,
)
from audit.merkle import HASH_SIZE, CompactRange
from audit.tables import HEAD, LEAF, NODE, TILE_HEIGHT

_RETRIES_S: Final = (0.05, 0.25, 1.0)
_COLUMNS: Final = tuple(field.name for field in fields(IndexColumns))


@dataclass(frozen=True, slots=True)
class Sequenced:
    """An entry is durable at this index; `tree_size` is a size of the tree that contains it."""

    leaf_index: int
    leaf_hash: bytes
    event_id: str
    tree_size: int


@dataclass(frozen=True, slots=True)
class AppendRequest:
    body: bytes
    leaf_hash: bytes
    event_id: str
    columns: IndexColumns


def commit_batch(engine: Engine, batch: list[AppendRequest]) -> list[Sequenced | AuditError]:
    """Insert the new entries of `batch`, integrate them and commit, in one durable transaction.

    When the database server goes away in the middle, the batch is offered again: what a commit whose answer
    was lost has written is found by its event ids, so nothing is doubled.

    Returns:
        For each request its place, or `EventIdConflictError`.

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
    with _store.writing(engine) as connection:
        edge = read_edge(connection)
        wanted = {request.event_id for request in batch}
        known = {
            row.event_id: (row.idx, row.leaf_hash)
            for row in connection.execute(
                select(LEAF.c.idx, LEAF.c.event_id, LEAF.c.leaf_hash).where(LEAF.c.event_id.in_(wanted))
            )
        }
        leaves: list[dict[str, Any]] = []
        nodes: list[dict[str, Any]] = []

        def keep(level: int, index: int, node: bytes) -> None:
            if level % TILE_HEIGHT == 0:
                nodes.append({"level": level, "idx": index, "hash": node})

        placed: list[tuple[int, bytes] | AuditError] = []
        for request in batch:
            found = known.get(request.event_id)
            if found is None:
                found = (edge.append(request.leaf_hash, keep), request.leaf_hash)
                known[request.event_id] = found
                leaves.append(_leaf_row(found[0], request))
            if found[1] == request.leaf_hash:
                placed.append(found)
            else:
                placed.append(EventIdConflictError(event_id=request.event_id, leaf_index=found[0]))
        if leaves:
            connection.execute(insert(LEAF), leaves)
            if nodes:
                connection.execute(insert(NODE), nodes)
            changed = connection.execute(
                update(HEAD).where(HEAD.c.id == 1).values(size=edge.size, edge=b"".join(edge.hashes))
            )
            if changed.rowcount != 1:
                raise LedgerCorruptError("the log has no head; run fsck")
    return [
        item if isinstance(item, AuditError) else Sequenced(*item, request.event_id, edge.size)
        for item, request in zip(placed, batch, strict=True)
    ]


def _leaf_row(index: int, request: AppendRequest) -> dict[str, Any]:
    return {
        "idx": index,
        "event_id": request.event_id,
        "leaf_hash": request.leaf_hash,
        "body": request.body,
        **{name: getattr(request.columns, name) for name in _COLUMNS},
    }


def read_edge(connection: Connection) -> CompactRange:
    row = connection.execute(select(HEAD.c.size, HEAD.c.edge).where(HEAD.c.id == 1)).first()
    if row is None or type(row.size) is not int or type(row.edge) is not bytes:
        raise LedgerCorruptError("the log has no head; run fsck")
    hashes = [row.edge[i : i + HASH_SIZE] for i in range(0, len(row.edge), HASH_SIZE)]
    try:
        return CompactRange(row.size, hashes)
    except TreeRangeError as error:
        raise LedgerCorruptError(f"the log's head is damaged: {error}; run fsck") from error
