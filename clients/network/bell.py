"""A bell between two processes of one user: the one that waits hangs it, the other rings, nothing is said.

It is a Unix datagram socket. A ring while nobody waits is kept; many of them are one. A ring that is lost
costs the time until the next look and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Bell:
    """The waiting end."""

    def __init__(self, socket_: socket.socket) -> None:
        self._socket = socket_

    @classmethod
    @contextmanager
    def hang(cls, path: Path) -> Iterator[Bell]:
        """Listen at `path` for the time of the block; this user alone can ring.

        Raises:
            OSError: the socket cannot be made there.
        """
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        try:
            yield cls(listener)
        finally:
            listener.close()
            path.unlink(missing_ok=True)

    def wait(self, timeout_s: float) -> bool:
        """Wait until somebody rings, or the time is up; return whether they did."""
        ready, _, _ = select.select([self._socket], [], [], timeout_s)
        if not ready:
            return False
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(16)
        return True


def ring(path: Path) -> None:
    """Ring the bell at `path`; where none hangs nothing happens."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as caller:
        caller.setblocking(False)
        caller.sendto(b"1", str(path))


def with_sleep(original: Any, sleep: Callable[[float], object]) -> types.SimpleNamespace:
    """Return the module `time` as one module sees it, with another `sleep`; everybody else's stays."""
    changed = types.SimpleNamespace(**{name: getattr(original, name) for name in dir(time)})
    changed.sleep = sleep
    return changed
