"""Ports for servers that a test starts: nobody else takes one between the choice and the server's start."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from typing import Final

_FIRST: Final = 20_000  # below those that the kernel gives to whoever asks for any
_EACH: Final = 1_000


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 on which nobody listens; each process of pytest has a range of its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw11").removeprefix("gw")) % 12
    first = _FIRST + _EACH * worker
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        for port in random.SystemRandom().sample(range(first, first + _EACH), _EACH):
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise AssertionError(f"of the ports from {first} on, {len(found)} are free, not {count}")
