"""How much anybody may ask of the gateway: token buckets, and single use of signatures."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

MAX_BUCKETS: Final = 10_000


class RateLimit:
    """A token bucket for each name; the oldest are forgotten when there are too many."""

    def __init__(self, per_s: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, name: str) -> bool:
        """Take one token of `name`'s; False when none is left."""
        now = self._clock()
        tokens, then = self._buckets.pop(name, (float(self._burst), now))
        tokens = min(float(self._burst), tokens + (now - then) * self._per_s)
        allowed = tokens >= 1
        self._buckets[name] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return allowed


class OnceOnly:
    """Remembers what was seen for `keep_s`; a second sight is refused."""

    def __init__(self, keep_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._keep_s, self._clock = keep_s, clock
        self._seen: OrderedDict[bytes, float] = OrderedDict()

    def is_new(self, item: bytes) -> bool:
        now = self._clock()
        while self._seen and next(iter(self._seen.values())) < now - self._keep_s:
            self._seen.popitem(last=False)
        if item in self._seen:
            return False
        self._seen[item] = now
        return True

    def __len__(self) -> int:
        return len(self._seen)
