"""A bell between two processes of one user: the one that waits hangs it, the other rings, nothing is said.

It is a Unix datagram socket. A ring while nobody waits is kept; many of them are one. A ring that is lost
costs the time until the next look and nothing else, so who waits always looks again by itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Bell:
    """The waiting end. Use as a context manager, or call `close`."""

    def __init__(self, path: Path) -> None:
        """Listen at `path`; this user alone can ring.

        Raises:
            OSError: the socket cannot be made there; its path has at most 107 bytes.
        """
        self._path = path
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        try:
            self._socket.bind(str(path))
        except OSError:
            self._socket.close()
            raise
        finally:
            os.umask(before)

    def __enter__(self) -> Bell:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def fileno(self) -> int:
        """The descriptor that becomes readable when somebody rings."""
        return self._socket.fileno()

    def hush(self) -> int:
        """Forget the rings so far; return how many there were."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(16)
                count += 1
        return count

    def wait(self, timeout_s: float) -> bool:
        """Wait until somebody rings, or the time is up; return whether they did."""
        ready, _, _ = select.select([self._socket], [], [], timeout_s)
        if ready:
            self.hush()
        return bool(ready)


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
