"""The ledger's tables. SQLModel does not validate table rows, so callers validate first.

`leaf` is level 0 of the tree; `node` holds one row per 256 leaves, at levels 8, 16 and so on; `head` is the
right edge. Every column but `leaf.body` and the notes is derived, and `audit.fsck` derives all of them again.
`lease` says which process publishes; it is no part of what the log says. A change here needs a migration in
`audit/migrations` that leads to the same schema, but for white space in SQLite's own record of it.
"""

from __future__ import annotations

from typing import Any, Final, cast

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    PrimaryKeyConstraint,
    String,
    Table,
    text,
)
from sqlalchemy.orm import registry
from sqlmodel import AutoString, Field, SQLModel

SCHEMA_VERSION: Final = 4
REVISION: Final = "0004"  # the migration that leads to this schema
APPLICATION_ID: Final = 0x41464649  # "AFFI" in SQLite's file header
TILE_HEIGHT: Final = 8
TILE_WIDTH: Final = 1 << TILE_HEIGHT

# 64 bits on both databases; text compares byte by byte on both.
WHOLE: Final[Any] = BigInteger().with_variant(Integer(), "sqlite")
TEXT: Final[Any] = AutoString().with_variant(String(collation="C"), "postgresql")
_NUMBERED: Final = {"autoincrement": False}


_OPTIONAL: Final = ("model", "version", "run", "site", "principal", "subject")


def _index_where_set(name: str) -> Index:
    """An index without the entries that leave the column empty: most do, and each would cost an append."""
    where = text(f"{name} IS NOT NULL")
    return Index(f"ix_leaf_{name}", name, sqlite_where=where, postgresql_where=where)


class LedgerTable(SQLModel, registry=registry()):
    """Base with metadata of its own: a ledger shares no schema with another role's store."""


class Leaf(LedgerTable, table=True):
    __tablename__ = "leaf"
    __table_args__ = tuple(_index_where_set(name) for name in _OPTIONAL)

    idx: int = Field(primary_key=True, sa_type=WHOLE, sa_column_kwargs=_NUMBERED)
    event_id: str = Field(unique=True, sa_type=TEXT)
    leaf_hash: bytes = Field(sa_type=LargeBinary)
    body: bytes = Field(sa_type=LargeBinary)
    type: str = Field(index=True, sa_type=TEXT)
    actor: str = Field(index=True, sa_type=TEXT)
    time: str = Field(index=True, sa_type=TEXT)
    model: str | None = Field(default=None, sa_type=TEXT)
    version: str | None = Field(default=None, sa_type=TEXT)
    run: str | None = Field(default=None, sa_type=TEXT)
    site: str | None = Field(default=None, sa_type=TEXT)
    round: int | None = Field(default=None, sa_type=WHOLE)
    principal: str | None = Field(default=None, sa_type=TEXT)
    subject: str | None = Field(default=None, sa_type=TEXT)


class Node(LedgerTable, table=True):
    __tablename__ = "node"

    level: int = Field(primary_key=True, sa_type=WHOLE, sa_column_kwargs=_NUMBERED)
    idx: int = Field(primary_key=True, sa_type=WHOLE, sa_column_kwargs=_NUMBERED)
    hash: bytes = Field(sa_type=LargeBinary)


class Head(LedgerTable, table=True):
    __tablename__ = "head"

    id: int = Field(primary_key=True, sa_type=WHOLE, sa_column_kwargs=_NUMBERED)  # always 1
    schema_version: int = Field(sa_type=WHOLE)
    origin: str = Field(sa_type=TEXT)
    size: int = Field(sa_type=WHOLE)
    edge: bytes = Field(sa_type=LargeBinary)  # the hashes of `CompactRange`, 32 bytes each


class StoredCheckpoint(LedgerTable, table=True):
    __tablename__ = "checkpoint"

    tree_size: int = Field(primary_key=True, sa_type=WHOLE, sa_column_kwargs=_NUMBERED)
    note: bytes = Field(sa_type=LargeBinary)
    note_hash: bytes = Field(sa_type=LargeBinary)  # SHA-256 of the note, for fsck


class StoredLease(LedgerTable, table=True):
    __tablename__ = "lease"

    name: str = Field(primary_key=True, sa_type=TEXT)
    owner: str = Field(sa_type=TEXT)  # empty: nobody's
    token: int = Field(sa_type=WHOLE)  # grows with every change of owner, and refuses what an old owner does
    expires_ms: int = Field(sa_type=WHOLE)  # POSIX milliseconds, by the clock that the lease was taken with
    published_ms: int = Field(sa_type=WHOLE)  # when a checkpoint was last announced; 0: never


LEAF = cast(Table, Leaf.__table__)  # type: ignore[attr-defined]
NODE = cast(Table, Node.__table__)  # type: ignore[attr-defined]
HEAD = cast(Table, Head.__table__)  # type: ignore[attr-defined]
CHECKPOINT = cast(Table, StoredCheckpoint.__table__)  # type: ignore[attr-defined]
LEASE = cast(Table, StoredLease.__table__)  # type: ignore[attr-defined]
MIGRATION = Table(  # where Alembic keeps the revision; exactly as Alembic itself makes it
    "ledger_migration",
    LedgerTable.metadata,
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="ledger_migration_pkc"),
)
