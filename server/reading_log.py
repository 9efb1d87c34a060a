"""Reading the log is an entry too: who read, what kind of question, how much was shown.

The terms may name a person, so the entry holds only their HMAC under a key in the coordinator's home: whoever
holds the key can confirm what was asked, and destroying it ends that. A page of nothing but such entries is
recorded at most once a minute for each reader, so that watching the readers does not feed itself.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from audit._files import write_durably
from audit.entries import AuditRead
from audit.principal import Principal
from server.errors import SettingsError
from server.journal import Journal

KEY_FILE: Final = "reading.key"
QUIET_S: Final = 60.0
_KEY_BYTES: Final = 32
_READERS: Final = 4096


class ReadingLog:
    """Writes `audit.read` before what was read leaves."""

    def __init__(
        self, home: Path, journal: Journal, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """Open the key of the terms; made at first use.

        Raises:
            SettingsError: the key file cannot be made or is not 32 bytes.
        """
        self._key = _key(home / KEY_FILE)
        self._journal, self._monotonic = journal, monotonic
        self._lock = threading.Lock()
        self._quiet_until: dict[str, float] = {}

    def digest(self, terms: bytes) -> str:
        """Return the hex HMAC-SHA256 of the terms, as it stands in the entries."""
        return hmac.digest(self._key, terms, "sha256").hex()

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
        await self._journal.append(
            AuditRead(
                principal=principal.id,
                role=principal.role,
                action=action,
                query=self.digest(terms),
                count=count,
            )
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


def _key(path: Path) -> bytes:
    try:
        if not path.exists():
            with contextlib.suppress(FileExistsError):  # another process was first
                write_durably(path, secrets.token_bytes(_KEY_BYTES), replace=False)
        data = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: cannot be made or read: {error.strerror}") from error
    if len(data) != _KEY_BYTES or os.stat(path).st_mode & 0o077:
        raise SettingsError(f"{path}: is not {_KEY_BYTES} bytes that only their owner may read; restore it")
    return data
