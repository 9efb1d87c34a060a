"""Random bytes of the operating system, asked for many at a time: salts, nonces and ids, a few each request.

Each byte is given out once. A forked child begins with none of its parent's.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import deque
from functools import lru_cache
from typing import Final

PIECE: Final = 32  # bytes
_AT_ONCE: Final = 64  # pieces: a call for all of them costs hardly more than for one

_NONCE_BYTES: Final = 16
_ID_BYTES: Final = 7
TIME: Final = re.compile(r"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z")  # of an entry
_ONLY_DIGITS: Final = str.maketrans("", "", "-T:Z")

_ids_made = itertools.count()
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


def entry_names(time: str) -> tuple[str, str]:
    """Return an event id and a nonce, 32 hex digits each, for an entry of that time (RFC 3339, UTC).

    Ids that begin with the time and a count lie together in an index; 56 bits are random.
    """
    chance = hex_text(_NONCE_BYTES + _ID_BYTES)
    count = f"{next(_ids_made) & 0xFFFFFF:06x}"
    return f"{_moment(time)}{count}{chance[2 * _NONCE_BYTES :]}", chance[: 2 * _NONCE_BYTES]


@lru_cache(maxsize=8)
def _moment(time: str) -> str:
    return time.translate(_ONLY_DIGITS)[2:] if TIME.fullmatch(time) else "0" * 12


os.register_at_fork(after_in_child=_pieces.clear)
