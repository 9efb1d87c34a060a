"""The log as its first release wrote it: leaves, nodes, head and checkpoints.

The tables are spelt out: what a migration makes must not change when `audit.tables` does.
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
_SEARCHED = ("actor", "model", "principal", "run", "site", "time", "type", "version")


def upgrade() -> None:
    op.create_table(
        "leaf",
        sa.Column("idx", _WHOLE, nullable=False, autoincrement=False),
        sa.Column("event_id", _TEXT, nullable=False),
        sa.Column("leaf_hash", sa.LargeBinary(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("type", _TEXT, nullable=False),
        sa.Column("actor", _TEXT, nullable=False),
        sa.Column("time", _TEXT, nullable=False),
        sa.Column("model", _TEXT),
        sa.Column("version", _TEXT),
        sa.Column("run", _TEXT),
        sa.Column("site", _TEXT),
        sa.Column("round", _WHOLE),
        sa.Column("principal", _TEXT),
        sa.PrimaryKeyConstraint("idx"),
        sa.UniqueConstraint("event_id"),
    )
    for name in _SEARCHED:
        op.create_index(f"ix_leaf_{name}", "leaf", [name], unique=False)
    op.create_table(
        "node",
        sa.Column("level", _WHOLE, nullable=False, autoincrement=False),
        sa.Column("idx", _WHOLE, nullable=False, autoincrement=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("level", "idx"),
    )
    op.create_table(
        "head",
        sa.Column("id", _WHOLE, nullable=False, autoincrement=False),
        sa.Column("schema_version", _WHOLE, nullable=False),
        sa.Column("origin", _TEXT, nullable=False),
        sa.Column("size", _WHOLE, nullable=False),
        sa.Column("edge", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "checkpoint",
        sa.Column("tree_size", _WHOLE, nullable=False, autoincrement=False),
        sa.Column("note", sa.LargeBinary(), nullable=False),
        sa.Column("note_hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("tree_size"),
    )
