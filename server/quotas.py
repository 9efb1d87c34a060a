"""How much each principal may ask: exact over threads, processes and machines, because one row of one
database counts.

A window is a fixed span of time (a minute, a day) that begins at a multiple of its length. `take` adds to the
window's count in one statement that refuses to pass the limit, so no two workers can both take the last row.
Machines whose clocks differ share a window, that of the clock furthest ahead, as long as they differ by no
more than `CLOCKS_S`. Who is behind may meet a used window for longer: by as much as the clocks differ.
What was refused is not counted. Requests that come together are counted in one transaction, and those of one
principal at once, as long as there is room for all of them; else one after the other, as they came.

The counts live beside the log: in its PostgreSQL database, or in `quota.db` of the coordinator's home, which
survives a crash of any process; a power cut may lose the last moments.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, event, text

from audit._bulk import run
from audit._sequencer import Sequencer
from audit._store import open_engine, translated, writing
from audit.errors import AuditError, LedgerBusyError, LedgerWriteError
from audit.location import Location, log_location
from server.errors import LedgerUnavailableError

_logger = logging.getLogger(__name__)

FILE: Final = "quota.db"
_MAX_BATCH: Final = 256
_MAX_PENDING: Final = 4096
CLOCKS_S: Final = 86_400  # machines whose clocks differ by no more than this, and a window, count together
_MAX_STUCK: Final = 2  # locked counts of one batch that are waited for; a count is locked for a moment only
_SETTINGS: Final = text(
    "SELECT set_config('synchronous_commit', 'off', true), set_config('lock_timeout', '500', true)"
)
"""A power cut may lose moments; and who stands still in a transaction keeps nobody else's quota for long."""
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
    used = CASE WHEN quota_use.window_start BETWEEN :start AND :far
        THEN quota_use.used + :count ELSE :count END,
    refused = CASE WHEN quota_use.window_start BETWEEN :start AND :far THEN quota_use.refused ELSE 0 END,
    window_start = CASE WHEN quota_use.window_start BETWEEN :start AND :far
        THEN quota_use.window_start ELSE :start END
WHERE quota_use.window_start NOT BETWEEN :start AND :far OR quota_use.used + :count <= :limit
RETURNING window_start
""")
"""A stored window that is over by our clock begins anew. One that begins later is another machine's, whose
clock is ahead: its window counts until ours gets there. So a window's start never moves backwards, and the
machine that is furthest ahead says for all when the next one begins. Only a window that begins later than
`far` is a broken clock's, and begins anew too, or it would stop its principal for ever.
"""
_REFUSE: Final = text("""
INSERT INTO quota_use (principal, span_s, window_start, used, refused)
VALUES (:principal, :span, :start, 0, 1)
ON CONFLICT (principal, span_s) DO UPDATE SET
    used = CASE WHEN quota_use.window_start BETWEEN :start AND :far THEN quota_use.used ELSE 0 END,
    refused = CASE WHEN quota_use.window_start BETWEEN :start AND :far THEN quota_use.refused + 1 ELSE 1 END,
    window_start = CASE WHEN quota_use.window_start BETWEEN :start AND :far
        THEN quota_use.window_start ELSE :start END
RETURNING refused, window_start
""")
_GIVE_BACK: Final = text("""
UPDATE quota_use SET used = used - :count
WHERE principal = :principal AND span_s = :span AND window_start = :start
""")

_UNCOUNTED: Final = "the quotas cannot be counted; there is no answer"

Ask = tuple[str, int]  # principal and rows


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
        self.most_rows = min((limit.rows for limit in limits), default=0)  # that one request may ask
        self._clock = clock
        self._engine = _engine(home) if limits else None
        self._start()

    def take(self, principal: str, rows: int) -> Taken:
        """Count `rows` against every limit, or against none.

        Raises:
            LedgerUnavailableError: the counts cannot be read, so nobody knows whether there is room.
        """
        return self.take_all([(principal, rows)])[0]

    def take_all(self, asks: Sequence[Ask]) -> list[Taken]:
        """`take` for each of several, together.

        Raises:
            LedgerUnavailableError: as `take`; some may have been counted.
        """
        told = []
        for outcome in self._commit(asks):
            if isinstance(outcome, AuditError):
                raise LedgerUnavailableError(_UNCOUNTED) from outcome
            told.append(outcome)
        return told

    async def taken(self, principal: str, rows: int) -> Taken:
        """`take` beside the loop, together with whoever asks in the same turns of it.

        Raises:
            LedgerUnavailableError: as `take`.
        """
        if self._engine is None:
            return Taken(True)
        if self._pid != os.getpid():  # a forked child has no thread that counts
            self._start()
        try:
            return await self._sequencer.submit_from_loop((principal, rows))
        except AuditError as error:
            raise LedgerUnavailableError(_UNCOUNTED) from error

    def close(self) -> None:
        """Finish what is being counted; may wait for a database, so no event loop calls it."""
        self._sequencer.close()
        if self._engine is not None:
            self._engine.dispose()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._sequencer: Sequencer[Ask, Taken] = Sequencer(
            self._commit, max_batch=_MAX_BATCH, max_pending=_MAX_PENDING
        )

    def _commit(self, asks: Sequence[Ask]) -> list[Taken | AuditError]:
        """Count together; where somebody's count is locked, each principal by itself."""
        principals = sorted({principal for principal, _ in asks})
        try:
            return [*self._counted(asks)]
        except LedgerBusyError as error:
            if len(principals) == 1:
                return _not_counted(asks, error)
        except (AuditError, OSError) as error:
            return _not_counted(asks, error)
        found: dict[str, Iterator[Taken | AuditError]] = {}
        stuck: list[AuditError] = []
        for principal in principals:
            own = [ask for ask in asks if ask[0] == principal]
            if len(stuck) < _MAX_STUCK:
                outcomes = self._commit(own)
                stuck += [outcome for outcome in outcomes[:1] if isinstance(outcome, AuditError)]
            else:
                outcomes = [stuck[-1]] * len(own)
            found[principal] = iter(outcomes)
        return [next(found[principal]) for principal, _ in asks]

    def _counted(self, asks: Sequence[Ask]) -> list[Taken]:
        if self._engine is None:
            return [Taken(True)] * len(asks)
        with _counting(self._engine) as connection:
            return self._take_all(connection, asks, int(self._clock().timestamp()))

    def _take_all(self, connection: Connection, asks: Sequence[Ask], now_s: int) -> list[Taken]:
        wanted: dict[str, list[int]] = {}
        for principal, rows in asks:
            wanted.setdefault(principal, []).append(rows)
        found: dict[str, Iterator[Taken]] = {}
        for principal, counts in sorted(wanted.items()):  # in one order: workers lock these rows on a server
            if len(counts) > 1 and self._full(connection, principal, sum(counts), now_s) is None:
                found[principal] = iter([Taken(True)] * len(counts))
            else:
                each = [self._take(connection, principal, rows, now_s) for rows in counts]
                found[principal] = iter(each)
        return [next(found[principal]) for principal, _ in asks]

    def _take(self, connection: Connection, principal: str, rows: int, now_s: int) -> Taken:
        full = self._full(connection, principal, rows, now_s)
        if full is None:
            return Taken(True)
        row = _window(principal, full, now_s)
        ((refused, window_start),) = run(connection, _REFUSE, row).fetchall()
        return Taken(False, window_start + full.span_s - now_s, refused == 1)

    def _full(self, connection: Connection, principal: str, rows: int, now_s: int) -> Limit | None:
        """Count `rows` against every limit and return None, or against none and return the one in the way."""
        passed: list[dict[str, Any]] = []
        for limit in self.limits:
            row = _window(principal, limit, now_s)
            if rows <= limit.rows:
                taken = run(connection, _TAKE, {**row, "count": rows, "limit": limit.rows}).fetchall()
                if taken:
                    passed.append({**row, "start": taken[0][0], "count": rows})
                    continue
            for each in passed:
                run(connection, _GIVE_BACK, each)
            return limit
        return None


def _window(principal: str, limit: Limit, now_s: int) -> dict[str, Any]:
    start = now_s - now_s % limit.span_s
    far = start + limit.span_s + CLOCKS_S
    return {"principal": principal, "span": limit.span_s, "start": start, "far": far}


def _not_counted(asks: Sequence[Ask], error: AuditError | OSError) -> list[Taken | AuditError]:
    _logger.error("quotas cannot be counted: %s: %s", getattr(error, "code", type(error).__name__), error)
    named = error if isinstance(error, AuditError) else LedgerWriteError(f"quotas: {error}")
    return [named] * len(asks)


@contextlib.contextmanager
def _counting(engine: Engine) -> Iterator[Connection]:
    """A transaction, in its turn among all workers' of one machine or a server's."""
    if engine.dialect.name == "sqlite":
        with writing(engine) as connection:
            yield connection
        return
    with translated(), engine.begin() as connection:
        run(connection, _SETTINGS).fetchall()
        yield connection


def _engine(home: Path) -> Engine:
    location = log_location(home)
    if location.url is not None:
        engine = open_engine(location)
        with engine.begin() as connection:  # CREATE … IF NOT EXISTS races between two that make it at once
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MAKING})")
            connection.execute(text(_TABLE))
        return engine
    path = home / FILE
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    engine = open_engine(Location(path=path))

    @event.listens_for(engine, "connect")
    def _connected(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    with writing(engine) as connection:
        connection.execute(text(_TABLE))
    return engine
