"""Writes the server's entries: an answer waits here until its entry is durable."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import Context
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any, Final, Protocol

from audit.entries import Body, IndexColumns, encode_entry, index_columns, new_entry
from audit.errors import AuditError, StaleViewError
from audit.ledger import AppendRequest, Guard, Ledger, LoopWaiter, Sequenced, append_request
from server.errors import LedgerUnavailableError
from server.monitoring import Monitoring
from server.recording import Recording, try_log

_logger = logging.getLogger(__name__)

ACTOR: Final = "api"

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The system's clock, aware, UTC."""
    return datetime.now(UTC)


def time_text(moment: datetime) -> str:
    """Return RFC 3339, UTC, whole seconds."""
    return _second_text(int(moment.timestamp() // 1))


@lru_cache(maxsize=64)
def _second_text(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Waiting(Protocol):
    """Whoever is told when it waits too long."""

    def done(self) -> bool: ...

    def set_exception(self, exception: Any, /) -> None: ...


class _Patience:
    """Ends the waits of one loop that last too long: one timer for all of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self.loop, self._timeout_s = loop, timeout_s
        self._waiting: deque[tuple[float, Waiting]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, future: Waiting) -> None:
        waiting = self._waiting
        while waiting and waiting[0][1].done():
            waiting.popleft()
        waiting.append((self.loop.time() + self._timeout_s, future))
        if self._timer is None:
            self._timer = self.loop.call_later(self._timeout_s, self._look, context=Context())

    def _look(self) -> None:
        self._timer, waiting, now = None, self._waiting, self.loop.time()
        while waiting and (waiting[0][1].done() or waiting[0][0] <= now):
            _, future = waiting.popleft()
            if not future.done():
                future.set_exception(TimeoutError())
        if waiting:
            self._timer = self.loop.call_at(waiting[0][0], self._look, context=Context())


class Journal:
    """Appends entries and returns only when they are on disk."""

    def __init__(self, ledger: Ledger, clock: Clock, monitoring: Monitoring, *, timeout_s: float) -> None:
        self._ledger, self._clock, self._monitoring = ledger, clock, monitoring
        self._timeout_s = timeout_s
        self.recording = Recording(partial(try_log, ledger))
        self._patience: _Patience | None = None

    async def append(
        self, body: Body, *, event_id: str | None = None, guard: Guard | None = None
    ) -> Sequenced:
        """Append `body` and wait until it is durable; `event_id` where the vault already bears it.

        Raises:
            StaleViewError: what `guard` names came in between; nothing was written.
            LedgerUnavailableError: it is not, or not known to be, durable.
        """
        data, event_id, columns = self._encode(body, event_id)
        begun = time.perf_counter()
        try:
            future = self._ledger.append_from_loop(
                data, event_id=event_id, index_columns=columns, guard=guard
            )
            self._patience_of(future.get_loop()).watch(future)
            sequenced = await future
        except StaleViewError:
            raise
        except (AuditError, OSError, TimeoutError) as error:
            raise self.failed(error) from error
        self.durable(time.perf_counter() - begun)
        return sequenced

    def prepared(self, body: Body, guard: Guard) -> AppendRequest:
        """Return the entry as `append_all` takes it."""
        data, event_id, columns = self._encode(body)
        return append_request(data, event_id, columns, guard)

    def append_all(
        self, entries: Sequence[tuple[AppendRequest, LoopWaiter[Sequenced]]], waiting: Waiting
    ) -> None:
        """Append entries for who waits for them in the running loop; `waiting` is told when that takes too
        long, unless it waits no more.

        Raises:
            AuditError: none of them was queued.
        """
        self._ledger.append_waiting(entries)
        self._patience_of(asyncio.get_running_loop()).watch(waiting)

    def append_now(self, body: Body, *, event_id: str | None = None) -> Sequenced:
        """The same, for callers without an event loop."""
        data, event_id, columns = self._encode(body, event_id)
        try:
            future = self._ledger.append(data, event_id=event_id, index_columns=columns)
            sequenced = future.result(self._timeout_s)
        except (AuditError, OSError, TimeoutError) as error:
            raise self.failed(error) from error
        self.recording.succeeded()
        return sequenced

    def now_text(self) -> str:
        """Return the time as entries bear it."""
        return time_text(self._clock())

    def _encode(self, body: Body, event_id: str | None = None) -> tuple[bytes, str, IndexColumns]:
        entry = new_entry(body, actor=ACTOR, time=self.now_text(), event_id=event_id)
        return encode_entry(entry), entry.event_id, index_columns(entry)

    def _patience_of(self, loop: asyncio.AbstractEventLoop) -> _Patience:
        if self._patience is None or self._patience.loop is not loop:
            self._patience = _Patience(loop, self._timeout_s)
        return self._patience

    def durable(self, seconds: float) -> None:
        """Count that entries became durable, together, in so long."""
        self.recording.succeeded()
        self._monitoring.tallies.observe(self._monitoring.append_seconds, seconds)

    def failed(self, error: Exception) -> LedgerUnavailableError:
        """Count and log that an entry did not become durable; return what its caller is told."""
        self.recording.failed()
        self._monitoring.append_failures.inc()
        _logger.error("an entry did not become durable: %s: %s", type(error).__name__, error)
        code = getattr(error, "code", type(error).__name__)
        return LedgerUnavailableError(f"the log could not record this request ({code}); there is no answer")
