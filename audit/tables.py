"""The ledger's tables. SQLModel does not validate table rows, so callers validate first.

`leaf` is level 0 of the tree; `node` holds one row per 256 leaves, at levels 8, 16 and so on; `head` is the
right edge. Every column but `leaf.body` and the notes is derived, and `audit.fsck` derives all of them again.
"""

from __future__ import annotations

from typing import cast

from sqlalchemy import LargeBinary, Table
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel

SCHEMA_VERSION = 1
APPLICATION_ID = 0x41464649  # "AFFI" in SQLite's file header
TILE_HEIGHT = 8
TILE_WIDTH = 1 << TILE_HEIGHT


class LedgerTable(SQLModel, registry=registry()):
    """Base with metadata of its own: a ledger shares no schema with another role's store."""


class Leaf(LedgerTable, table=True):
    __tablename__ = "leaf"

    idx: int = Field(primary_key=True)
    event_id: str = Field(unique=True)
    leaf_hash: bytes = Field(sa_type=LargeBinary)
    body: bytes = Field(sa_type=LargeBinary)
    type: str = Field(index=True)
    actor: str = Field(index=True)
    time: str = Field(index=True)
    model: str | None = Field(default=None, index=True)
    version: str | None = Field(default=None, index=True)
    run: str | None = Field(default=None, index=True)
    site: str | None = Field(default=None, index=True)
    round: int | None = None
    principal: str | None = Field(default=None, index=True)


class Node(LedgerTable, table=True):
    __tablename__ = "node"

    level: int = Field(primary_key=True)
    idx: int = Field(primary_key=True)
    hash: bytes = Field(sa_type=LargeBinary)


class Head(LedgerTable, table=True):
    __tablename__ = "head"

    id: int = Field(primary_key=True)  # always 1
    schema_version: int
    origin: str
    size: int
    edge: bytes = Field(sa_type=LargeBinary)  # the hashes of `CompactRange`, 32 bytes each


class StoredCheckpoint(LedgerTable, table=True):
    __tablename__ = "checkpoint"

    tree_size: int = Field(primary_key=True)
    note: bytes = Field(sa_type=LargeBinary)
    note_hash: bytes = Field(sa_type=LargeBinary)  # SHA-256 of the note, for fsck


LEAF = cast(Table, Leaf.__table__)  # type: ignore[attr-defined]
NODE = cast(Table, Node.__table__)  # type: ignore[attr-defined]
HEAD = cast(Table, Head.__table__)  # type: ignore[attr-defined]
CHECKPOINT = cast(Table, StoredCheckpoint.__table__)  # type: ignore[attr-defined]
