"""The ledger's database: how it is created, opened and locked, and how its errors are named.

SQLite and PostgreSQL behind three functions: `open_engine`, `reading` (one snapshot) and `writing` (one
writer at a time, durable when the block ends). Everything above speaks SQLAlchemy Core.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, insert, inspect, select
from sqlalchemy.exc import DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

from audit import _forks
from audit._files import locked, sync_folder
from audit._postgresql import name_fault, prepare
from audit.errors import (
    LedgerBusyError,
    LedgerCorruptError,
    LedgerExistsError,
    LedgerMissingError,
    LedgerWriteError,
)
from audit.location import Location
from audit.tables import APPLICATION_ID, HEAD, MIGRATION, REVISION, SCHEMA_VERSION, schema

BUSY_TIMEOUT_S = 20.0
QUEUE_SUFFIX = "-turn.lock"  # of the file beside a database in whose order its writers come

_WRITE = "affidavit_write"
_DISK_REFUSES = (
    "SQLITE_FULL", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC",
    "SQLITE_IOERR_DIR_FSYNC", "SQLITE_IOERR_TRUNCATE", "SQLITE_IOERR_DELETE", "SQLITE_IOERR_SHM",
)  # fmt: skip
_LOCK_HEAD = select(HEAD.c.id).where(HEAD.c.id == 1).with_for_update()
_WAL_PAGES = 4000  # 16 MiB; at SQLite's 1000 every second full batch would also sync the database file
_PAUSE_S = 0.0005  # between two tries for another process's write lock
_QUEUE_S = 2.0  # for the turn to ask for it
_turns: weakref.WeakKeyDictionary[Engine, threading.Lock] = weakref.WeakKeyDictionary()


def connect(path: Path, *, mode: str = "rw") -> sqlite3.Connection:
    """Open an existing file; SQLite is never left to create one."""
    _forks.check_usable()
    connection = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode={mode}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=BUSY_TIMEOUT_S,
    )
    if mode == "rw":
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
    return connection


def open_engine(location: Location) -> Engine:
    """Return the engine of a log's database; connects to nothing yet."""
    if location.url is not None:
        return _open_server(location.url)
    path = location.path
    assert path is not None  # noqa: S101 - the other half of Location
    engine = create_engine(
        "sqlite://", creator=lambda: connect(path), poolclass=QueuePool, pool_use_lifo=True
    )
    queue = path.with_name(f"{path.name}{QUEUE_SUFFIX}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if connection.get_execution_options().get(_WRITE):
            raw: Any = connection.connection.driver_connection
            _begin_writing(raw, queue)
        else:
            connection.exec_driver_sql("BEGIN")

    _forks.watch(engine)
    return engine


def create(location: Location, origin: str) -> None:
    """Make an empty log, whole or not at all.

    Raises:
        LedgerExistsError: there is one already.
        LedgerMissingError: its folder or its database does not exist, or cannot be written.
    """
    if location.path is not None:
        _create_file(location.path, origin)
        return
    engine = open_engine(location)
    try:
        with translated(), engine.begin() as connection:
            # two creators at once: the second waits here, then sees what the first made
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({APPLICATION_ID})")
            if inspect(connection).has_table(HEAD.name):
                raise LedgerExistsError(str(location))
            create_tables(connection, origin)
    finally:
        engine.dispose()


def create_tables(connection: Connection, origin: str) -> None:
    schema().create_all(connection, checkfirst=False)
    row = {"id": 1, "schema_version": SCHEMA_VERSION, "origin": origin, "size": 0, "edge": b""}
    connection.execute(insert(HEAD), row)
    connection.execute(insert(MIGRATION), {"version_num": REVISION})


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A read transaction on one snapshot; database faults leave as errors of the ledger."""
    with translated():
        if engine.dialect.name == "sqlite":
            thread = _forks.enter()
            try:
                with engine.begin() as connection:
                    yield connection
            finally:
                _forks.leave(thread)
            return
        options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that holds the write lock from its first moment, durable when the block ends."""
    with (
        _turn_of(engine),
        translated(),
        engine.connect().execution_options(**{_WRITE: True}) as connection,
        connection.begin(),
    ):
        if engine.dialect.name != "sqlite":
            connection.execute(_LOCK_HEAD)
        yield connection


@contextlib.contextmanager
def _turn_of(engine: Engine) -> Iterator[None]:
    """Among the threads of this process that write to one file; a server orders everybody by itself."""
    if engine.dialect.name != "sqlite":
        yield
        return
    turn = _turns.setdefault(engine, threading.Lock())
    if not turn.acquire(timeout=BUSY_TIMEOUT_S):
        raise LedgerBusyError(retry_after_s=1.0, pending=0)
    try:
        thread = _forks.enter()
        try:
            yield
        finally:
            _forks.leave(thread)
    finally:
        turn.release()


def _begin_writing(raw: sqlite3.Connection, queue: Path) -> None:
    """Take the file's write lock, after those who asked for it before.

    SQLite's own wait for it sleeps up to a tenth of a second at a time; a write takes a few thousandths. And
    it knows no order: who has just let go of the lock is the first to take it again, before another process
    looks. Threads of one process wait for each other before they come here.
    """
    until = time.monotonic() + BUSY_TIMEOUT_S
    raw.execute("PRAGMA busy_timeout=0")
    try:
        with _queued(queue):
            while True:
                try:
                    raw.execute("BEGIN IMMEDIATE")
                    return
                except sqlite3.OperationalError as error:
                    is_held = (getattr(error, "sqlite_errorname", "") or "").startswith("SQLITE_BUSY")
                    if not is_held or time.monotonic() >= until:
                        raise
                time.sleep(_PAUSE_S)
    finally:
        raw.execute(f"PRAGMA busy_timeout={round(1000 * BUSY_TIMEOUT_S)}")


@contextlib.contextmanager
def _queued(queue: Path) -> Iterator[None]:
    """Be the one process that asks for the write lock next.

    For order alone, never for safety: where the file cannot be made, or its holder stands still, one goes on
    without.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            held.enter_context(locked(queue, _QUEUE_S, pause_s=_PAUSE_S))
        yield


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
    except PoolTimeoutError as error:
        raise LedgerBusyError(retry_after_s=1.0, pending=0) from error
    except (sqlite3.Error, UnicodeDecodeError) as error:  # sqlite3 cannot even read some of its own messages
        _raise_named(error)


def _open_server(url: URL) -> Engine:
    try:
        patience = _patience(url)
        engine = create_engine(url, pool_pre_ping=True, pool_timeout=BUSY_TIMEOUT_S, connect_args=patience)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise LedgerMissingError(
            str(Location(url=url)), "psycopg is not installed; install affidavit[postgresql]"
        ) from error

    @event.listens_for(engine, "connect")
    def _connected(raw: Any, _: object) -> None:
        prepare(raw)

    return engine


def _patience(url: URL) -> dict[str, Any]:
    """How long a server may keep silent; what the URL says itself goes first."""
    wanted = {
        "connect_timeout": 5,
        "tcp_user_timeout": 15_000,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "application_name": "affidavit",
    }
    return {name: value for name, value in wanted.items() if name not in url.query}


def _create_file(path: Path, origin: str) -> None:
    """Make the file under a temporary name and link it into place."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        engine = open_engine(Location(path=temporary))
        try:
            with translated(), engine.connect() as connection:
                raw = connection.connection.driver_connection
                assert isinstance(raw, sqlite3.Connection)  # noqa: S101
                raw.execute(f"PRAGMA application_id={APPLICATION_ID}")
                raw.execute("PRAGMA journal_mode=WAL")
            with translated(), engine.begin() as connection:
                create_tables(connection, origin)
            with translated(), engine.connect() as connection:
                # Closing would do this too, but in silence where the disk refuses.
                result = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
                if tuple(result) != (0, 0, 0):
                    raise LedgerWriteError(f"the new log did not reach its file: {tuple(result)}")
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
            with contextlib.suppress(OSError):  # what is left over is hidden, and nobody's
                os.unlink(f"{temporary}{suffix}")


def _raise_named(cause: Exception) -> None:
    if not isinstance(cause, (sqlite3.Error, UnicodeDecodeError)):
        raise name_fault(cause) from cause
    name = getattr(cause, "sqlite_errorname", "") or ""
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        raise LedgerBusyError(retry_after_s=1.0, pending=0) from cause
    if name.startswith(_DISK_REFUSES):
        raise LedgerWriteError(
            f"the disk refused ({cause}): nothing of this was acknowledged; look at its space and health"
        ) from cause
    raise LedgerCorruptError(f"the database refused: {cause}; run fsck") from cause
