"""How much each principal may ask: exact over threads, processes and machines, because one row of one
database counts.

A window is a fixed span of time (a minute, a day) that begins at a multiple of its length. `take` adds to the
window's count in one statement that refuses to pass the limit, so no two workers can both take the last row.
What was refused is not counted. The counts live beside the log: in its PostgreSQL database, or in `quota.db`
of the coordinator's home, which survives a crash of any process; a power cut may lose the last moments.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError

from audit._store import open_engine
from audit.location import log_location
from server.errors import LedgerUnavailableError

FILE: Final = "quota.db"
_TABLE: Final = """
CREATE TABLE IF NOT EXISTS quota_use (
    principal VARCHAR NOT NULL, span_s BIGINT NOT NULL, window_start BIGINT NOT NULL,
    used BIGINT NOT NULL, refused BIGINT NOT NULL,
    PRIMARY KEY (principal, span_s)
)
"""
_MAKING: Final = 0x41465155  # the advisory lock under which the table is made
_TAKE: Final = text("""
INSERT INTO quota_use (principal, span_s, window_start, used, refused)
VALUES (:principal, :span, :start, :count, 0)
ON CONFLICT (principal, span_s) DO UPDATE SET
    used = CASE WHEN quota_use.window_start BETWEEN :start AND :start + :span
        THEN quota_use.used + :count ELSE :count END,
    refused = CASE WHEN quota_use.window_start BETWEEN :start AND :start + :span
        THEN quota_use.refused ELSE 0 END,
    window_start = CASE WHEN quota_use.window_start BETWEEN :start AND :start + :span
        THEN quota_use.window_start ELSE :start END
WHERE quota_use.window_start NOT BETWEEN :start AND :start + :span OR quota_use.used + :count <= :limit
RETURNING window_start
""")
"""A stored window that is over, or so far ahead that only a wrong clock can have begun it, begins anew. One
window ahead is another machine's clock: its window is used until ours gets there.
"""
_REFUSE: Final = text("""
INSERT INTO quota_use (principal, span_s, window_start, used, refused)
VALUES (:principal, :span, :start, 0, 1)
ON CONFLICT (principal, span_s) DO UPDATE SET
    used = CASE WHEN quota_use.window_start BETWEEN :start AND :start + :span
        THEN quota_use.used ELSE 0 END,
    refused = CASE WHEN quota_use.window_start BETWEEN :start AND :start + :span
        THEN quota_use.refused + 1 ELSE 1 END,
    window_start = CASE WHEN quota_use.window_start BETWEEN :start AND :start + :span
        THEN quota_use.window_start ELSE :start END
RETURNING refused, window_start
""")
_GIVE_BACK: Final = text("""
UPDATE quota_use SET used = used - :count
WHERE principal = :principal AND span_s = :span AND window_start = :start
""")


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `rows` in each window of `span_s` seconds."""

    span_s: int
    rows: int


@dataclass(frozen=True, slots=True)
class Taken:
    """What came of asking."""

    allowed: bool
    retry_after_s: int = 0  # whole seconds until the window that refused is over
    is_first: bool = False  # the first refusal of this window, whichever worker refused


class Quotas:
    """The counts of one coordinator."""

    def __init__(self, home: Path, clock: Callable[[], datetime], limits: tuple[Limit, ...]) -> None:
        self.limits = tuple(sorted(limits, key=lambda limit: limit.span_s))
        self._clock = clock
        self._engine = _engine(home) if limits else None

    def take(self, principal: str, rows: int) -> Taken:
        """Count `rows` against every limit, or against none.

        Raises:
            LedgerUnavailableError: the counts cannot be read, so nobody knows whether there is room.
        """
        if self._engine is None:
            return Taken(True)
        now_s = int(self._clock().timestamp())
        try:
            with self._engine.begin() as connection:
                return self._take(connection, principal, rows, now_s)
        except (DBAPIError, OSError) as error:
            raise LedgerUnavailableError("the quotas cannot be counted; there is no answer") from error

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()

    def _take(self, connection: Connection, principal: str, rows: int, now_s: int) -> Taken:
        if connection.dialect.name == "postgresql":  # a count needs no disk: a power cut may lose moments
            connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
        passed: list[dict[str, int | str]] = []
        for limit in self.limits:
            start = now_s - now_s % limit.span_s
            row: dict[str, int | str] = {"principal": principal, "span": limit.span_s, "start": start}
            if rows <= limit.rows:
                found = connection.execute(_TAKE, {**row, "count": rows, "limit": limit.rows}).first()
                if found is not None:
                    passed.append({**row, "start": found.window_start, "count": rows})
                    continue
            for taken in passed:
                connection.execute(_GIVE_BACK, taken)
            refused = connection.execute(_REFUSE, row).one()
            left_s = refused.window_start + limit.span_s - now_s
            return Taken(False, left_s, refused.refused == 1)
        return Taken(True)


def _engine(home: Path) -> Engine:
    location = log_location(home)
    if location.url is not None:
        engine = open_engine(location)
    else:
        path = home / FILE
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 10, "check_same_thread": False})

        @event.listens_for(engine, "connect")
        def _connected(connection: sqlite3.Connection, _: object) -> None:
            connection.isolation_level = None
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    with engine.begin() as connection:
        if location.url is not None:  # CREATE … IF NOT EXISTS races between two that make it at once
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MAKING})")
        connection.execute(text(_TABLE))
    return engine
