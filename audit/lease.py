"""A lease in the log's database: one owner at a time, for a limited time, told apart by a growing token.

The token is the fence: an owner that slept through its expiry is refused by the number, not by its clock.
Time is PostgreSQL's own, or the machine's for SQLite, whose users share one machine. A lease decides who
publishes; that nobody signs two histories is the signer's state and the witnesses' doing, and needs no clock.
A clock that is set back makes nobody wait for longer than a lease can last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, Engine, bindparam, insert, literal, select, text, update

from audit import _store
from audit._bulk import run
from audit.errors import LeaseLostError
from audit.tables import LEASE

MAX_TTL_S: Final = 600.0

_ROW: Final = LEASE.c.name == bindparam("of")
_READ: Final = select(LEASE.c.owner, LEASE.c.token, LEASE.c.expires_ms, LEASE.c.published_ms).where(_ROW)
_TAKE: Final = (
    update(LEASE)
    .where(_ROW)
    .values(owner=bindparam("to_owner"), token=bindparam("to_token"), expires_ms=bindparam("until_ms"))
)
_MINE: Final = (LEASE.c.owner == bindparam("own_owner")) & (LEASE.c.token == bindparam("own_token"))
_RELEASE: Final = update(LEASE).where(_ROW, _MINE).values(owner=literal(""), expires_ms=literal(0))
_NOTE: Final = (
    update(LEASE).where(_ROW).values(published_ms=bindparam("at_ms"), expires_ms=bindparam("until_ms"))
)


@dataclass(frozen=True, slots=True)
class LeaseState:
    """Who holds a lease, as the database says."""

    owner: str  # empty: nobody
    token: int
    expires_ms: int
    published_ms: int
    now_ms: int

    @property
    def is_free(self) -> bool:
        """Nobody's, over, or of a time that no owner can have asked for: then the clock was set back."""
        left_ms = self.expires_ms - self.now_ms
        return not self.owner or not 0 < left_ms <= MAX_TTL_S * 1000


class Lease:
    """One owner's view of a named lease. `owner` is unique to a process's life, such as a random text."""

    def __init__(
        self, engine: Engine, name: str, owner: str, *, ttl_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        if not 0 < ttl_s <= MAX_TTL_S:
            raise ValueError(f"a lease lasts up to {MAX_TTL_S} s, not {ttl_s}")
        self.name, self.owner, self.ttl_s = name, owner, ttl_s
        self.token = 0  # 0: never held
        self._engine, self._clock = engine, clock

    def acquire(self) -> bool:
        """Take the lease if it is free or ours, prolong it once half of it is over; say whether it is ours.

        `token` is a new one each time that the lease changes hands. Whoever finds that there is nothing to
        write waits for no writer.
        """
        seen = self.state()
        if seen is not None and not seen.is_free:
            if not self._is_mine(seen):
                return False
            if seen.expires_ms - seen.now_ms > 500 * self.ttl_s:
                return True
        with _store.writing(self._engine) as connection:
            state = self._read(connection)
            now_ms = self._now_ms(connection)
            expires_ms = now_ms + int(self.ttl_s * 1000)
            if state is None:
                self.token = 1
                row = {"name": self.name, "owner": self.owner, "token": 1, "expires_ms": expires_ms}
                connection.execute(insert(LEASE).values(**row, published_ms=0))
                return True
            ours = self._is_mine(state)
            if not ours and not state.is_free:
                return False
            token = state.token if ours else state.token + 1
            values = {"to_owner": self.owner, "to_token": token, "until_ms": expires_ms}
            run(connection, _TAKE, {"of": self.name, **values})
        self.token = token
        return True

    def release(self) -> None:
        """Give the lease back, if it is ours still."""
        with _store.writing(self._engine) as connection:
            mine = {"own_owner": self.owner, "own_token": self.token}
            run(connection, _RELEASE, {"of": self.name, **mine})

    def state(self) -> LeaseState | None:
        """Return who holds it now; None when nobody ever did."""
        with _store.reading(self._engine) as connection:
            return self._read(connection)

    def check(self, connection: Connection) -> None:
        """Inside a write transaction: refuse unless the lease is ours.

        An expired lease that nobody else took is ours still: the token says so.

        Raises:
            LeaseLostError: it is another's.
        """
        state = self._read(connection)
        if state is None or state.owner != self.owner or state.token != self.token:
            raise LeaseLostError(
                name=self.name, owner=state.owner if state else "", token=state.token if state else 0
            )

    def note_published(self, connection: Connection) -> None:
        """Inside a write transaction, after `check`: prolong the lease, and keep when its holder last
        announced a checkpoint.
        """
        now_ms = self._now_ms(connection)
        until_ms = now_ms + int(self.ttl_s * 1000)
        run(connection, _NOTE, {"of": self.name, "at_ms": now_ms, "until_ms": until_ms})

    def _is_mine(self, state: LeaseState) -> bool:
        return state.owner == self.owner and state.token == self.token

    def _read(self, connection: Connection) -> LeaseState | None:
        row = run(connection, _READ, {"of": self.name}).fetchone()
        if row is None:
            return None
        owner, token, expires_ms, published_ms = row
        return LeaseState(owner, token, expires_ms, published_ms, self._now_ms(connection))

    def _now_ms(self, connection: Connection) -> int:
        if connection.dialect.name == "sqlite":
            return int(self._clock() * 1000)
        asked = text("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint)")
        return int(connection.execute(asked).scalar_one())
