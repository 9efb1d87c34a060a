"""The lease that says which process publishes, and the schema's number in the head."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TEXT = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "lease",
        sa.Column("name", _TEXT, nullable=False),
        sa.Column("owner", _TEXT, nullable=False),
        sa.Column("token", _WHOLE, nullable=False),
        sa.Column("expires_ms", _WHOLE, nullable=False),
        sa.Column("published_ms", _WHOLE, nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.execute("UPDATE head SET schema_version = 2 WHERE id = 1")
