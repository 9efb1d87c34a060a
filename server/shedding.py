"""How many requests a worker takes at once, so that those it takes are answered in time.

The limit follows the latency that the worker sees: each answer in time raises it a little, each late one
lowers it by a share, between a floor and a ceiling (additive increase, multiplicative decrease). A request
above the limit is told to come back (`503`, `Retry-After`) before its body is read: that costs next to
nothing, and nothing about it is in the log. A request counts from the moment its body is here: those that
send one slowly, or never, say nothing about load and take nobody's place. Health, readiness and metrics are
never shed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from server.errors import OverloadedError

FLOOR: Final = 8
_LOWER: Final = 0.9
_RETRY_MOST_S: Final = 30


@dataclass(slots=True)
class Shedder:
    """One worker's; not for several threads."""

    most: int  # never more at once
    target_s: float  # an answer that took longer is late
    limit: float = field(init=False)
    in_flight: int = field(init=False, default=0)
    _beside_a_late_one: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.limit = float(self.most)

    def look(self) -> None:
        """See whether there is room for one more, before its body is read.

        Raises:
            OverloadedError: too many are being worked on.
        """
        if self.in_flight >= max(min(FLOOR, self.most), int(self.limit)):
            retry_s = min(_RETRY_MOST_S, 1 + int(self.target_s))
            said = f"{self.in_flight} requests are being worked on; come back in {retry_s} s"
            raise OverloadedError(said, retry_after_s=retry_s)

    def enter(self) -> None:
        """Take one more, whose body is here: who sends one slowly takes nobody's place.

        Raises:
            OverloadedError: too many are being worked on.
        """
        self.look()
        self.in_flight += 1

    def leave(self, seconds: float | None) -> None:
        """One is done after `seconds`; None where its time says nothing about load."""
        self.in_flight -= 1
        beside, self._beside_a_late_one = self._beside_a_late_one > 0, max(0, self._beside_a_late_one - 1)
        if seconds is None:
            return
        if seconds <= self.target_s:
            self.limit = min(float(self.most), self.limit + 1.0 / max(1.0, self.limit))
        elif not beside:  # those that were under way with a late one are late too: all count once
            self.limit = max(float(min(FLOOR, self.most)), self.limit * _LOWER)
            self._beside_a_late_one = self.in_flight
