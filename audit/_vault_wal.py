"""PostgreSQL's write-ahead log, made to forget what the vault's tables forgot.

A deleted row stays in the segments that were written while it lived. A checkpoint drops none of them for
sure: it renames old segments so that later ones overwrite them, and until then the bytes stay. So `empty`
takes each such segment into use and gives it up again at once, upon which the server pads it with zeros.
That writes as much as the server keeps ready for reuse: at least `min_wal_size` (80 MB unless changed), at
most `max_wal_size`.

Source: PostgreSQL's manual, "WAL Configuration" and "System Administration Functions".
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

_REFUSED: Final = "42501"
_RIGHTS: Final = (
    "this role may not empty PostgreSQL's write-ahead log, which keeps wrapped keys and ciphertexts until "
    "the server overwrites it: as a superuser GRANT pg_checkpoint TO {role} and GRANT EXECUTE ON FUNCTION "
    "pg_switch_wal(), pg_ls_waldir() TO {role}, then run `affidavit vault scrub`"
)
_HELD: Final = (
    "the server keeps {number} older segments of its write-ahead log (the oldest is {oldest}) for a "
    "replication slot, a slow archive or wal_keep_size: let these catch up, then run `affidavit vault scrub`"
)
_SEGMENTS: Final = "SELECT name FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$'"


def empty(connection: Connection) -> str:
    """Overwrite every segment that could hold what was deleted before this call.

    Args:
        connection: in autocommit, once the tables are rewritten.

    Returns:
        what still holds deleted rows, with the remedy; empty when nothing does. Copies made by an archive or
        a standby are out of reach and not spoken of.
    """
    try:
        return _empty(connection)
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", "") != _REFUSED:
            raise
        role = _text(connection, "SELECT quote_ident(current_user)")
        return _RIGHTS.format(role=role)


def _empty(connection: Connection) -> str:
    last = _text(connection, "SELECT pg_walfile_name(pg_current_wal_insert_lsn())")
    _next_segment(connection)
    connection.exec_driver_sql("CHECKPOINT")  # the segments up to `last` are removed, or wait to be reused
    waiting = max(_segments(connection), default="")
    while _text(connection, "SELECT pg_walfile_name(pg_current_wal_insert_lsn())") <= waiting:
        _next_segment(connection)
    connection.exec_driver_sql("CHECKPOINT")  # which also writes out and gives up the last of them
    held = [name for name in _segments(connection) if name <= last]
    return _HELD.format(number=len(held), oldest=min(held)) if held else ""


def _next_segment(connection: Connection) -> None:
    """Give up the segment in use, which is then padded with zeros; without a record in it nothing happens."""
    connection.exec_driver_sql("SELECT pg_logical_emit_message(false, 'affidavit', '')")
    connection.exec_driver_sql("SELECT pg_switch_wal()")


def _segments(connection: Connection) -> list[str]:
    """Return the names of the segments on disk: those in use, kept, and waiting to be reused."""
    return [str(name) for (name,) in connection.exec_driver_sql(_SEGMENTS)]


def _text(connection: Connection, query: str) -> str:
    return str(connection.exec_driver_sql(query).scalar_one())
