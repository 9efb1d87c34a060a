"""A PostgreSQL log as the examination reads it: one read-only snapshot, and the server's own checks.

Indices are checked by the `amcheck` extension where the database has it and the role may call it. Otherwise
each index is made to answer for every row and compared with the table, which finds entries that an index
lost, gained or put under another key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import Connection, CursorResult, Index, inspect, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError

from audit import _store
from audit._fsck_rows import HEAD_ROWS, NODE_ROWS, NOTE_ROWS, REVISION_ROWS, FoundError, Text, leaf_rows
from audit.errors import AuditError
from audit.location import Location
from audit.tables import HEAD, schema

_FETCH: Final = 1000
_TABLES: Final = tuple(sorted(schema().tables))
_OURS: Final = "ARRAY(SELECT to_regclass(name)::oid FROM unnest(CAST(:tables AS text[])) AS name)"


@contextmanager
def examining_server(location: Location) -> Iterator[ServerRows]:
    """Open one snapshot of the log, whatever writers do meanwhile.

    Raises:
        FoundError: inside the block too, when the server cannot read on.
    """
    try:
        engine = _store.open_engine(location)
    except AuditError as error:
        raise FoundError("unreadable", "", str(error)) from error
    try:
        with _store.reading(engine) as connection:
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            rows = ServerRows(connection)
            try:
                yield rows
            finally:
                rows.close()
    except AuditError as error:
        raise FoundError("unreadable", "", str(error)) from error
    finally:
        engine.dispose()


class ServerRows:
    """`LogRows` of a database."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._open: list[CursorResult[Any]] = []

    def close(self) -> None:
        """Close what was not read to its end."""
        for result in self._open:
            result.close()

    def check_schema(self) -> None:
        inspector = inspect(self._connection)
        if not inspector.has_table(HEAD.name):
            raise FoundError("schema", "head", "the database holds no Affidavit log")
        dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
        for name in _TABLES:
            table = schema().tables[name]
            if not inspector.has_table(name):
                raise FoundError("schema", name, "is missing; an older log needs `affidavit db upgrade`")
            expected = {
                column.name: (column.type.compile(dialect), column.nullable, None) for column in table.columns
            }
            found = {
                column["name"]: (column["type"].compile(dialect), column["nullable"], column["default"])
                for column in inspector.get_columns(name)
            }
            for column in sorted(expected.keys() | found.keys()):
                if expected.get(column) != found.get(column):
                    raise FoundError("schema", f"{name}.{column}", "is not as this release defines it")
            keys = inspector.get_pk_constraint(name)["constrained_columns"]
            if keys != [column.name for column in table.primary_key]:
                raise FoundError("schema", name, "has another primary key than this release defines")
            indices = {
                (tuple(index["column_names"]), bool(index["unique"]), _predicate(index))
                for index in inspector.get_indexes(name)
            }
            wanted = {
                (tuple(column.name for column in index.columns), False, _wanted_predicate(index))
                for index in table.indexes
            }
            wanted |= {((column.name,), True, "") for column in table.columns if column.unique}
            if indices != wanted:
                raise FoundError("schema", name, "has other indices than this release defines")
        for kind, query in _FOREIGN.items():
            row = self._connection.execute(text(query), {"tables": list(_TABLES)}).first()
            if row is not None:
                raise FoundError("schema", f"{row[1]}.{row[0]}", f"is a {kind} that we never made")

    def check_integrity(self) -> None:
        invalid = self._connection.execute(text(_INVALID), {"tables": list(_TABLES)}).first()
        if invalid is not None:
            raise FoundError("integrity", str(invalid[0]), "is an index that the server holds for invalid")
        if not self._amcheck():
            self._compare_indices()

    def head(self) -> Iterable[Any]:
        return self._rows(HEAD_ROWS)

    def revisions(self) -> Iterable[Any]:
        return self._rows(REVISION_ROWS)

    def notes(self) -> Iterable[Any]:
        return self._rows(NOTE_ROWS)

    def nodes(self) -> Iterable[Any]:
        return self._rows(NODE_ROWS)

    def leaves(self, columns: Sequence[str]) -> Iterable[Any]:
        return self._rows(leaf_rows(columns))

    def _rows(self, query: str) -> Iterator[tuple[Any, ...]]:
        """Yield rows in their table's order; sorted from the table itself, never through an index."""
        self._allow_only("seqscan")
        options = {"stream_results": True, "max_row_buffer": _FETCH}
        result = self._connection.execute(text(query), execution_options=options)
        self._open.append(result)
        for row in result:
            yield tuple(Text(value.encode()) if isinstance(value, str) else value for value in row)

    def _amcheck(self) -> bool:
        """Have the server check every index and table of ours; say whether it could."""
        usable = self._connection.execute(text(_AMCHECK)).scalar()
        if not usable:
            return False
        indices = self._connection.execute(text(_INDICES), {"tables": list(_TABLES)}).all()
        for oid, name in indices:
            try:
                with self._connection.begin_nested():
                    self._connection.execute(text("SELECT bt_index_check(:oid, true)"), {"oid": oid})
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", "") in ("25006", "55000"):  # a standby takes no such lock
                    return False
                raise FoundError("integrity", str(name), _first_line(error)) from error
        for table in _TABLES:
            asked = text("SELECT blkno, offnum, msg FROM verify_heapam(to_regclass(:name))")
            for block, offset, message in self._connection.execute(asked, {"name": table}):
                raise FoundError("integrity", f"{table} block {block} item {offset}", str(message))
        return True

    def _compare_indices(self) -> None:
        for table_name in _TABLES:
            table = schema().tables[table_name]
            key = " || ',' || ".join(f'"{column.name}"::text' for column in table.primary_key)
            names = [index.columns.keys()[0] for index in table.indexes]
            names += [column.name for column in table.columns if column.unique]
            for name in names:
                digest = f"sum(hashtextextended(\"{name}\" || ' ' || {key}, 0)::numeric)"
                rows = f'SELECT * FROM "{table_name}" WHERE "{name}" IS NOT NULL ORDER BY "{name}"'  # noqa: S608
                query = f"SELECT count(*), {digest} FROM ({rows}) AS asked"  # noqa: S608 - names of ours
                sums = []
                for scan in ("seqscan", "indexscan"):
                    self._allow_only(scan)
                    sums.append(tuple(self._connection.exec_driver_sql(query).one()))
                if sums[0] != sums[1]:
                    raise FoundError("integrity", f"{table_name}.{name}", "its index differs from its table")
        self._allow_only("seqscan")

    def _allow_only(self, allowed: str) -> None:
        for scan in ("seqscan", "indexscan", "indexonlyscan", "bitmapscan"):
            value = "on" if scan == allowed else "off"
            self._connection.exec_driver_sql(f"SET LOCAL enable_{scan} = {value}")


def _predicate(index: Mapping[str, Any]) -> str:
    return str(index.get("dialect_options", {}).get("postgresql_where", "")).strip("()")


def _wanted_predicate(index: Index) -> str:
    where = index.dialect_options["postgresql"]["where"]
    return "" if where is None else str(where)


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).partition("\n")[0]


_AMCHECK: Final = """
SELECT count(*) = 2 FROM pg_extension e
  JOIN pg_depend d ON d.refobjid = e.oid AND d.refclassid = 'pg_extension'::regclass
  JOIN pg_proc p ON p.oid = d.objid AND d.classid = 'pg_proc'::regclass
 WHERE e.extname = 'amcheck' AND has_function_privilege(p.oid, 'EXECUTE') AND pg_function_is_visible(p.oid)
   AND (p.proname = 'verify_heapam' OR (p.proname = 'bt_index_check' AND p.pronargs = 2))
"""
_INDICES: Final = f"""
SELECT i.indexrelid, i.indexrelid::regclass FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
  JOIN pg_am a ON a.oid = c.relam WHERE a.amname = 'btree' AND i.indrelid = ANY({_OURS}) ORDER BY 2
"""  # noqa: S608
_INVALID: Final = f"""
SELECT indexrelid::regclass FROM pg_index WHERE NOT (indisvalid AND indisready) AND indrelid = ANY({_OURS})
"""  # noqa: S608
_FOREIGN: Final = {
    "trigger": f"""SELECT tgname, tgrelid::regclass FROM pg_trigger
        WHERE NOT tgisinternal AND tgrelid = ANY({_OURS})""",  # noqa: S608
    "rule": f"SELECT rulename, ev_class::regclass FROM pg_rewrite WHERE ev_class = ANY({_OURS})",  # noqa: S608
    "row policy": f"SELECT polname, polrelid::regclass FROM pg_policy WHERE polrelid = ANY({_OURS})",  # noqa: S608
    "child table": f"""SELECT inhrelid::regclass, inhparent::regclass FROM pg_inherits
        WHERE inhparent = ANY({_OURS})""",  # noqa: S608
}
