"""What a process gives up before it runs code that somebody else wrote: files, signals, size and time.

Landlock (Linux 5.13 and newer) confines a process without any privilege, and whatever it starts, for good:
files outside the listed folders cannot be opened, processes outside cannot be signalled or traced (6.12), TCP
connections go to the listed ports alone (6.7). Where the kernel is older, `confine` says what it could not
do; users kept apart and file modes then have to answer.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_RULE_PATH, _RULE_PORT = 1, 2
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE: Final = 1 << 14
_READ: Final = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | 1 << 15
_FS_BY_ABI: Final = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_CONNECT_TCP: Final = 1 << 1
_BIND_TCP: Final = 1 << 0
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1 << 0, 1 << 1

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """All that a confined process may still reach."""

    read: tuple[Path, ...] = ()
    write: tuple[Path, ...] = ()  # and read
    tcp_ports: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Resource limits of a process; None leaves one as it is."""

    cpu_s: int | None = 120
    address_space_bytes: int | None = 8 << 30
    file_bytes: int | None = 1 << 30
    open_files: int | None = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Confined:
    """What was confined: `abi` is the kernel's Landlock version, 0 for none."""

    abi: int

    @property
    def files(self) -> bool:
        return self.abi >= 1

    @property
    def network(self) -> bool:
        return self.abi >= 4

    @property
    def signals(self) -> bool:
        return self.abi >= 6


def landlock_abi() -> int:
    """Return the kernel's Landlock version, 0 for none."""
    version = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(0, int(version))


def keep_secrets() -> None:
    """No core dump of this process, and no other process of the same user may read its memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def limit(limits: Limits) -> None:
    """Lower this process's resource limits, and those of all it starts."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for which, value in (
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_AS, limits.address_space_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
    ):
        if value is not None:
            _, hard = resource.getrlimit(which)
            low = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (low, low))


def confine(allowance: Allowance) -> Confined:
    """Confine this process for good; call it before any thread starts.

    Raises:
        OSError: the kernel has Landlock and declines.
    """
    abi = landlock_abi()
    _prctl(_PR_SET_NO_NEW_PRIVS)
    if abi == 0:
        return Confined(abi=0)
    files = _FS_BY_ABI[min(abi, max(_FS_BY_ABI))]
    network = _CONNECT_TCP | _BIND_TCP if abi >= 4 else 0
    scoped = _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS if abi >= 6 else 0
    attributes = struct.pack("=QQQ", files, network, scoped)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    try:
        _allow(ruleset, allowance.read, files & _READ)
        _allow(ruleset, allowance.write, files)
        if network:
            for port in allowance.tcp_ports:
                rule = struct.pack("=QQ", _CONNECT_TCP, port)
                _syscall(_ADD_RULE, ruleset, _RULE_PORT, rule, ctypes.c_uint32(0))
        _syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return Confined(abi=abi)


def _allow(ruleset: int, paths: Iterable[Path], access: int) -> None:
    for path in paths:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # what is not there needs no rule
        try:
            granted = access if path.is_dir() else access & _OF_FILES
            rule = struct.pack("=Qi", granted, descriptor)
            _syscall(_ADD_RULE, ruleset, _RULE_PATH, rule, ctypes.c_uint32(0))
        finally:
            os.close(descriptor)


def _prctl(option: int) -> None:
    if _libc.prctl(option, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _syscall(*arguments: object) -> int:
    result = int(_libc.syscall(*arguments))
    if result < 0:
        number = ctypes.get_errno() or errno.EINVAL
        raise OSError(number, os.strerror(number))
    return result
