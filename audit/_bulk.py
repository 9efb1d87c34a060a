"""Many rows into one table at once, and the few statements around them: past SQLAlchemy's own work each time.

SQLite takes many rows in a statement, PostgreSQL takes COPY. Rows are tuples in the order of the table's
columns, whose values the caller has validated. Other statements are compiled by SQLAlchemy, once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

from sqlalchemy import Connection, Dialect, Executable, Integer, LargeBinary, Table

from audit._postgresql import name_fault

_NONE: Mapping[str, Any] = {}
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
    raw: Any = connection.connection.driver_connection
    driver: Any = connection.dialect.dbapi
    put = _insert if connection.dialect.name == "sqlite" else _copy
    try:
        put(raw, table, rows)
    except driver.Error as error:  # straight from the driver: SQLAlchemy does not see it
        if unless_known and _is_unique_violation(error):
            raise KnownRowError from error
        if isinstance(error, sqlite3.Error):
            raise  # named where the transaction ends
        raise name_fault(error) from error


def run(connection: Connection, statement: Executable, values: Mapping[str, Any] = _NONE) -> Any:
    """Run a statement that is made once for all calls, and return the driver's cursor."""
    text, names, fixed = _compiled(connection.dialect.name, statement, connection.dialect)
    raw: Any = connection.connection.driver_connection
    driver: Any = connection.dialect.dbapi
    given = {**fixed, **values} if fixed else values
    try:
        return raw.execute(text, given if names is None else [given[name] for name in names])
    except driver.Error as error:
        if isinstance(error, sqlite3.Error):
            raise  # named where the transaction ends
        raise name_fault(error) from error


_texts: dict[tuple[str, Executable], tuple[str, tuple[str, ...] | None, dict[str, Any]]] = {}


def _compiled(
    database: str, statement: Executable, dialect: Dialect
) -> tuple[str, tuple[str, ...] | None, dict[str, Any]]:
    """The statement's text, its parameters in their order where they have no names, and those with values."""
    found = _texts.get((database, statement))
    if found is None:
        compiled: Any = statement.compile(dialect=dialect)  # type: ignore[attr-defined] # every clause has it
        fixed = {name: value for name, value in compiled.params.items() if value is not None}
        names = tuple(compiled.positiontup) if compiled.positional else None
        found = _texts[database, statement] = str(compiled), names, fixed
    return found


def _is_unique_violation(error: Exception) -> bool:
    return isinstance(error, sqlite3.IntegrityError) or getattr(error, "sqlstate", None) == "23505"


def _insert(raw: Any, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
    whole = len(rows) - len(rows) % _ROWS_AT_ONCE
    for start in range(0, whole, _ROWS_AT_ONCE):
        values = tuple(chain.from_iterable(rows[start : start + _ROWS_AT_ONCE]))
        raw.execute(_insert_statement(table, _ROWS_AT_ONCE), values)
    if whole < len(rows):
        raw.executemany(_insert_statement(table, 1), rows[whole:])


def _copy(raw: Any, table: Table, rows: Sequence[tuple[Any, ...]]) -> None:
    with raw.cursor() as cursor, cursor.copy(_copy_statement(table)) as copy:
        copy.set_types(_types(table))
        for row in rows:
            copy.write_row(row)


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
