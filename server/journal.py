"""Writes the server's entries: an answer waits here until its entry is durable."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from audit.entries import Body, IndexColumns, encode_entry, index_columns, new_entry
from audit.errors import AuditError, StaleViewError
from audit.ledger import Guard, Ledger, Sequenced
from server.errors import LedgerUnavailableError
from server.monitoring import Monitoring

_logger = logging.getLogger(__name__)

ACTOR: Final = "api"

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The system's clock, aware, UTC."""
    return datetime.now(UTC)


def time_text(moment: datetime) -> str:
    """Return RFC 3339, UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Journal:
    """Appends entries and returns only when they are on disk."""

    def __init__(self, ledger: Ledger, clock: Clock, monitoring: Monitoring, *, timeout_s: float) -> None:
        self._ledger, self._clock, self._monitoring = ledger, clock, monitoring
        self._timeout_s = timeout_s

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
            sequenced = await asyncio.wait_for(future, self._timeout_s)
        except StaleViewError:
            raise
        except (AuditError, OSError, TimeoutError) as error:
            raise self._failed(error) from error
        self._monitoring.append_seconds.observe(time.perf_counter() - begun)
        return sequenced

    def append_now(self, body: Body, *, event_id: str | None = None) -> Sequenced:
        """The same, for callers without an event loop."""
        data, event_id, columns = self._encode(body, event_id)
        try:
            future = self._ledger.append(data, event_id=event_id, index_columns=columns)
            return future.result(self._timeout_s)
        except (AuditError, OSError, TimeoutError) as error:
            raise self._failed(error) from error

    def now_text(self) -> str:
        """Return the time as entries bear it."""
        return time_text(self._clock())

    def _encode(self, body: Body, event_id: str | None = None) -> tuple[bytes, str, IndexColumns]:
        entry = new_entry(body, actor=ACTOR, time=self.now_text(), event_id=event_id)
        return encode_entry(entry), entry.event_id, index_columns(entry)

    def _failed(self, error: Exception) -> LedgerUnavailableError:
        self._monitoring.append_failures.inc()
        _logger.error("an entry did not become durable: %s: %s", type(error).__name__, error)
        code = getattr(error, "code", type(error).__name__)
        return LedgerUnavailableError(f"the log could not record this request ({code}); there is no answer")
