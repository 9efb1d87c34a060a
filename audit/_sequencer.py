"""One thread that turns queued requests into batches: whatever waits, up to a limit, is committed together.

There is no linger: while one batch is being made durable the next one gathers, so a lone request waits for
nothing and a crowd shares one commit.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from audit.errors import AuditError, LedgerBusyError, LedgerClosedError, LedgerWriteError

Request = TypeVar("Request")
Result = TypeVar("Result")

_RETRY_AFTER_S = 0.5


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
        self._waiting: deque[tuple[Request, Future[Result]]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, request: Request) -> Future[Result]:
        """Queue a request; its future completes when its batch is durable, or fails with an `AuditError`.

        Raises:
            LedgerBusyError: too many requests wait.
            LedgerClosedError: after `close`.
        """
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                raise LedgerClosedError("the ledger is closed")
            if len(self._waiting) >= self._max_pending:
                raise LedgerBusyError(retry_after_s=_RETRY_AFTER_S, pending=len(self._waiting))
            self._waiting.append((request, future))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="affidavit-sequencer", daemon=True)
                self._thread.start()
            self._changed.notify()
        return future

    def close(self) -> None:
        """Refuse new requests, finish those that wait, and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                count = min(len(self._waiting), self._max_batch)
                taken = [self._waiting.popleft() for _ in range(count)]
            batch = [pair for pair in taken if pair[1].set_running_or_notify_cancel()]
            if batch:
                self._settle(batch)

    def _settle(self, batch: list[tuple[Request, Future[Result]]]) -> None:
        outcomes: list[Result | AuditError]
        try:
            outcomes = self._commit([request for request, _ in batch])
        except AuditError as error:
            outcomes = [error] * len(batch)
        except Exception as error:  # noqa: BLE001 - the thread outlives any fault; every caller hears of it
            fault = LedgerWriteError(f"the batch was not written: {type(error).__name__}: {error}")
            fault.__cause__ = error
            outcomes = [fault] * len(batch)
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, AuditError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
