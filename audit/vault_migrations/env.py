"""Run by Alembic, with the connection that `audit._vault_store` opened: one transaction, all or nothing."""

from __future__ import annotations

from alembic import context

from audit.vault_tables import VAULT_MIGRATION, VaultTable

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=VaultTable.metadata,
    version_table=VAULT_MIGRATION.name,
)
with context.begin_transaction():
    context.run_migrations()
