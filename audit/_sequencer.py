"""One thread that turns queued requests into batches: whatever waits, up to a limit, is committed together.

There is no timer: while one batch is being made durable the next one gathers, so a lone request waits for
nothing and a crowd shares one commit. Of an event loop, what one turn of it queues is one batch: the thread
is woken at the turn's end, not by the first of them. Those whose entries were committed together come back
together too: as long as fewer wait than the last two batches held (and fewer than 32), and turn after turn of
the loop brings more, the batch stays open; after a few empty turns, some microseconds each, it goes with what
it has. So a crowd that has fallen apart into two, of which one waits while the other is served, comes
together again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from audit.errors import AuditError, LedgerBusyError, LedgerClosedError, LedgerWriteError

_logger = logging.getLogger(__name__)

Request = TypeVar("Request")
Result = TypeVar("Result")
_Told = TypeVar("_Told", contravariant=True)


class LoopWaiter(Protocol[_Told]):
    """Who waits in an event loop, and is told there; a future of the loop is one."""

    def get_loop(self) -> asyncio.AbstractEventLoop: ...

    def done(self) -> bool:
        """Whether it waits no more: what was not begun for it is left out."""
        ...

    def set_result(self, result: _Told, /) -> None: ...

    def set_exception(self, exception: AuditError, /) -> None: ...


_Waiter: TypeAlias = "Future[Result] | LoopWaiter[Result]"
_Settled: TypeAlias = "tuple[LoopWaiter[Result], Result | AuditError]"

_RETRY_AFTER_S = 0.5
_EMPTY_TURNS = 4
_ALONE = 2  # in two batches
_LARGE = 32  # as many are worth a commit, however large the last ones were


class Sequencer(Generic[Request, Result]):
    """Calls `commit(batch)` from one thread, started by the first `submit`.

    `commit` returns one result or error for each request, or raises for all of them.
    """

    def __init__(
        self,
        commit: Callable[[list[Request]], list[Result | AuditError]],
        *,
        max_batch: int,
        max_pending: int,
    ) -> None:
        self._commit = commit
        self._max_batch, self._max_pending = max_batch, max_pending
        self._waiting: deque[tuple[Request, _Waiter[Result]]] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._idle = self._called = False  # whether the thread waits; whether it is told to go on
        self._whole = False  # whether those who wait include a crowd that has gathered already
        self._wakes_in: asyncio.AbstractEventLoop | None = None  # that will call `_wake`
        self._crowd = self._last = 0  # of loops: size of the last two batches, and of the last one
        self._seen = self._empty_turns = 0  # of the batch that gathers: how many, and turns without another
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, request: Request) -> Future[Result]:
        """Queue a request; its future completes when its batch is durable, or fails with an `AuditError`.

        Raises:
            LedgerBusyError: too many requests wait.
            LedgerClosedError: after `close`.
        """
        future: Future[Result] = Future()
        self._queue([(request, future)])
        return future

    def submit_all(self, requests: Iterable[Request]) -> list[Future[Result]]:
        """`submit` for several at once: they share batches, instead of the first one going alone.

        Raises:
            LedgerBusyError: too many requests would wait; none of these does.
            LedgerClosedError: after `close`.
        """
        items: list[tuple[Request, Future[Result]]] = [(request, Future()) for request in requests]
        if items:
            self._queue(items)
        return [future for _, future in items]

    def submit_from_loop(self, request: Request) -> asyncio.Future[Result]:
        """`submit` for a coroutine: the future is of its running loop, which is woken once for a whole batch.

        Raises:
            LedgerBusyError, LedgerClosedError: as `submit`.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._queue([(request, future)], loop)
        return future

    def submit_waiting(self, requests: Sequence[tuple[Request, LoopWaiter[Result]]]) -> None:
        """`submit` several that wait in loops: those of one batch are told in one turn. They are a crowd
        already, so none is waited for.

        Raises:
            LedgerBusyError: too many requests would wait; none of these does.
            LedgerClosedError: as `submit`.
        """
        self._queue(requests, whole=True)

    def close(self) -> None:
        """Refuse new requests, finish those that wait, and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _queue(
        self,
        items: Sequence[tuple[Request, _Waiter[Result]]],
        loop: asyncio.AbstractEventLoop | None = None,
        *,
        whole: bool = False,
    ) -> None:
        with self._changed:
            if self._closed:
                raise LedgerClosedError("the ledger is closed")
            if len(self._waiting) + len(items) > self._max_pending:
                raise LedgerBusyError(retry_after_s=_RETRY_AFTER_S, pending=len(self._waiting))
            self._waiting.extend(items)
            self._whole = self._whole or whole
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="affidavit-sequencer", daemon=True)
                self._thread.start()
            if not self._idle:
                return
            if loop is None:
                self._call()
            elif self._wakes_in is not loop:
                self._wakes_in = loop
                loop.call_soon(self._wake, loop)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """At the end of a turn of `loop`: whatever its coroutines queued in this turn is one batch."""
        with self._changed:
            if self._wakes_in is not loop:
                return  # another loop does it
            count = len(self._waiting)
            self._empty_turns = 0 if count > self._seen else self._empty_turns + 1
            self._seen = count
            if self._idle and count and self._is_few(count) and self._empty_turns < _EMPTY_TURNS:
                loop.call_soon(self._wake, loop)
                return
            self._wakes_in = None
            if self._idle and count:
                self._call()

    def _is_few(self, count: int) -> bool:
        """Whether some of those whom the last two batches held are not back yet; one caller is no crowd."""
        return not self._whole and count < min(self._crowd, _LARGE) and self._crowd > _ALONE

    def _call(self) -> None:
        self._idle, self._called = False, True
        self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not (
                    self._waiting and (self._called or not self._is_left_to_loop())
                ):
                    self._idle, self._called = True, False
                    self._changed.wait()
                self._idle = self._called = False
                if not self._waiting:
                    return
                count = min(len(self._waiting), self._max_batch)
                taken = [self._waiting.popleft() for _ in range(count)]
                self._whole = self._whole and bool(self._waiting)
                self._seen = self._empty_turns = 0
                last = 0 if isinstance(taken[0][1], Future) else count
                self._crowd, self._last = self._last + last, last
            batch = [pair for pair in taken if _is_wanted(pair[1])]
            taken.clear()
            if batch:
                self._settle(batch)

    def _is_left_to_loop(self) -> bool:
        """Whether the loop, whose coroutines hear of the last batch only now, is to say when to go on."""
        if not self._is_few(len(self._waiting)):
            return False
        loop: asyncio.AbstractEventLoop | None = None
        for _, future in self._waiting:
            if isinstance(future, Future):
                return False  # a thread waits for it
            loop = future.get_loop()
        if self._wakes_in is None and loop is not None:
            try:
                loop.call_soon_threadsafe(self._wake, loop)
            except RuntimeError:  # it was closed; nobody waits for these any more
                return False
            self._wakes_in = loop
        return True

    def _settle(self, batch: list[tuple[Request, _Waiter[Result]]]) -> None:
        outcomes: list[Result | AuditError]
        try:
            outcomes = self._commit([request for request, _ in batch])
        except AuditError as error:
            outcomes = [error] * len(batch)
        except Exception as error:  # noqa: BLE001 - the thread outlives any fault; every caller hears of it
            fault = LedgerWriteError(f"the batch was not written: {type(error).__name__}: {error}")
            fault.__cause__ = error
            outcomes = [fault] * len(batch)
        by_loop: dict[asyncio.AbstractEventLoop, list[_Settled[Result]]] = {}
        waiters = [future for _, future in batch]
        batch.clear()  # whoever waits is let go of before it is told: it need not be cleared away here
        for future, outcome in zip(waiters, outcomes, strict=True):
            if isinstance(future, Future):
                _complete(future, outcome)
            else:
                by_loop.setdefault(future.get_loop(), []).append((future, outcome))
        for loop, settled in by_loop.items():
            with contextlib.suppress(RuntimeError):  # a loop that was closed has nobody left who waits
                loop.call_soon_threadsafe(_complete_all, settled)


def _is_wanted(future: _Waiter[Any]) -> bool:
    if isinstance(future, Future):
        return future.set_running_or_notify_cancel()
    return not future.done()  # cancelled, or its task has given up


def _complete(future: _Waiter[Result], outcome: Result | AuditError) -> None:
    if isinstance(outcome, AuditError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _complete_all(settled: list[_Settled[Any]]) -> None:
    for future, outcome in settled:
        if not future.done():  # its task may have given up meanwhile; the entry is durable all the same
            try:
                _complete(future, outcome)
            except Exception:  # the others of the batch are told all the same
                _logger.exception("an entry is durable, and who waits for it could not be told")
