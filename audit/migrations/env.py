"""Run by Alembic, with the connection that `audit.upgrade` opened: one transaction, all or nothing."""

from __future__ import annotations

from alembic import context

from audit.tables import MIGRATION, schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema(),
    version_table=MIGRATION.name,
)
with context.begin_transaction():
    context.run_migrations()
