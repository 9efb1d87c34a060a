"""The pseudonym of the person that an entry is about, to search by. No earlier release wrote any."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_TEXT = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column("leaf", sa.Column("subject", _TEXT))
    op.create_index("ix_leaf_subject", "leaf", ["subject"], unique=False)
    op.execute("UPDATE head SET schema_version = 3 WHERE id = 1")
