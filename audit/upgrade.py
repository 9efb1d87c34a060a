"""`affidavit db upgrade`: brings the schema of an older release's log to this release's.

Every migration runs in one transaction with the write lock held, so that a crash, or a second process doing
the same, leaves either the old schema or the new. No migration changes a leaf: old proofs verify after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, inspect, select

from audit import _store
from audit.errors import LedgerMissingError, LedgerSchemaError
from audit.location import Location
from audit.tables import APPLICATION_ID, HEAD, MIGRATION, SCHEMA_VERSION

_FOLDER = Path(__file__).with_name("migrations")
_FIRST = "0001"


@dataclass(frozen=True, slots=True)
class UpgradeReport:
    location: str
    before: int  # schema versions
    after: int


def upgrade(place: Location | Path | str) -> UpgradeReport:
    """Upgrade the log at `place`; does nothing to one of this release.

    Raises:
        LedgerMissingError: there is no log.
        LedgerSchemaError: it is of a newer release.
        LedgerBusyError: other processes kept the write lock.
    """
    location = Location.parse(place)
    if location.path is not None and not location.path.is_file():
        raise LedgerMissingError(str(location), "no such file")
    engine = _store.open_engine(location)
    try:
        with _store.reading(engine) as connection:
            _check_kind(connection, location)
        with _store.writing(engine) as connection:
            before = connection.execute(select(HEAD.c.schema_version)).scalar_one()
            if before > SCHEMA_VERSION:
                raise LedgerSchemaError(str(location), found=before, expected=SCHEMA_VERSION)
            if before < SCHEMA_VERSION:
                if not inspect(connection).has_table(MIGRATION.name):  # the first release kept none
                    MIGRATION.create(connection)
                    connection.execute(MIGRATION.insert().values(version_num=_FIRST))
                migrate(connection, "head")
            after = connection.execute(select(HEAD.c.schema_version)).scalar_one()
    finally:
        engine.dispose()
    return UpgradeReport(str(location), before, after)


def migrate(connection: Connection, revision: str) -> None:
    """Run the migrations up to `revision` inside the connection's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def _check_kind(connection: Connection, location: Location) -> None:
    if location.path is None:
        known = inspect(connection).has_table(HEAD.name)
    else:
        known = connection.exec_driver_sql("PRAGMA application_id").scalar() == APPLICATION_ID
    if not known:
        raise LedgerMissingError(str(location), "what is there is not an Affidavit log")
