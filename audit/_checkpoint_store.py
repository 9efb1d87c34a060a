"""The signed notes that a log's database keeps: the newest, and of older ones what still says something."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from sqlalchemy import Engine, Select, bindparam, delete, insert, literal, select, update

from audit import _store
from audit._bulk import run
from audit._checkpoint_pruning import superseded
from audit._store import blob
from audit.checkpoints import add_signatures, parse_checkpoint_note
from audit.errors import AuditError, OriginMismatchError, RootMismatchError
from audit.lease import Lease
from audit.notes import parse_note
from audit.tables import CHECKPOINT

KEPT_NEWEST: Final = 1000
_PRUNED_AT_ONCE: Final = 2048  # an old log's backlog goes in steps
_PRUNE_EVERY: Final = 256  # checkpoints that this process stored

_logger = logging.getLogger(__name__)
_POLL_S: Final = 0.05
_ABOVE_ALL: Final = 2**63 - 1
_PAGE: Final = 64
_SAME_SIZE: Final = CHECKPOINT.c.tree_size == bindparam("of_size")
_VALUES: Final[dict[str, Any]] = {"note": bindparam("to_note"), "note_hash": bindparam("to_hash")}
_AT: Final = select(CHECKPOINT.c.note).where(_SAME_SIZE)
_ADD: Final = insert(CHECKPOINT).values(tree_size=bindparam("of_size"), **_VALUES)
_CHANGE: Final = update(CHECKPOINT).where(_SAME_SIZE).values(**_VALUES)


@cache
def _newest(count: int) -> Select[Any]:
    size = CHECKPOINT.c.tree_size
    between = (size > bindparam("above"), size < bindparam("below"))
    return select(size, CHECKPOINT.c.note).where(*between).order_by(size.desc()).limit(literal(count))


class CheckpointStore:
    """The notes of one log; `root_at` gives the root that a note must name."""

    def __init__(self, engine: Engine, origin: str, root_at: Callable[[int], bytes]) -> None:
        self._engine, self._origin, self._root_at = engine, origin, root_at
        self._published = 0

    def store(self, note: bytes, lease: Lease | None) -> bytes:
        checkpoint = parse_checkpoint_note(note)
        if checkpoint.origin != self._origin:
            raise OriginMismatchError(expected=self._origin, found=checkpoint.origin)
        computed = self._root_at(checkpoint.tree_size)
        if computed != checkpoint.root_hash:
            raise RootMismatchError(expected=checkpoint.root_hash, computed=computed)
        with _store.writing(self._engine) as connection:
            if lease is not None:
                lease.check(connection)
                lease.note_published(connection)
            row = run(connection, _AT, {"of_size": checkpoint.tree_size}).fetchone()
            held = None if row is None else blob(row[0], "checkpoint")
            if held is not None:
                merged = add_signatures(held, [line.format() for line in parse_note(note).signatures])
                if merged == held:
                    return held
                note = merged
            values = {"to_note": note, "to_hash": hashlib.sha256(note).digest()}
            run(connection, _ADD if held is None else _CHANGE, {"of_size": checkpoint.tree_size, **values})
        if lease is not None:
            self._prune_now_and_then()
        return note

    def prune(self, keep_newest: int = KEPT_NEWEST) -> int:
        """Delete older notes that others make superfluous, some thousand at most; return how many."""
        unwanted = self._unwanted(keep_newest)
        if unwanted:
            self._delete(unwanted)
        return len(unwanted)

    def _unwanted(self, keep_newest: int) -> list[dict[str, Any]]:
        query = (
            select(CHECKPOINT.c.tree_size, CHECKPOINT.c.note, CHECKPOINT.c.note_hash)
            .order_by(CHECKPOINT.c.tree_size.desc())
            .limit(keep_newest + _PRUNED_AT_ONCE)
        )
        with _store.reading(self._engine) as connection:
            rows = connection.execute(query).all()
        newest = {row.tree_size for row in rows[:keep_newest]}
        hashes = {row.tree_size: row.note_hash for row in rows}
        gone = superseded((row.tree_size, blob(row.note, "checkpoint")) for row in rows)
        return [{"size": size, "hash": hashes[size]} for size in gone if size not in newest]

    def _delete(self, unwanted: list[dict[str, Any]]) -> None:
        """What was cosigned since it was read is another note, and stays."""
        query = delete(CHECKPOINT).where(
            CHECKPOINT.c.tree_size == bindparam("size"), CHECKPOINT.c.note_hash == bindparam("hash")
        )
        with _store.writing(self._engine) as connection:
            connection.execute(query, unwanted)

    def _prune_now_and_then(self) -> None:
        if self._published % _PRUNE_EVERY == 0:
            try:
                self.prune()
            except AuditError as error:  # what was to be stored is; the next time will do
                _logger.warning("old checkpoints were not pruned: %s", error)
        self._published += 1

    def latest(self, accept: Callable[[bytes], bool] | None = None, *, above: int = -1) -> bytes | None:
        """Return the newest note of a tree of more than `above` entries that `accept`s, looking page by page:
        the first is mostly the one.
        """
        below, page = _ABOVE_ALL, 1
        while True:
            with _store.reading(self._engine) as connection:
                values = {"above": above, "below": below}
                rows = run(connection, _newest(page), values).fetchall()
            for size, stored in rows:
                note, below = blob(stored, "checkpoint"), size
                if accept is None or accept(note):
                    return note
            if len(rows) < page:
                return None
            page = _PAGE

    def at(self, tree_size: int) -> bytes | None:
        query = select(CHECKPOINT.c.note).where(CHECKPOINT.c.tree_size == tree_size)
        with _store.reading(self._engine) as connection:
            note = connection.execute(query).scalar()
        return None if note is None else blob(note, "checkpoint")

    def all(self) -> list[bytes]:
        query = select(CHECKPOINT.c.note).order_by(CHECKPOINT.c.tree_size)
        with _store.reading(self._engine) as connection:
            return [blob(note, "checkpoint") for note in connection.execute(query).scalars()]

    def wait(self, leaf_index: int, timeout_s: float, accept: Callable[[bytes], bool] | None) -> bytes:
        deadline = time.monotonic() + timeout_s
        while True:
            note = self.latest(accept, above=leaf_index)
            if note is not None:
                return note
            if time.monotonic() >= deadline:
                level = "checkpointed" if accept is None else "witnessed"
                raise TimeoutError(f"leaf {leaf_index} was not {level} within {timeout_s} s")
            time.sleep(_POLL_S)
