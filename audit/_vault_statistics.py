"""What PostgreSQL's planner remembers of the vault's columns: nothing.

ANALYZE, which the server runs by itself, copies sample values of every column into `pg_statistic`: wrapped
keys, look-ups and short ciphertexts, which would outlive their rows. So a vault's columns are made without
statistics (`forbid`); those of a vault made before are dropped at its next scrub (`drop`). Each table is read
by its key or whole, so the planner needs none.

Source: PostgreSQL's manual, "pg_statistic" and "ALTER TABLE … SET STATISTICS".
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection

from audit.vault_tables import ERASURE, RECORD, SUBJECT, VAULT_HEAD

_RIGHTS: Final = (
    "the planner's statistics of this older vault may hold wrapped keys and ciphertexts, and only the "
    "database's owner may rewrite them: run `affidavit vault scrub` once as that role"
)
_TABLES: Final = (SUBJECT, RECORD, ERASURE, VAULT_HEAD)
_TYPE: Final = (
    "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = %s::regclass AND attname = %s"
)
_ALLOWED: Final = (
    "SELECT count(*) FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped "
    "AND attstattarget IS DISTINCT FROM 0"
)
_KEPT: Final = "SELECT count(*) FROM pg_stats WHERE schemaname = current_schema() AND tablename = %s"
_IS_OWNER: Final = "SELECT pg_has_role(datdba, 'USAGE') FROM pg_database WHERE datname = current_database()"


def forbid(connection: Connection) -> None:
    """Let the server gather no statistics of the vault's columns."""
    for table in _TABLES:
        columns = ", ".join(f"ALTER COLUMN {column.name} SET STATISTICS 0" for column in table.columns)
        connection.exec_driver_sql(f"ALTER TABLE {table.name} {columns}")


def drop(connection: Connection) -> str:
    """Forget what statistics there are or were; return what stands in the way, empty where nothing does.

    Args:
        connection: in autocommit.
    """
    if not _count(connection, _ALLOWED) and not _count(connection, _KEPT):
        return ""
    if not connection.exec_driver_sql(_IS_OWNER).scalar_one():
        return _RIGHTS
    _rewrite(connection)
    forbid(connection)
    if _count(connection, _KEPT):  # gathered in between; nobody gathers any more
        _rewrite(connection)
    return ""


def _rewrite(connection: Connection) -> None:
    for table in _TABLES:
        changes = []
        for column in table.columns:
            kind = connection.exec_driver_sql(_TYPE, (table.name, column.name)).scalar_one()
            changes.append(f"ALTER COLUMN {column.name} TYPE {kind}")  # the same: it drops the statistics
        connection.exec_driver_sql(f"ALTER TABLE {table.name} {', '.join(changes)}")
    connection.exec_driver_sql("VACUUM (FULL) pg_catalog.pg_statistic")


def _count(connection: Connection, query: str) -> int:
    return sum(int(connection.exec_driver_sql(query, (table.name,)).scalar_one()) for table in _TABLES)
