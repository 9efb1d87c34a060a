"""What every request counts: kept in plain numbers for a moment, and then added to the registry at once.

A metric of the client library takes a lock, or writes into the file that other workers read, for each of the
dozen numbers that a request changes. Here they are added up in the event loop, and handed over four times a
second and before anybody reads them; a process that is killed loses what it counted since.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

_EVERY_S: Final = 0.25


class _Seen:
    """What a histogram is to be told."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: list[float]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * len(bounds), 0.0


class Tallies:
    """One process's; used from its event loop, or from one thread where there is none."""

    def __init__(self, in_flight: Gauge) -> None:
        self._gauge, self._in_flight = in_flight, 0
        self._counts: dict[Counter, float] = {}
        self._seen: dict[Histogram, _Seen] = {}
        self._is_due = False

    def enter(self) -> None:
        """One request more is under way."""
        self._in_flight += 1
        if not self._is_due:
            self._later()

    def leave(self) -> None:
        """One is done."""
        self._in_flight -= 1
        if not self._is_due:
            self._later()

    def count(self, counter: Counter, amount: float = 1.0) -> None:
        """Add to a counter without labels, or to one's child."""
        self._counts[counter] = self._counts.get(counter, 0.0) + amount
        if not self._is_due:
            self._later()

    def observe(self, histogram: Histogram, value: float) -> None:
        """Tell a histogram without labels, or one's child, of a value."""
        seen = self._seen.get(histogram)
        if seen is None:
            seen = self._seen[histogram] = _Seen(histogram._upper_bounds)
        seen.total += value
        seen.counts[bisect_left(seen.bounds, value)] += 1
        if not self._is_due:
            self._later()

    def flush(self) -> None:
        """Hand everything over."""
        self._is_due = False
        counts, self._counts = self._counts, {}
        for counter, amount in counts.items():
            counter.inc(amount)
        seen, self._seen = self._seen, {}
        for histogram, what in seen.items():
            # the library has no call for several values at once: these are its two steps of `observe`
            histogram._sum.inc(what.total)
            for bucket, count in zip(histogram._buckets, what.counts, strict=True):
                if count:
                    bucket.inc(count)
        self._gauge.set(self._in_flight)

    def _later(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
        else:
            self._is_due = True
            loop.call_later(_EVERY_S, self.flush)
