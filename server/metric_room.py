"""Room for the workers' metrics, taken before it is written to.

`prometheus_client` maps sparse files into memory. On a full disk the kernel has no block for a page that is
written to, and ends the process by SIGBUS. Here a file's blocks are reserved when it is made and when it
grows; where there are none, the value waits in memory, and is written, whole, once there is room: the metric
is late, the worker lives, and its answer does not know.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from prometheus_client import mmap_dict, values

_FIRST_BYTES: Final = 1 << 16  # as prometheus_client makes them
_AGAIN_S: Final = 5.0  # until room is asked for again
_UNABLE: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # this file system reserves nothing

Value = tuple[float, float]  # and the time at which it was set, or 0


class RoomyDict(mmap_dict.MmapedDict):
    """`prometheus_client`'s dictionary in a file, which never touches a page without a block."""

    monotonic: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        self._path, self._positions = Path(filename), {}
        self._f: Any = None
        self._not_before = float("-inf")
        self._opened()

    def read_value(self, key: str) -> Value:
        """Return what was written last; zero where there is no room."""
        if not self._has(key):
            return 0.0, 0.0
        found: Value = super().read_value(key)  # type: ignore[no-untyped-call]  # has no types
        return found

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        """Write the value; without room, nothing: the next one says it all."""
        if self._has(key):
            super().write_value(key, value, timestamp)  # type: ignore[no-untyped-call]  # has no types

    def holds(self, keys: Iterable[str]) -> bool:
        """Whether all of these are in the file."""
        return all(key in self._positions for key in keys)

    def _has(self, key: str) -> bool:
        if key in self._positions:
            return True
        if self.monotonic() < self._not_before or not self._opened():
            return False
        capacity, needed = self._capacity, self._used + len(key.encode()) + 32
        grown = capacity
        while needed > grown:
            grown *= 2
        try:
            if grown > capacity:
                reserve(self._f.fileno(), capacity, grown - capacity)
            self._init_value(key)  # type: ignore[no-untyped-call]  # has no types
        except OSError:
            self._capacity = capacity
            self._not_before = self.monotonic() + _AGAIN_S
            return False
        return True

    def _opened(self) -> bool:
        if self._f is not None:
            return True
        try:
            _make(self._path)
            super().__init__(str(self._path))  # type: ignore[no-untyped-call]  # has no types
        except OSError:
            half_open: Any = self._f
            if half_open is not None:
                half_open.close()
            self._f = None
            self._not_before = self.monotonic() + _AGAIN_S
            return False
        return True


def install() -> None:
    """Let every metric that is made from now on keep its values so."""
    vars(values)["MmapedDict"] = RoomyDict  # the name under which its own module looks it up


def reserve(descriptor: int, start: int, size: int) -> None:
    """Take blocks for a part of a file; OSError where there are none."""
    try:
        os.posix_fallocate(descriptor, start, size)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        with open(descriptor, "r+b", buffering=0, closefd=False) as file:
            file.seek(start)
            if file.write(bytes(size)) != size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _make(path: Path) -> None:
    """Make a file of nothing but room; nobody sees it before it has that."""
    if path.exists():
        with path.open("r+b") as file:
            reserve(file.fileno(), 0, max(path.stat().st_size, _FIRST_BYTES))
        return
    made = path.with_name(f"{path.name}.new")
    try:
        with open(os.open(made, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "r+b") as file:
            reserve(file.fileno(), 0, _FIRST_BYTES)
        made.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            made.unlink(missing_ok=True)
        raise


def read_file(path: Path) -> dict[str, Value]:
    """Return what a file holds, by key.

    Raises:
        RuntimeError, ValueError, struct.error: the file is damaged.
    """
    found = RoomyDict.read_all_values_from_file(str(path))  # type: ignore[no-untyped-call]  # has no types
    return {key: (value, when) for key, value, when, _ in found}
