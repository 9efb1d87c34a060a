"""Random bytes of the operating system, asked for many at a time: salts, nonces and ids, a few each request.

Each byte is given out once. A forked child begins with none of its parent's.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Final

PIECE: Final = 32  # bytes
_AT_ONCE: Final = 64  # pieces: a call for all of them costs hardly more than for one

_pieces: deque[bytes] = deque()


def piece() -> bytes:
    """Return `PIECE` bytes that nobody else has; safe for threads."""
    while True:
        try:
            return _pieces.popleft()
        except IndexError:
            fresh = os.urandom(PIECE * _AT_ONCE)
            _pieces.extend(fresh[start : start + PIECE] for start in range(0, len(fresh), PIECE))


def hex_text(size: int) -> str:
    """Return `size` random bytes, at most `PIECE`, as hexadecimal digits."""
    if not 0 < size <= PIECE:
        raise ValueError(f"1 to {PIECE} bytes are given at once, not {size}")
    return piece()[:size].hex()


os.register_at_fork(after_in_child=_pieces.clear)
