"""How many TLS handshakes failed at the gateway, and why: a client that does not believe our CA says so.

Nothing of it is an entry of the log. The failure comes before anybody has said who they are; at this layer
not even their address is known, and whoever reaches the port can make as many as they like. Who is told of
another CA is the site, which keeps it in its own log.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

_logger = logging.getLogger(__name__)

TELL_EVERY_S: Final = 60.0
MAX_REASONS: Final = 16


class Handshakes:
    """Counts failures by OpenSSL's word for them; logs the sums once a minute at most."""

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic, self._lock = monotonic, threading.Lock()
        self._told: float | None = None
        self._since: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    def watch(self, context: ssl.SSLContext) -> None:
        """Count the failures of every handshake that begins in `context` from now on."""
        book = self

        class Watched(ssl.SSLObject):
            def do_handshake(self) -> None:
                try:
                    super().do_handshake()
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    raise
                except ssl.SSLError as error:
                    book.note(error.reason or type(error).__name__)
                    raise

        kind: Any = Watched
        context.sslobject_class = kind

    def note(self, reason: str) -> None:
        """Count one failure."""
        name = reason.lower().replace("_", " ")[:60]
        with self._lock:
            if name not in self.failed and len(self.failed) >= MAX_REASONS:
                name = "other"
            self.failed[name] += 1
            self._since[name] += 1
            now = self._monotonic()
            if self._told is not None and now - self._told < TELL_EVERY_S:
                return
            self._told, since, self._since = now, self._since, Counter()
        said = ", ".join(f"{count} {what}" for what, count in sorted(since.items()))
        _logger.warning("TLS handshakes failed since the last line: %s", said)
