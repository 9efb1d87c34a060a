"""The vault as its first release wrote it.

The tables are spelt out: what a migration makes must not change when `audit.vault_tables` does.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TEXT = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "vault_subject",
        sa.Column("pseudonym", _TEXT, nullable=False),
        sa.Column("lookup", _TEXT, nullable=False),
        sa.Column("wrapped_key", sa.LargeBinary(), nullable=False),
        sa.Column("sealed_id", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("pseudonym"),
        sa.UniqueConstraint("lookup"),
    )
    op.create_table(
        "vault_record",
        sa.Column("event_id", _TEXT, nullable=False),
        sa.Column("pseudonym", _TEXT, nullable=False),
        sa.Column("type", _TEXT, nullable=False),
        sa.Column("time", _TEXT, nullable=False),
        sa.Column("ciphertext", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("event_id"),
    )
    for name in ("pseudonym", "time"):
        op.create_index(f"ix_vault_record_{name}", "vault_record", [name], unique=False)
    op.create_table(
        "vault_erasure",
        sa.Column("request_id", _TEXT, nullable=False),
        sa.Column("pseudonym", _TEXT, nullable=False),
        sa.Column("records", _WHOLE, nullable=False),
        sa.Column("event_id", _TEXT, nullable=False),
        sa.Column("entry", sa.LargeBinary(), nullable=False),
        sa.Column("leaf_index", _WHOLE),
        sa.Column("scrubbed", _WHOLE, nullable=False),
        sa.PrimaryKeyConstraint("request_id"),
        sa.UniqueConstraint("pseudonym"),
    )
    op.create_table(
        "vault_head",
        sa.Column("id", _WHOLE, nullable=False, autoincrement=False),
        sa.Column("schema_version", _WHOLE, nullable=False),
        sa.Column("origin", _TEXT, nullable=False),
        sa.Column("key_check", sa.LargeBinary(), nullable=False),
        sa.Column("erased_until", _WHOLE, nullable=False),
        sa.Column("swept_until", _TEXT, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
