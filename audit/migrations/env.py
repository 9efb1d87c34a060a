"""Run by Alembic, with the connection that `audit.upgrade` opened: one transaction, all or nothing."""

from __future__ import annotations

from alembic import context

from audit.tables import METADATA, MIGRATION

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=MIGRATION.name,
)
with context.begin_transaction():
    context.run_migrations()
