"""The vault's tables: metadata and migrations of their own, because what they hold must be able to die.

`vault_subject` is the mapping: a keyed hash of the person's id leads to a random pseudonym and to the
person's key, wrapped by the vault's master key. `vault_record` is what was sealed for one entry.
`vault_erasure` is what an erasure has yet to say in the log. A change here needs a migration in
`audit/vault_migrations`.
"""

from __future__ import annotations

from typing import Final, cast

from sqlalchemy import Column, LargeBinary, PrimaryKeyConstraint, String, Table
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel

from audit.tables import TEXT, WHOLE

VAULT_SCHEMA_VERSION: Final = 1
VAULT_APPLICATION_ID: Final = 0x41465641  # "AFVA" in SQLite's file header
# How far the traces of an erasure are gone: `vault_erasure.scrubbed`.
UNTOUCHED: Final = 0  # deleted rows may stand in free pages or the WAL; the next start rewrites them
SCRUBBED: Final = 1
REWRITTEN: Final = 2  # gone from the tables; PostgreSQL's write-ahead log could not be emptied
_NUMBERED: Final = {"autoincrement": False}


class VaultTable(SQLModel, registry=registry()):
    """Base with metadata of its own."""


class VaultSubject(VaultTable, table=True):
    __tablename__ = "vault_subject"

    pseudonym: str = Field(primary_key=True, sa_type=TEXT)
    lookup: str = Field(unique=True, sa_type=TEXT)  # hex HMAC of kind and id, under the master key
    wrapped_key: bytes = Field(sa_type=LargeBinary)
    sealed_id: bytes = Field(sa_type=LargeBinary)  # kind and id, under the person's key


class VaultRecord(VaultTable, table=True):
    __tablename__ = "vault_record"

    event_id: str = Field(primary_key=True, sa_type=TEXT)
    pseudonym: str = Field(index=True, sa_type=TEXT)
    type: str = Field(sa_type=TEXT)
    time: str = Field(index=True, sa_type=TEXT)  # RFC 3339; when it was sealed
    ciphertext: bytes = Field(sa_type=LargeBinary)


class VaultErasure(VaultTable, table=True):
    __tablename__ = "vault_erasure"

    request_id: str = Field(primary_key=True, sa_type=TEXT)
    pseudonym: str = Field(unique=True, sa_type=TEXT)
    records: int = Field(sa_type=WHOLE)
    event_id: str = Field(sa_type=TEXT)
    entry: bytes = Field(sa_type=LargeBinary)  # the leaf, so that a retry appends the same bytes
    leaf_index: int | None = Field(default=None, sa_type=WHOLE)  # None: not in the log yet
    scrubbed: int = Field(sa_type=WHOLE)  # UNTOUCHED, SCRUBBED or REWRITTEN


class VaultHead(VaultTable, table=True):
    __tablename__ = "vault_head"

    id: int = Field(primary_key=True, sa_type=WHOLE, sa_column_kwargs=_NUMBERED)  # always 1
    schema_version: int = Field(sa_type=WHOLE)
    origin: str = Field(sa_type=TEXT)
    key_check: bytes = Field(sa_type=LargeBinary)  # a constant under the master key
    erased_until: int = Field(sa_type=WHOLE)  # the log's erasures before this leaf are applied
    swept_until: str = Field(sa_type=TEXT)  # records sealed before this time have their entry


SUBJECT = cast(Table, VaultSubject.__table__)  # type: ignore[attr-defined]
RECORD = cast(Table, VaultRecord.__table__)  # type: ignore[attr-defined]
ERASURE = cast(Table, VaultErasure.__table__)  # type: ignore[attr-defined]
VAULT_HEAD = cast(Table, VaultHead.__table__)  # type: ignore[attr-defined]
VAULT_MIGRATION = Table(  # where Alembic keeps the revision; exactly as Alembic itself makes it
    "vault_migration",
    VaultTable.metadata,
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="vault_migration_pkc"),
)
