"""SQLite and a fork: nobody is inside it at that moment, and nothing of it is open.

A thread that is inside SQLite while another one forks leaves SQLite's own locks held in the child, where
nobody will ever release them; and what the library remembers of an open file makes the child believe that it
holds locks which the parent holds. So before a fork everybody leaves, idle connections are closed, and both
processes open their own afterwards. Where somebody stays inside for too long the child is told so by an
error, instead of waiting for ever.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from typing import Final

from sqlalchemy import Engine

from audit.errors import LedgerClosedError

_logger = logging.getLogger(__name__)

PATIENCE_S: Final = 5.0
_PAUSE_S: Final = 0.001

_gate = threading.Lock()  # held from before a fork until after it
_inside: dict[int, int] = {}  # thread -> how deep
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_left_unclean = False  # by the fork that made this process, or one before it
_is_clean = True


def watch(engine: Engine) -> None:
    """Close this engine's idle connections before each fork."""
    _engines.add(engine)


def enter() -> int:
    """Say that this thread is about to use SQLite; pass what this returns to `leave`."""
    thread = threading.get_ident()
    if thread in _inside:
        _inside[thread] += 1
    else:
        with _gate:
            _inside[thread] = 1
    return thread


def leave(thread: int) -> None:
    depth = _inside.get(thread, 0)  # 0 in a child that was forked from inside
    if depth > 1:
        _inside[thread] = depth - 1
    else:
        _inside.pop(thread, None)


def check_usable() -> None:
    """Refuse to open a database where the fork that made this process left SQLite's locks in doubt.

    Raises:
        LedgerClosedError: it did; no log can be used here.
    """
    if _left_unclean:
        raise LedgerClosedError(
            "this process was forked while its parent was inside the database; start a new process instead"
        )


def _before() -> None:
    global _is_clean
    _gate.acquire()
    until, me = time.monotonic() + PATIENCE_S, threading.get_ident()
    while any(thread != me for thread in list(_inside)) and time.monotonic() < until:
        time.sleep(_PAUSE_S)
    _is_clean = not _inside
    if not _is_clean:
        _logger.warning("a fork did not wait for a thread that uses a log; the child cannot use it")
        return
    for engine in list(_engines):
        engine.dispose()


def _after_in_child() -> None:
    global _gate, _left_unclean
    _gate = threading.Lock()
    _inside.clear()
    _left_unclean = _left_unclean or not _is_clean


os.register_at_fork(before=_before, after_in_parent=lambda: _gate.release(), after_in_child=_after_in_child)
