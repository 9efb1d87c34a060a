"""The ledger's SQLite file: how it is created, opened and locked, and how its errors are named."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event, insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from audit._files import sync_folder
from audit.errors import LedgerBusyError, LedgerCorruptError, LedgerExistsError, LedgerMissingError
from audit.tables import APPLICATION_ID, HEAD, SCHEMA_VERSION, LedgerTable

BUSY_TIMEOUT_S = 20.0

_WRITE = "affidavit_write"


def connect(path: Path, *, mode: str = "rw") -> sqlite3.Connection:
    """Open an existing file; SQLite is never left to create one."""
    connection = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode={mode}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=BUSY_TIMEOUT_S,
    )
    if mode == "rw":
        connection.execute("PRAGMA synchronous=FULL")
    return connection


def open_engine(path: Path) -> Engine:
    engine = create_engine("sqlite://", creator=lambda: connect(path), poolclass=QueuePool)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITE)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def create_file(path: Path, origin: str) -> None:
    """Make an empty ledger under a temporary name and link it into place, whole or not at all.

    Raises:
        LedgerExistsError: `path` exists.
        LedgerMissingError: its folder does not, or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        engine = open_engine(temporary)
        try:
            with engine.connect() as connection:
                raw = connection.connection.driver_connection
                assert isinstance(raw, sqlite3.Connection)  # noqa: S101
                raw.execute(f"PRAGMA application_id={APPLICATION_ID}")
                raw.execute("PRAGMA journal_mode=WAL")
            with engine.begin() as connection:
                LedgerTable.metadata.create_all(connection)
                row = {"id": 1, "schema_version": SCHEMA_VERSION, "origin": origin, "size": 0, "edge": b""}
                connection.execute(insert(HEAD), row)
        finally:
            engine.dispose()
        os.link(temporary, path)
        sync_folder(path.parent)
    except FileExistsError as error:
        raise LedgerExistsError(str(path)) from error
    except OSError as error:
        raise LedgerMissingError(str(path), f"cannot create it: {error.strerror}") from error
    finally:
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{temporary}{suffix}")


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A read transaction; database faults leave as `LedgerBusyError` or `LedgerCorruptError`."""
    with translated(), engine.begin() as connection:
        yield connection


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that holds the write lock from its first moment, durable when the block ends."""
    with translated(), engine.connect().execution_options(**{_WRITE: True}) as connection, connection.begin():
        yield connection


def blob(value: object, where: str) -> bytes:
    """Return `value` if it is bytes; SQLite would store anything in the column."""
    if type(value) is not bytes:
        raise LedgerCorruptError(f"{where} holds no bytes; run fsck")
    return value


@contextlib.contextmanager
def translated() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        _raise_named(error.orig if isinstance(error.orig, Exception) else error)
    except (sqlite3.Error, UnicodeDecodeError) as error:  # sqlite3 cannot even read some of its own messages
        _raise_named(error)


def _raise_named(cause: Exception) -> None:
    name = getattr(cause, "sqlite_errorname", "") or ""
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        raise LedgerBusyError(retry_after_s=1.0, pending=0) from cause
    raise LedgerCorruptError(f"the database refused: {cause}; run fsck") from cause
