"""An event loop whose clock stands while there is something to do, and skips the time when there is not."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

_REAL_S = 0.001  # that the kernel has, before time is skipped, to bring what was sent within this process


class _Selector(selectors.DefaultSelector):
    """Waits for a moment, and says that it waited as long as it was asked to."""

    now = 1000.0
    patience_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        events = super().select(min(timeout, self.patience_s))
        if not events:
            self.now += timeout
        return events


class SkippingLoop(asyncio.SelectorEventLoop):
    """Remembers the timers that it was asked for."""

    def __init__(self, *, sockets: bool = False) -> None:
        self._clock = _Selector()
        self._clock.patience_s = _REAL_S if sockets else 0.0
        self.timers: list[tuple[asyncio.TimerHandle, Callable[..., object]]] = []
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, **more: Any
    ) -> asyncio.TimerHandle:
        timer = super().call_at(when, callback, *args, **more)  # type: ignore[arg-type]
        self.timers.append((timer, callback))
        return timer

    def armed(self, callback: Callable[..., object]) -> int:
        """How many timers will yet call it."""
        return sum(
            1 for timer, called in self.timers
            if called == callback and not timer.cancelled() and timer.when() > self.time()
        )  # fmt: skip


def run(main: Coroutine[Any, Any, Result], *, sockets: bool = False) -> Result:
    """`asyncio.run` in such a loop; give it `sockets` where it speaks to itself over them."""
    with asyncio.Runner(loop_factory=lambda: SkippingLoop(sockets=sockets)) as runner:
        return runner.run(main)
