"""The vault's database: how it is created, opened, locked, and made to forget.

Deleted rows are overwritten (`secure_delete`), and `scrub` rewrites the file and empties the WAL. On
PostgreSQL `scrub` rewrites the tables, sees that the planner remembers nothing of them
(`audit._vault_statistics`), and overwrites the write-ahead log (`audit._vault_wal`). What the archive of that
and standbys still hold is under the master key, which is not in the database.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, event, insert, inspect, select

from audit import _store, _vault_statistics, _vault_wal
from audit.errors import AuditError, LedgerBusyError
from audit.location import Location
from audit.vault_tables import (
    ERASURE,
    RECORD,
    SUBJECT,
    VAULT_APPLICATION_ID,
    VAULT_HEAD,
    VAULT_MIGRATION,
    VAULT_SCHEMA_VERSION,
)

_FOLDER: Final = Path(__file__).with_name("vault_migrations")
_TABLES: Final = (SUBJECT.name, RECORD.name, ERASURE.name)
_BUSY: Final = "others kept the vault busy: run `affidavit vault scrub` to rewrite freed pages"


class VaultMissingError(AuditError):
    """There is no vault, or it is of another release or another log."""

    code = "vault.missing"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


@dataclass(frozen=True, slots=True)
class Scrub:
    """How far a rewrite came; true when nothing deleted is left."""

    rewritten: bool  # the file, or the tables
    left: str = ""  # what still holds deleted rows, and the remedy

    def __bool__(self) -> bool:
        return not self.left


def open_engine(location: Location) -> Engine:
    """Return the vault's engine; connects to nothing yet."""
    engine = _store.open_engine(location)
    if location.path is not None:

        @event.listens_for(engine, "connect")
        def _connected(raw: Any, _: object) -> None:
            raw.execute("PRAGMA secure_delete=ON")

    return engine


def exists(location: Location) -> bool:
    """Whether there is a vault at this place."""
    if location.path is not None:
        return location.path.is_file()
    engine = open_engine(location)
    try:
        with _store.reading(engine) as connection:
            return inspect(connection).has_table(VAULT_HEAD.name)
    finally:
        engine.dispose()


def create(location: Location, origin: str, key_check: bytes) -> None:
    """Make an empty vault.

    Raises:
        VaultMissingError: there is one already, or its folder cannot be written.
    """
    if location.path is not None:
        _create_file(location.path)
    engine = open_engine(location)
    row = {
        "id": 1,
        "schema_version": VAULT_SCHEMA_VERSION,
        "origin": origin,
        "key_check": key_check,
        "erased_until": 0,
        "swept_until": "",
    }
    options = {_store._WRITE: True}
    try:
        with (
            _store.translated(),
            engine.connect().execution_options(**options) as connection,
            connection.begin(),
        ):
            if location.url is not None:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({VAULT_APPLICATION_ID})")
                if inspect(connection).has_table(VAULT_HEAD.name):
                    raise VaultMissingError(str(location), "holds a vault already")
            migrate(connection)
            if location.url is not None:
                _vault_statistics.forbid(connection)
            connection.execute(insert(VAULT_HEAD), row)
    except BaseException:
        engine.dispose()
        if location.path is not None:
            location.path.unlink(missing_ok=True)
        raise
    engine.dispose()


def migrate(connection: Connection, revision: str = "head") -> None:
    """Run the vault's migrations inside the connection's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[tuple[Connection, Any]]:
    """A transaction that holds the vault's write lock, with the head's row; durable when the block ends."""
    options = {_store._WRITE: True}
    with (
        _store._turn_of(engine),
        _store.translated(),
        engine.connect().execution_options(**options) as connection,
        connection.begin(),
    ):
        query = select(VAULT_HEAD).where(VAULT_HEAD.c.id == 1)
        if engine.dialect.name != "sqlite":
            query = query.with_for_update()
        yield connection, connection.execute(query).one()


def scrub(location: Location, patience_s: float = _store.BUSY_TIMEOUT_S) -> Scrub:
    """Rewrite what was deleted away; say whether anything stood in the way.

    SQLite: VACUUM, then a WAL checkpoint that truncates, which waits for readers. PostgreSQL: VACUUM FULL of
    the vault's tables, then the write-ahead log, where the role may and the server lets go of it.
    """
    try:
        if location.path is None:
            return Scrub(rewritten=True, left=_scrub_server(location))
        if _scrub_file(location.path, patience_s):
            return Scrub(rewritten=True)
    except LedgerBusyError:
        pass
    return Scrub(rewritten=False, left=_BUSY)


def revision(connection: Connection) -> str:
    return str(connection.execute(select(VAULT_MIGRATION.c.version_num)).scalar_one())


def _scrub_file(path: Path, patience_s: float) -> bool:
    with _store.translated(), contextlib.closing(_store.connect(path)) as connection:
        connection.execute(f"PRAGMA busy_timeout={int(patience_s * 1000)}")
        connection.execute("PRAGMA secure_delete=ON")
        connection.execute("VACUUM")
        busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy


def _scrub_server(location: Location) -> str:
    engine = open_engine(location)
    try:
        with (
            _store.translated(),
            engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
        ):
            connection.exec_driver_sql("SET statement_timeout = 0")
            for name in _TABLES:
                connection.exec_driver_sql(f"VACUUM (FULL) {name}")
            left = _vault_statistics.drop(connection), _vault_wal.empty(connection)
            return "; ".join(filter(None, left))
    finally:
        engine.dispose()


def _create_file(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError as error:
        raise VaultMissingError(str(path), "is there already; a vault is never made anew over one") from error
    except OSError as error:
        raise VaultMissingError(str(path), f"cannot be made: {error.strerror}") from error
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute(f"PRAGMA application_id={VAULT_APPLICATION_ID}")
        raw.execute("PRAGMA journal_mode=WAL")
