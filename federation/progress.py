"""What a running federation tells whoever watches: one small event after each thing that happened."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent:
    """`kind` is enrolled, waiting (for a site's people), charter_signed, accepted, asked, answered, refused,
    round, abandoned, evaluated, sketched, completed or failed; resumed (who, in `detail`) or not_resumed
    (why) when a run is taken up again.
    """

    kind: str
    run: str
    round: int = 0
    rounds: int = 0
    sites: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the round's output, on the public set
    epsilon: float | None = None  # spent by this run so far, per site
    witnesses: int = 0  # cosignatures on the round's checkpoint
    elapsed_s: float = 0.0
    detail: str = ""


Listener = Callable[[RunEvent], None]

_lock = threading.Lock()
_listeners: dict[str, list[Listener]] = {}


@contextmanager
def listening(run: str, listener: Listener | None) -> Iterator[None]:
    """Send the events of `run`, in this process, to `listener` for the time of the block."""
    if listener is None:
        yield
        return
    with _lock:
        _listeners.setdefault(run, []).append(listener)
    try:
        yield
    finally:
        with _lock:
            _listeners[run].remove(listener)
            if not _listeners[run]:
                del _listeners[run]


def emit(event: RunEvent) -> None:
    """Tell every listener; one that fails is logged and does not stop the run."""
    with _lock:
        listeners = list(_listeners.get(event.run, ()))
    for listener in listeners:
        try:
            listener(event)
        except Exception:
            _logger.exception("a listener of run %s failed", event.run)
