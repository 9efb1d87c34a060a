"""Who carries a run out: one process at a time, by a lease in the log's own database.

A coordinator takes the lease before it looks at what the log says of the run, and keeps it by a thread of
its own. One that is killed leaves it behind for `ttl_s` at most. One that slept through its time learns at
its next step that another went on; what both would write has the same event ids, so the log takes it once.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from typing import Final

from audit.errors import AuditError
from audit.lease import Lease, LeaseState
from audit.ledger import Ledger
from federation.errors import RunHeldError

_logger = logging.getLogger(__name__)

TTL_S: Final = 10.0
_LOOK_S: Final = 0.1


def lease_name(run: str) -> str:
    return f"run:{run}"


def is_held(ledger: Ledger, run: str) -> bool:
    """Whether some process carries the run out now, or was killed a moment ago."""
    state = ledger.lease(lease_name(run), "a reader", ttl_s=TTL_S).state()
    return state is not None and not state.is_free


class RunHold:
    """One process's hold on one run; use as a context."""

    def __init__(
        self, ledger: Ledger, run: str, *, ttl_s: float = TTL_S, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._run, self._ttl_s, self._sleep = run, ttl_s, sleep
        self._lease: Lease = ledger.lease(
            lease_name(run), f"{os.getpid()}-{secrets.token_hex(8)}", ttl_s=ttl_s
        )
        self._token = 0  # of the hold that was taken; a later one is another's, or came after another's
        self._over = threading.Event()
        self._keeper: threading.Thread | None = None

    def __enter__(self) -> RunHold:
        self._take()
        self._keeper = threading.Thread(target=self._keep, name=f"hold-{self._run[:8]}", daemon=True)
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._keeper is not None:
            self._keeper.join()
        try:
            self._lease.release()
        except AuditError:
            _logger.warning("the hold on run %s was not given back; it ends by itself", self._run)

    def check(self) -> None:
        """Go on only while the run is ours.

        Raises:
            RunHeldError: another process took it.
        """
        state = self._lease.state()
        if state is None or (state.owner, state.token) != (self._lease.owner, self._token):
            raise RunHeldError(self._run, "another process took it over")

    def _take(self) -> None:
        """Take the lease, waiting for one that a killed process left; a living holder prolongs its own."""
        before = self._lease.state()
        while not self._lease.acquire():
            now = self._lease.state()
            if now is not None and before is not None and _was_prolonged(before, now):
                raise RunHeldError(self._run, "another process carries it out")
            before = before or now
            self._sleep(_LOOK_S)
        self._token = self._lease.token

    def _keep(self) -> None:
        while not self._over.wait(self._ttl_s / 4):
            try:
                if not self._lease.acquire():
                    return  # the next check says so
                if self._lease.token != self._token:  # another took it and gave it back, and so do we
                    self._lease.release()
                    return
            except AuditError:
                _logger.warning("the hold on run %s could not be prolonged", self._run)


def _was_prolonged(before: LeaseState, now: LeaseState) -> bool:
    if now.is_free:
        return False
    return now.token != before.token or now.expires_ms != before.expires_ms
