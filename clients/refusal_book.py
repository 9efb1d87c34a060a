"""Refusals as entries of the site's own log, without letting a flood fill the disk.

Up to `BURST` refusals in a window are entries of their own. Beyond that they are counted by kind and reason,
and the sums are written when the window ends, so that the entry after a flood says how large it was.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from audit.entries import Body
from audit.site_bodies import RequestRefused

BURST: Final = 60
WINDOW_S: Final = 60.0
MAX_KIND: Final = 40  # characters
MAX_KINDS: Final = 16  # a hostile peer invents kinds as it likes: beyond these they are one line


class RefusalBook:
    """One agent's book. Thread-safe, and independent of the agent's own lock."""

    def __init__(
        self,
        site: str,
        write: Callable[[Body, str | None], object],
        sign: Callable[[RequestRefused], RequestRefused],
        *,
        burst: int = BURST,
        window_s: float = WINDOW_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._site, self._write, self._sign = site, write, sign
        self._burst, self._window_s, self._monotonic = burst, window_s, monotonic
        self._lock = threading.Lock()
        self._began, self._written = monotonic(), 0
        self._counted: Counter[tuple[str, str]] = Counter()
        self.total = 0

    def refused(self, kind: str, reason: str) -> None:
        """Note a refusal that nobody signed: of a request that names no run, or of a connection."""
        name = "".join(c if c.isascii() and c.isprintable() else "?" for c in kind[:MAX_KIND])
        with self._lock:
            if self._admit(name, reason):
                self._write(self._sign(self._body(name, reason, 1)), None)

    def enter(self, body: Body, *, kind: str, reason: str, event_id: str | None = None) -> None:
        """Note a refusal that has a signed body of its own; the same event id is written once."""
        with self._lock:
            if self._admit(kind, reason):
                self._write(body, event_id)

    def settle(self, *, now: bool = False) -> None:
        """Write what was only counted, once its window is over, or `now`."""
        with self._lock:
            if now or self._monotonic() - self._began >= self._window_s:
                self._turn()

    def _admit(self, kind: str, reason: str) -> bool:
        self.total += 1
        if self._monotonic() - self._began >= self._window_s:
            self._turn()
        if self._written < self._burst:
            self._written += 1
            return True
        key = (kind, reason) if len(self._counted) < MAX_KINDS else ("other", "rate_limited")
        self._counted[key] += 1
        return False

    def _turn(self) -> None:
        counted, self._counted = self._counted, Counter()
        self._began, self._written = self._monotonic(), 0
        for (kind, reason), count in counted.items():
            self._write(self._sign(self._body(kind, reason, count)), None)

    def _body(self, kind: str, reason: str, count: int) -> RequestRefused:
        return RequestRefused(site=self._site, kind=kind, reason=reason, count=count, signature="")
