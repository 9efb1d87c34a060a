"""Waiting in tests: for what has to come, however slow the machine is, and for time that a test moves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import update

from audit import _store
from audit.ledger import Ledger
from audit.tables import LEASE

GENEROUS_S = 60.0


def wait_until(
    condition: Callable[[], Any], what: str = "it never came", within_s: float = GENEROUS_S
) -> Any:
    """Look until the condition holds and return what it said; the limit is for what never comes alone."""
    until = time.monotonic() + GENEROUS_S
    while not (found := condition()):
        assert time.monotonic() < until, what
        time.sleep(0.01)
    return found


def took_at_best(play: Callable[[], object], promised_s: float, tries: int = 5) -> float:
    """Play until it took no longer than was promised, at most so often; return the shortest time.

    A busy machine makes one try late, never all of them; what is really slow is slow each time.
    """
    best = float("inf")
    for _ in range(tries):
        begun = time.monotonic()
        play()
        best = min(best, time.monotonic() - begun)
        if best < promised_s:
            break
    return best


class Moved:
    """A clock in seconds that stands still until the test moves it, by `forward` or by sleeping."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def forward(self, seconds: float) -> None:
        self.now_s += seconds


class LeapingLoop(asyncio.SelectorEventLoop):
    """An event loop whose time the test moves on at will: what is due then happens at once."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s

    def leap(self, seconds: float) -> None:
        """Move the time on; from any thread."""
        self.ahead_s += seconds
        self.call_soon_threadsafe(lambda: None)  # one that waits looks again


def lapse(ledger: Ledger, name: str, seconds: float) -> None:
    """Make a lease of this log so much older, whichever clock its database has."""
    past_ms = int(seconds * 1000) + 1
    aged = {"expires_ms": LEASE.c.expires_ms - past_ms, "published_ms": LEASE.c.published_ms - past_ms}
    with _store.writing(ledger._engine) as connection:
        connection.execute(update(LEASE).where(LEASE.c.name == name).values(**aged))
