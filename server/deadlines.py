"""Time limits of many requests by one timer: what `asyncio.timeout` does, without a timer for each.

A task that is late is cancelled, and its `stop` says so; then the cancellation is nobody else's, and the
caller makes of it what it likes.
"""

from __future__ import annotations

import asyncio


class Deadlines:
    """Of the tasks of one event loop at a time."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ends: dict[asyncio.Task[object], float] = {}  # when each ends, by the loop's clock
        self._late: set[asyncio.Task[object]] = set()
        self._cancelled: dict[asyncio.Task[object], int] = {}  # how often some were before they started
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0.0  # when the timer looks

    def start(self, loop: asyncio.AbstractEventLoop, at: float) -> asyncio.Task[object]:
        """Have the running task cancelled at `at`, unless it stops before; return it."""
        task = asyncio.current_task(loop)
        assert task is not None  # noqa: S101 - a coroutine calls
        if self._loop is not loop:  # what another one was asked for is gone with it
            self._loop, self._timer = loop, None
            self._ends.clear()
            self._late.clear()
            self._cancelled.clear()
        if task.cancelling():
            self._cancelled[task] = task.cancelling()
        self._ends[task] = at
        if self._timer is None or at < self._next:
            self._set(loop, at)
        return task

    def move(self, task: asyncio.Task[object], at: float) -> None:
        """Give a started task more time: `at` is no sooner than before. One that is late already stays so."""
        if task in self._ends:
            self._ends[task] = at

    def stop(self, task: asyncio.Task[object]) -> bool:
        """Let a task be; say whether it was late, and is rid of its cancellation."""
        self._ends.pop(task, None)
        before = self._cancelled.pop(task, 0) if self._cancelled else 0
        if task not in self._late:
            return False
        self._late.remove(task)
        return task.uncancel() <= before

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer, now = None, loop.time()
        for task in [task for task, at in self._ends.items() if at <= now]:
            del self._ends[task]
            self._late.add(task)
            task.cancel()
        if self._ends:
            self._set(loop, min(self._ends.values()))

    def _set(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._next = loop.call_at(at, self._look, loop), at
