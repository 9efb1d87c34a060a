"""Whether entries become durable, as this worker saw it last: a server that cannot record cannot answer.

Some failures in a row make it doubtful, and `/readyz` says so; the next entry that becomes durable ends that.
Whoever is not ready is sent no requests, so there might be no next entry: asked while in doubt, it makes a
cheap trial of its own. A trial that entries then contradict is believed less readily the next time.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from audit.errors import AuditError, LeaseLostError
from server.metric_room import reserve

if TYPE_CHECKING:
    from audit.ledger import Ledger

_logger = logging.getLogger(__name__)

IN_A_ROW: Final = 3
_PATIENCE_S: Final = 0.5  # for a trial, before the answer is given without it
_LONGEST_S: Final = 30.0
_ROOM_BYTES: Final = 1 << 18


class Recording:
    """One worker's; for several threads."""

    def __init__(
        self,
        trial: Callable[[], None],
        *,
        monotonic: Callable[[], float] = time.monotonic,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        """Prepare; `trial` raises AuditError or OSError where nothing can be recorded."""
        self._trial, self._now, self._patience_s = trial, monotonic, patience_s
        self._lock = threading.Lock()
        self._failures = 0  # in a row
        self._last = 0.0  # when the last of them was
        self._believed = 0  # trials since an entry became durable
        self._trying: threading.Thread | None = None

    def succeeded(self) -> None:
        """An entry became durable."""
        if self._failures or self._believed:
            with self._lock:
                self._failures = self._believed = 0

    def failed(self) -> None:
        """An entry did not, or is not known to be."""
        with self._lock:
            self._failures, self._last = self._failures + 1, self._now()

    def problem(self) -> str:
        """Return why nothing may be answered, or an empty text; tries, while that is in doubt."""
        with self._lock:
            if self._failures < IN_A_ROW:
                return ""
            wait_s = 0.0 if not self._believed else min(2.0**self._believed, _LONGEST_S)
            if self._trying is None and self._now() - self._last >= wait_s:
                self._trying = threading.Thread(target=self._try, name="try to record", daemon=True)
                self._trying.start()
            trying = self._trying
        if trying is not None:
            trying.join(self._patience_s)
        with self._lock:
            if self._failures < IN_A_ROW:
                return ""
            return f"{self._failures} entries in a row did not become durable: the log cannot be written to"

    def _try(self) -> None:
        with self._lock:
            before = self._failures
        try:
            self._trial()
        except (AuditError, OSError) as error:
            _logger.warning("the log still cannot be written to: %s", error)
            is_well = False
        except Exception:
            _logger.exception("the log cannot be tried")
            is_well = False
        else:
            is_well = True
        with self._lock:
            self._trying = None
            if is_well and self._failures == before:
                self._failures, self._believed = 0, self._believed + 1


def try_log(ledger: Ledger) -> None:
    """Write a row to the log's database and take it back; no entry is made.

    Raises:
        AuditError, OSError: it cannot be written to, or its disk has no room for the next entries.
    """
    lease = ledger.lease("trial", f"{os.getpid()}-{os.urandom(8).hex()}", ttl_s=5)
    if not lease.acquire():
        raise LeaseLostError(name="trial", owner="another worker", token=0)
    lease.release()
    if ledger.location.path is not None:
        with tempfile.TemporaryFile(dir=ledger.location.path.parent) as file:
            reserve(file.fileno(), 0, _ROOM_BYTES)
