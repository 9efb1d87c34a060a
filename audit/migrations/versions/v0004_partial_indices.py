"""Search indices hold only the entries that set their column: an append pays for what it names alone."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("model", "version", "run", "site", "principal", "subject"):
        where = sa.text(f"{name} IS NOT NULL")
        op.drop_index(f"ix_leaf_{name}", "leaf")
        op.create_index(f"ix_leaf_{name}", "leaf", [name], sqlite_where=where, postgresql_where=where)
    op.execute("UPDATE head SET schema_version = 4 WHERE id = 1")
