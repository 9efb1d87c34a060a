"""Reading the log is an entry too: who read, what kind of question, how much was shown.

The terms may name a person, so they are sealed in the vault under the reader's own key, and the entry holds
the root of their commitments: without the vault nothing of them can be guessed. A page of nothing but such
entries is recorded at most once a minute for each reader, so that watching the readers does not feed itself.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from audit.canonical import parse_canonical
from audit.disclosure import TERMS, new_part
from audit.entries import AuditRead
from audit.principal import Principal
from audit.vault_records import READER
from server.journal import Journal
from server.sealing import Sealing

QUIET_S: Final = 60.0
_READERS: Final = 4096


class ReadingLog:
    """Writes `audit.read` before what was read leaves."""

    def __init__(
        self, sealing: Sealing, journal: Journal, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._sealing, self._journal, self._monotonic = sealing, journal, monotonic
        self._lock = threading.Lock()
        self._quiet_until: dict[str, float] = {}

    async def record(
        self, principal: Principal, action: str, terms: bytes, count: int, *, only_reads: bool = False
    ) -> None:
        """Make the reading durable.

        Args:
            principal: who read. action: what kind of question. terms: its canonical terms.
            count: how many entries were shown. only_reads: all of those were records of reading.

        Raises:
            LedgerUnavailableError: it is not durable, so nothing may be shown.
        """
        if only_reads and self._is_quiet(principal.id):
            return
        asked: Any = parse_canonical(terms)
        part, event_id = new_part(asked), secrets.token_hex(16)
        sealed = await self._sealing.seal(
            kind=READER, name=principal.id, event_id=event_id, type="audit.read", parts={TERMS: part}
        )
        await self._journal.append(
            AuditRead(
                principal=principal.id,
                role=principal.role,
                action=action,
                query=part.root(TERMS),
                count=count,
                subject=sealed.pseudonym,
                sealed=sealed.digest,
            ),
            event_id=event_id,
        )

    def _is_quiet(self, reader: str) -> bool:
        """Whether this reader's look at such entries was recorded within the last minute."""
        with self._lock:
            now = self._monotonic()
            if self._quiet_until.get(reader, 0.0) > now:
                return True
            if len(self._quiet_until) >= _READERS:
                self._quiet_until = {name: until for name, until in self._quiet_until.items() if until > now}
            self._quiet_until[reader] = now + QUIET_S
            return False
