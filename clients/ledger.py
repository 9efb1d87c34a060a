"""The odometer: every noised release of a population, across runs, trials and charters, for good.

Debit, release bytes and statement are one row, written in one durable transaction before anything is sent;
the row is the debit. The same request again finds its row and gets the same bytes. A second file,
`odometer.json`, holds the high-water mark of each population and is raised after each commit: a ledger that
ends below it is an old copy.

Order of calls: `reserve` once a run is accepted, `commit_release` once a round, `mark_delivered` when a
witnessed checkpoint shows the statement, `close_run` at the end. Everything is append-only but the two
marks.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast
from urllib.parse import quote

from sqlalchemy import event, text
from sqlalchemy.engine import URL, Connection, Engine
from sqlmodel import create_engine, delete, insert, select, update

from audit.canonical import JsonValue, canonical_bytes, parse_canonical
from audit.entries import ZERO_DIGEST, MechanismEvent, SiteStatement, body_document, event_hash, parse_body
from audit.errors import AuditError
from clients.errors import HomeError, LedgerBehindError, OdometerError
from clients.high_water import Head, HighWaterMarks
from clients.ledger_tables import MaskedRoundRow, ReleaseRow, ReservationRow, SiteTable
from clients.reserved import committed_events

SCHEMA_VERSION: Final = 1


_RELEASE: Final = ReleaseRow.__table__  # type: ignore[attr-defined]
_RESERVATION: Final = ReservationRow.__table__  # type: ignore[attr-defined]
_MASKED: Final = MaskedRoundRow.__table__  # type: ignore[attr-defined]
_WITHOUT_UPDATE: Final = [column for column in _RELEASE.c if column.name != "update"]  # which may be large


@dataclass(frozen=True, slots=True)
class Release:
    statement: SiteStatement
    update: bytes
    request_digest: str
    delivered: bool


@dataclass(frozen=True, slots=True)
class Spent:
    """What a budget is counted by: one release's run and event."""

    run: str
    event: MechanismEvent


@dataclass(frozen=True, slots=True)
class Reservation:
    run: str
    population: str
    charter: str  # canonical text: a restarted agent goes on from here
    planned: tuple[MechanismEvent, ...]
    acceptance: bytes
    closed: bool


class Odometers(Protocol):
    """What an agent asks of its ledger; `SiteLedger` keeps it on disk, `clients.virtual` in memory."""

    def close(self) -> None: ...
    def head(self, population: str) -> Head: ...
    def populations(self) -> frozenset[str]: ...
    def release_of(self, run: str, server_round: int) -> Release | None: ...
    def releases(self, population: str) -> tuple[Release, ...]: ...
    def spent(self, population: str) -> Sequence[Spent]: ...
    def commit_release(
        self,
        statement: SiteStatement,
        update_file: bytes,
        request_digest: str,
        masked: Mapping[str, JsonValue] | None = None,
    ) -> Release: ...
    def masked_round(self, run: str, server_round: int) -> dict[str, Any] | None: ...
    def masked_rounds(self, run: str) -> tuple[int, ...]: ...
    def put_masked_round(self, run: str, server_round: int, state: Mapping[str, JsonValue]) -> None: ...
    def mark_delivered(self, run: str, server_round: int) -> None: ...
    def undelivered(self, population: str) -> tuple[SiteStatement, ...]: ...
    def reserve(self, reservation: Reservation) -> None: ...
    def reservation(self, run: str) -> Reservation | None: ...
    def open_reservations(self, population: str) -> tuple[Reservation, ...]: ...
    def committed_events(self, population: str) -> tuple[MechanismEvent, ...]: ...
    def close_run(self, run: str) -> None: ...
    def check_not_behind(self, population: str, seen: Head, *, witness: str) -> None: ...


class SiteLedger:
    """One site's ledger; exactly one process holds it at a time, others may look."""

    def __init__(self, path: Path, high_water_path: Path, *, look: bool = False) -> None:
        """Open the ledger that `create` made; a lost one is never taken for a new start.

        With `look` it is only read, also while an agent holds it.

        Raises:
            LedgerBehindError: the ledger ends below its high-water mark.
            HomeError: it is missing or edited, of another release, or another process holds it.
        """
        self._path, self._marks = path, HighWaterMarks(high_water_path)
        self._mutex = threading.RLock()
        self._is_look = look
        self._spent: dict[str, list[Spent]] = {}  # read once: nobody else writes while this process holds it
        self._lock = -1 if look else _exclusive_lock(path.with_suffix(".lock"))
        self._engine = _engine(path, look=look)
        try:
            self._check_schema()
            if not look:  # an older release's ledger lacks the table that masked rounds need
                _MASKED.create(self._engine, checkfirst=True)
            for population, seen in self._marks.read().items():
                self.check_not_behind(population, seen, witness=str(high_water_path))
            self._check_chains()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, high_water_path: Path) -> SiteLedger:
        """Make the empty ledger of a new site, once.

        Raises:
            HomeError: the site has one, or had one.
        """
        if path.exists() or high_water_path.exists():
            raise HomeError(path, "is there already, or was", "restore it; a ledger never starts over")
        engine = _engine(path)
        with engine.begin() as connection:
            SiteTable.metadata.create_all(connection)
            connection.execute(text(f"PRAGMA user_version = {SCHEMA_VERSION}"))
        engine.dispose()
        return cls(path, high_water_path)

    def close(self) -> None:
        with self._mutex:
            self._engine.dispose()
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def head(self, population: str) -> Head:
        """Return the last event of the population: sequence 0 and zeros before the first."""
        with self._read() as connection:
            return _head(connection, population)

    def populations(self) -> frozenset[str]:
        """Return every population that anything was released or reserved for."""
        with self._read() as connection:
            return frozenset(
                name
                for table in (_RELEASE, _RESERVATION)
                for (name,) in connection.execute(select(table.c.population).distinct())
            )

    def release_of(self, run: str, server_round: int) -> Release | None:
        with self._read() as connection:
            found = connection.execute(
                select(_RELEASE).where(_RELEASE.c.run == run, _RELEASE.c.round == server_round)
            ).one_or_none()
        return None if found is None else _release(found)

    def releases(self, population: str) -> tuple[Release, ...]:
        """Return every release of the population, in order."""
        with self._read() as connection:
            rows = connection.execute(
                select(_RELEASE).where(_RELEASE.c.population == population).order_by(_RELEASE.c.sequence)
            ).all()
        return tuple(_release(row) for row in rows)

    def events(self, population: str) -> tuple[MechanismEvent, ...]:
        return tuple(spent.event for spent in self.spent(population))

    def spent(self, population: str) -> Sequence[Spent]:
        """Return what the population has released, in order, without the released bytes."""
        with self._mutex:
            known = self._spent.get(population)
            if known is None or self._is_look:
                query = select(*_WITHOUT_UPDATE).where(_RELEASE.c.population == population)
                with self._read() as connection:
                    rows = connection.execute(query.order_by(_RELEASE.c.sequence))
                    known = [Spent(row.run, _statement(row).event) for row in rows]
                self._spent[population] = known
            return tuple(known)

    def commit_release(
        self,
        statement: SiteStatement,
        update_file: bytes,
        request_digest: str,
        masked: Mapping[str, JsonValue] | None = None,
    ) -> Release:
        """Write debit, bytes and statement in one durable transaction; only then may anything be sent.

        `masked` is what the site knows of the round from here on, where its update is masked.

        Raises:
            OdometerError: the statement does not continue the odometer, or the round was released before.
        """
        with self._write() as connection:
            head = _head(connection, statement.population)
            if (statement.sequence, statement.previous_event) != (head.sequence + 1, head.event_hash):
                raise OdometerError(
                    f"release {statement.sequence} after event {statement.previous_event[:8]} does not "
                    f"continue the odometer, which stands at {head.sequence} ({head.event_hash[:8]})"
                )
            taken = select(_RELEASE.c.id).where(
                _RELEASE.c.run == statement.run, _RELEASE.c.round == statement.round
            )
            if connection.execute(taken).first() is not None:
                raise OdometerError(f"run {statement.run} round {statement.round} was released before")
            connection.execute(
                insert(_RELEASE).values(
                    population=statement.population,
                    sequence=statement.sequence,
                    run=statement.run,
                    round=statement.round,
                    charter=statement.charter,
                    request_digest=request_digest,
                    event_hash=event_hash(statement),
                    statement=canonical_bytes(body_document(statement)),
                    update=update_file,
                    delivered=0,
                )
            )
            if masked is not None:
                _put_masked(connection, statement.run, statement.round, masked)
        if statement.population in self._spent:
            self._spent[statement.population].append(Spent(statement.run, statement.event))
        self._marks.raise_to(statement.population, Head(statement.sequence, event_hash(statement)))
        return Release(statement, update_file, request_digest, False)

    def masked_round(self, run: str, server_round: int) -> dict[str, Any] | None:
        """Return what the site knows of a masked round."""
        with self._read() as connection:
            found = connection.execute(
                select(_MASKED.c.state).where(_MASKED.c.run == run, _MASKED.c.round == server_round)
            ).scalar_one_or_none()
        return None if found is None else cast("dict[str, Any]", parse_canonical(found))

    def put_masked_round(self, run: str, server_round: int, state: Mapping[str, JsonValue]) -> None:
        """Keep what the site knows of a masked round, before it answers from it.

        Where less is kept than before, the write-ahead log, which could still tell, is emptied.
        """
        before = self.masked_round(run, server_round) or {}
        with self._write() as connection:
            _put_masked(connection, run, server_round, state)
        if not before.keys() <= state.keys():
            with self._mutex:
                raw = self._engine.raw_connection()
                try:
                    raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
                finally:
                    raw.close()

    def masked_rounds(self, run: str) -> tuple[int, ...]:
        """Return the numbers of a run's masked rounds, ascending."""
        with self._read() as connection:
            rows = connection.execute(select(_MASKED.c.round).where(_MASKED.c.run == run)).all()
        return tuple(sorted(number for (number,) in rows))

    def mark_delivered(self, run: str, server_round: int) -> None:
        """Note that a witnessed checkpoint shows the release."""
        with self._write() as connection:
            connection.execute(
                update(_RELEASE)
                .where(_RELEASE.c.run == run, _RELEASE.c.round == server_round)
                .values(delivered=1)
            )

    def undelivered(self, population: str) -> tuple[SiteStatement, ...]:
        """Return the releases that no witnessed checkpoint has shown yet; they stay debited."""
        query = select(*_WITHOUT_UPDATE).where(_RELEASE.c.population == population, _RELEASE.c.delivered == 0)
        with self._read() as connection:
            rows = connection.execute(query.order_by(_RELEASE.c.sequence)).all()
        return tuple(_statement(row) for row in rows)

    def reserve(self, reservation: Reservation) -> None:
        """Set a run's whole plan aside; one open run has a population.

        Raises:
            OdometerError: the run was accepted before, or another one is open.
        """
        with self._write() as connection:
            taken = select(_RESERVATION.c.run).where(_RESERVATION.c.run == reservation.run)
            if connection.execute(taken).first():
                raise OdometerError(f"run {reservation.run} was accepted before")
            other = select(_RESERVATION.c.run).where(
                _RESERVATION.c.population == reservation.population, _RESERVATION.c.closed == 0
            )
            if busy := connection.execute(other).first():
                raise OdometerError(f"run {busy.run} has the population until it ends")
            connection.execute(
                insert(_RESERVATION).values(
                    run=reservation.run,
                    population=reservation.population,
                    charter=reservation.charter,
                    planned=canonical_bytes([body_document(planned) for planned in reservation.planned]),
                    acceptance=reservation.acceptance,
                    closed=0,
                )
            )

    def reservation(self, run: str) -> Reservation | None:
        with self._read() as connection:
            row = connection.execute(select(_RESERVATION).where(_RESERVATION.c.run == run)).one_or_none()
        return None if row is None else _reservation(row)

    def open_reservations(self, population: str) -> tuple[Reservation, ...]:
        with self._read() as connection:
            rows = connection.execute(
                select(_RESERVATION)
                .where(_RESERVATION.c.population == population, _RESERVATION.c.closed == 0)
                .order_by(_RESERVATION.c.run)
            ).all()
        return tuple(_reservation(row) for row in rows)

    def committed_events(self, population: str) -> tuple[MechanismEvent, ...]:
        """Return what is spent and what open runs may still spend: the events a new plan comes on top of."""
        return committed_events(self, population)

    def close_run(self, run: str) -> None:
        """End a run: no further round of it is answered, and what it had not used is free again."""
        with self._write() as connection:
            connection.execute(update(_RESERVATION).where(_RESERVATION.c.run == run).values(closed=1))

    def _check_schema(self) -> None:
        if not self._path.exists():
            raise HomeError(
                self._path, "is missing", "restore it from the site's own backup; it never starts over"
            )
        with self._read() as connection:
            version = connection.execute(text("PRAGMA user_version")).scalar_one()
        if version != SCHEMA_VERSION:
            raise HomeError(
                self._path,
                f"has schema {version}",
                f"use a release that reads it; this one reads {SCHEMA_VERSION}",
            )

    def _check_chains(self) -> None:
        """Count every population's releases from 1 and follow their hashes: what is counted is spent."""
        with self._read() as connection:
            rows = connection.execute(
                select(*_WITHOUT_UPDATE).order_by(_RELEASE.c.population, _RELEASE.c.sequence)
            )
            heads: dict[str, Head] = {}
            for row in rows:
                last = heads.get(row.population, Head(0, ZERO_DIGEST))
                if not _continues(row, last):
                    problem = f"release {last.sequence + 1} of population {row.population} is missing"
                    fix = "restore the file from the site's own backup"
                    raise HomeError(self._path, f"{problem} or was altered", fix)
                heads[row.population] = Head(row.sequence, row.event_hash)

    def check_not_behind(self, population: str, seen: Head, *, witness: str) -> None:
        """Compare the ledger with an event that this population is known to have released.

        Raises:
            LedgerBehindError: the ledger lacks that event, or has another one in its place.
        """
        with self._read() as connection:
            own = connection.execute(
                select(_RELEASE.c.event_hash).where(
                    _RELEASE.c.population == population, _RELEASE.c.sequence == seen.sequence
                )
            ).scalar_one_or_none()
            head = _head(connection, population)
        if own != seen.event_hash:
            raise LedgerBehindError(
                population=population, ledger=head.sequence, seen=seen.sequence, witness=witness
            )

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._mutex, self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._mutex, self._engine.begin() as connection:
            yield connection


def _engine(path: Path, *, look: bool = False) -> Engine:
    if look:
        name = f"file:{quote(str(path.absolute()))}"
        url = URL.create("sqlite", database=name, query={"mode": "ro", "uri": "true"})
    else:
        url = URL.create("sqlite", database=str(path))
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        if not look:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")  # keys of a masked round do not linger

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN" if look else "BEGIN IMMEDIATE")

    return engine


def _put_masked(connection: Connection, run: str, number: int, state: Mapping[str, JsonValue]) -> None:
    connection.execute(delete(_MASKED).where(_MASKED.c.run == run, _MASKED.c.round == number))
    connection.execute(insert(_MASKED).values(run=run, round=number, state=canonical_bytes(dict(state))))


def _exclusive_lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise HomeError(
            path, "another process holds this site's ledger", "stop the other agent first"
        ) from error
    return descriptor


def _head(connection: Connection, population: str) -> Head:
    row = connection.execute(
        select(_RELEASE.c.sequence, _RELEASE.c.event_hash)
        .where(_RELEASE.c.population == population)
        .order_by(_RELEASE.c.sequence.desc())
        .limit(1)
    ).one_or_none()
    return Head(0, ZERO_DIGEST) if row is None else Head(row[0], row[1])


def _continues(row: Any, last: Head) -> bool:
    """Whether a row's columns say what its statement says, and the statement follows the last event."""
    try:
        statement = _statement(row)
    except (AuditError, AttributeError):  # SQLite gives text where text was written in place of bytes
        return False
    told = (row.population, row.sequence, row.run, row.round, row.event_hash)
    return (statement.sequence, statement.previous_event) == (
        last.sequence + 1,
        last.event_hash,
    ) and told == (
        statement.population,
        statement.sequence,
        statement.run,
        statement.round,
        event_hash(statement),
    )


def _statement(row: Any) -> SiteStatement:
    return parse_body(SiteStatement, parse_canonical(row.statement))


def _release(row: Any) -> Release:
    statement = _statement(row)
    return Release(statement, row.update, row.request_digest, bool(row.delivered))


def _reservation(row: Any) -> Reservation:
    document = parse_canonical(row.planned)
    if not isinstance(document, list):
        raise OdometerError(f"the reservation of run {row.run} is damaged")
    planned = tuple(parse_body(MechanismEvent, item) for item in document)
    return Reservation(row.run, row.population, row.charter, planned, row.acceptance, bool(row.closed))
