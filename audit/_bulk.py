"""Many rows into one table at once: past SQLAlchemy's own work for each row, by the driver's fastest way.

SQLite takes many rows in a statement, PostgreSQL takes COPY. Rows are tuples in the order of the table's
columns, whose values the caller has validated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

from sqlalchemy import Connection, Integer, LargeBinary, Table
from sqlalchemy.exc import IntegrityError

from audit._postgresql import name_fault

_UNIQUE_VIOLATION = "23505"
_ROWS_AT_ONCE = 64  # sqlite3 gives up and takes back the interpreter's lock once a statement, not once a row


class KnownRowError(Exception):
    """A row with one of these keys is there already; the transaction is lost."""


def insert_rows(
    connection: Connection, table: Table, rows: Sequence[tuple[Any, ...]], *, unless_known: bool = False
) -> None:
    """Insert `rows` in the connection's transaction.

    Raises:
        KnownRowError: with `unless_known`, a unique key refused them.
    """
    if connection.dialect.name == "sqlite":
        try:
            _insert(connection, table, rows)
        except IntegrityError as error:
            if unless_known:
                raise KnownRowError from error
            raise
        return
    _copy(connection, table, rows, unless_known)


def _insert(connection: Connection, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
    whole = len(rows) - len(rows) % _ROWS_AT_ONCE
    for start in range(0, whole, _ROWS_AT_ONCE):
        values = tuple(chain.from_iterable(rows[start : start + _ROWS_AT_ONCE]))
        connection.exec_driver_sql(_insert_statement(table, _ROWS_AT_ONCE), values)
    if whole < len(rows):
        connection.exec_driver_sql(_insert_statement(table, 1), list(rows[whole:]))


def _copy(connection: Connection, table: Table, rows: Sequence[tuple[Any, ...]], unless_known: bool) -> None:
    raw: Any = connection.connection.driver_connection
    driver: Any = connection.dialect.dbapi
    try:
        with raw.cursor() as cursor, cursor.copy(_copy_statement(table)) as copy:
            copy.set_types(_types(table))
            for row in rows:
                copy.write_row(row)
    except driver.Error as error:  # straight from the driver: SQLAlchemy does not see it
        if unless_known and getattr(error, "sqlstate", None) == _UNIQUE_VIOLATION:
            raise KnownRowError from error
        raise name_fault(error) from error


@cache
def _insert_statement(table: Table, rows: int) -> str:
    row = f"({', '.join('?' for _ in table.columns)})"
    return f'INSERT INTO "{table.name}" ({_names(table)}) VALUES {", ".join([row] * rows)}'  # noqa: S608


@cache
def _copy_statement(table: Table) -> str:
    return f'COPY "{table.name}" ({_names(table)}) FROM STDIN (FORMAT BINARY)'


@cache
def _types(table: Table) -> tuple[str, ...]:
    return tuple(
        "int8" if isinstance(kind, Integer) else "bytea" if isinstance(kind, LargeBinary) else "text"
        for kind in (column.type for column in table.columns)
    )


def _names(table: Table) -> str:
    return ", ".join(f'"{column.name}"' for column in table.columns)
