"""The ledger's tables. Nothing validates a row here, so callers validate first.

They are tables and no mapped classes: nothing above makes objects of rows, and what maps them would be half
of the start of each command that opens a log.

`leaf` is level 0 of the tree; `node` holds one row per 256 leaves, at levels 8, 16 and so on; `head` is the
right edge. Every column but `leaf.body` and the notes is derived, and `audit.fsck` derives all of them again.
`lease` says which process publishes; it is no part of what the log says. A change here needs a migration in
`audit/migrations` that leads to the same schema, but for white space in SQLite's own record of it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    text,
)

SCHEMA_VERSION: Final = 4
REVISION: Final = "0004"  # the migration that leads to this schema
APPLICATION_ID: Final = 0x41464649  # "AFFI" in SQLite's file header
TILE_HEIGHT: Final = 8
TILE_WIDTH: Final = 1 << TILE_HEIGHT

# 64 bits on both databases; text compares byte by byte on both.
WHOLE: Final[Any] = BigInteger().with_variant(Integer(), "sqlite")
TEXT: Final[Any] = String().with_variant(String(collation="C"), "postgresql")


_OPTIONAL: Final = ("model", "version", "run", "site", "principal", "subject")


_METADATA: Final = MetaData()
"""Its own: a ledger shares no schema with another role's store."""


def _whole(name: str, *, key: bool = False, optional: bool = False) -> Column[Any]:
    return Column(name, WHOLE, primary_key=key, nullable=optional, autoincrement=False if key else "auto")


def _text(
    name: str, *, key: bool = False, optional: bool = False, unique: bool = False, index: bool = False
) -> Column[Any]:
    return Column(name, TEXT, primary_key=key, nullable=optional, unique=unique or None, index=index or None)


def _bytes(name: str) -> Column[Any]:
    return Column(name, LargeBinary, nullable=False)


LEAF: Final = Table(
    "leaf",
    _METADATA,
    _whole("idx", key=True),
    _text("event_id", unique=True),
    _bytes("leaf_hash"),
    _bytes("body"),
    _text("type", index=True),
    _text("actor", index=True),
    _text("time", index=True),
    _text("model", optional=True),
    _text("version", optional=True),
    _text("run", optional=True),
    _text("site", optional=True),
    _whole("round", optional=True),
    _text("principal", optional=True),
    _text("subject", optional=True),
)
NODE: Final = Table("node", _METADATA, _whole("level", key=True), _whole("idx", key=True), _bytes("hash"))
HEAD: Final = Table(
    "head",
    _METADATA,
    _whole("id", key=True),  # always 1
    _whole("schema_version"),
    _text("origin"),
    _whole("size"),
    _bytes("edge"),  # the hashes of `CompactRange`, 32 bytes each
)
CHECKPOINT: Final = Table(
    "checkpoint",
    _METADATA,
    _whole("tree_size", key=True),
    _bytes("note"),
    _bytes("note_hash"),  # SHA-256 of the note, for fsck
)
LEASE: Final = Table(
    "lease",
    _METADATA,
    _text("name", key=True),
    _text("owner"),  # empty: nobody's
    _whole("token"),  # grows with every change of owner, and refuses what an old owner does
    _whole("expires_ms"),  # POSIX milliseconds, by the clock that the lease was taken with
    _whole("published_ms"),  # when a checkpoint was last announced; 0: never
)
MIGRATION: Final = Table(  # where Alembic keeps the revision; exactly as Alembic itself makes it
    "ledger_migration",
    _METADATA,
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="ledger_migration_pkc"),
)


@cache
def schema() -> MetaData:
    """Return the tables with all their indexes: what a log's database is made of and compared with.

    Reading and writing do without the indexes that have a condition, for which both databases' dialects load.
    """
    for name in _OPTIONAL:  # most entries leave such a column empty, and each would cost an append
        where = text(f"{name} IS NOT NULL")
        Index(f"ix_leaf_{name}", LEAF.c[name], sqlite_where=where, postgresql_where=where)
    return _METADATA
