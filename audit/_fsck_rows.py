"""What the examination asks of a database: its raw rows, with text told apart from bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class Text(bytes):
    """A value that the database stores as text, undecoded; stored bytes stay plain `bytes`."""


class FoundError(Exception):
    """The first bad thing; an empty `where` is the database as a whole."""

    def __init__(self, problem: str, where: str, detail: str) -> None:
        super().__init__(detail)
        self.problem, self.where, self.detail = problem, where, detail


class LogRows(Protocol):
    """One snapshot of one log. Every method may raise `FoundError`."""

    def check_schema(self) -> None: ...
    def check_integrity(self) -> None: ...
    def head(self) -> Iterable[Any]: ...
    def revisions(self) -> Iterable[Any]: ...
    def notes(self) -> Iterable[Any]: ...
    def nodes(self) -> Iterable[Any]: ...
    def leaves(self, columns: Sequence[str]) -> Iterable[Any]: ...


HEAD_ROWS = "SELECT id, schema_version, origin, size, edge FROM head"
REVISION_ROWS = "SELECT version_num FROM ledger_migration"
NOTE_ROWS = "SELECT tree_size, note, note_hash FROM checkpoint ORDER BY tree_size"
NODE_ROWS = "SELECT level, idx, hash FROM node ORDER BY idx, level"


def leaf_rows(columns: Sequence[str]) -> str:
    """Return the query for every leaf; `columns` are names of ours."""
    names = ", ".join(f'"{name}"' for name in columns)
    return f"SELECT idx, event_id, leaf_hash, body, {names} FROM leaf ORDER BY idx"  # noqa: S608
