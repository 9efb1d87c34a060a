"""What only PostgreSQL needs: how a session is set up, and what its error codes mean for a log.

Imports no driver: a psycopg error carries its SQLSTATE, and one without any means that the server is gone.
"""

from __future__ import annotations

from typing import Any, Final

from audit.errors import (
    AuditError,
    LedgerBusyError,
    LedgerCorruptError,
    LedgerMissingError,
    LedgerUnreachableError,
    LedgerUnsafeError,
    LedgerWriteError,
)

STATEMENT_TIMEOUT_MS: Final = 20_000
IDLE_TIMEOUT_MS: Final = 30_000  # a frozen writer gives the lock back

_UNSAFE: Final = {"fsync": "off", "full_page_writes": "off"}
_BUSY: Final = frozenset(
    {
        "40001",  # serialization failure
        "40P01",  # deadlock
        "53300",  # too many connections
        "55P03",  # lock not available
        "57014",  # canceled by a timeout
    }
)
_GONE: Final = frozenset(
    {
        "25006",  # read-only: a standby answers
        "25P03",  # idle in a transaction for too long
        "57P01",  # the administrator ended the session
        "57P02",  # the server crashed
        "57P03",  # the server is starting or stopping
        "57P05",  # idle for too long
    }
)
_CONNECTION_FAULTS: Final = frozenset({"OperationalError", "InterfaceError"})
_MISSING: Final = frozenset({"3D000", "42P01", "3F000", "28000", "28P01", "42501"})  # nothing there for us


def prepare(raw: Any) -> None:
    """Set up a new session: commits wait for the disk, statements do not wait for ever.

    Raises:
        LedgerUnsafeError: the server does not keep what it acknowledges.
    """
    autocommit = raw.autocommit
    raw.autocommit = True
    try:
        with raw.cursor() as cursor:
            cursor.execute(
                "SELECT name, setting FROM pg_settings"
                " WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit')"
            )
            settings = dict(cursor.fetchall())
            for name, value in _UNSAFE.items():
                if settings.get(name) == value:
                    raise LedgerUnsafeError(
                        f"the PostgreSQL server has {name}={value}: an acknowledged entry could be lost; "
                        f"set {name}=on in postgresql.conf"
                    )
            if settings.get("synchronous_commit") in ("off", "local"):
                cursor.execute("SET synchronous_commit = on")
            cursor.execute(f"SET statement_timeout = {STATEMENT_TIMEOUT_MS}")
            cursor.execute(f"SET lock_timeout = {STATEMENT_TIMEOUT_MS}")
            cursor.execute(f"SET idle_in_transaction_session_timeout = {IDLE_TIMEOUT_MS}")
    finally:
        if not raw.closed:
            raw.autocommit = autocommit


def name_fault(cause: Exception) -> AuditError:
    """Return the ledger's error for a driver's."""
    state = getattr(cause, "sqlstate", None)
    reason = " ".join(str(cause).split())[:300] or type(cause).__name__
    if state in _BUSY:
        return LedgerBusyError(retry_after_s=1.0, pending=0)
    if state in _MISSING or (state is None and 'database "' in reason and "does not exist" in reason):
        return LedgerMissingError("this URL", reason)
    if state is None and not {base.__name__ for base in type(cause).__mro__} & _CONNECTION_FAULTS:
        return LedgerWriteError(f"the database driver refused: {reason}")
    if state is None or state in _GONE or state.startswith("08"):
        return LedgerUnreachableError(reason)
    if state.startswith("XX"):
        return LedgerCorruptError(f"the database refused: {reason}; run fsck")
    return LedgerWriteError(f"the database refused: {reason}")
