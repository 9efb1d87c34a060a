"""Time limits of many requests by one timer: what `asyncio.timeout` does, without a timer for each.

`OwnLimit` is for the few requests whose limit stands in their body, and costs the others next to nothing.

A task that is late is cancelled, and its `stop` says so; then the cancellation is nobody else's, and the
caller makes of it what it likes.
"""

from __future__ import annotations

import asyncio

from server.errors import DeadlineError


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


class OwnLimit:
    """A context manager in which a limit may be set, by whoever reads it, in whichever task.

    Raises:
        DeadlineError: at the end of what was too late.
    """

    __slots__ = ("_begun", "_is_late", "_loop", "_seconds", "_task", "_timer")

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_late, self._seconds = False, 0.0

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task, self._begun = asyncio.current_task(self._loop), self._loop.time()

    def set(self, seconds: float) -> None:
        """Have the task that entered cancelled `seconds` after it did; only the first word counts."""
        if self._task is not None and self._timer is None:
            self._seconds = seconds
            self._timer = self._loop.call_at(self._begun + seconds, self._end, self._task)

    def _end(self, task: asyncio.Task[object]) -> None:
        self._is_late = True
        task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
            if self._is_late and task is not None and task.uncancel() <= 0 and kind is asyncio.CancelledError:
                raise DeadlineError(f"no answer within {self._seconds:g} s") from None
