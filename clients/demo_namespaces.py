"""Machines for the network demo: network namespaces joined by one bridge, where the system allows them.

Each hospital has an address of its own and no route but the bridge; the coordinator's namespace holds the
bridge. Where namespaces are not permitted everything runs on loopback, and says so.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_NET: Final = "10.77.0"
_SPACES: Final = Path("/var/run/netns")
_CLONE_NEWNET: Final = 0x40000000
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Machines:
    """Where the coordinator is, and how a process gets to a site's machine."""

    host: str
    separate: bool
    spaces: dict[str, Path] = field(default_factory=dict)

    def enter(self, site: str) -> None:
        """Take this process to the site's machine; nothing happens where all share one.

        Raises:
            OSError: the system does not let it.
        """
        space = self.spaces.get(site)
        if space is not None:
            _enter(space)


@contextmanager
def machines(sites: Sequence[str], *, namespaces: bool = True) -> Iterator[Machines]:
    """Yield a machine for each site; this process stands in the coordinator's for the time of the block."""
    if not namespaces or os.geteuid() != 0 or not Path("/var/run").is_dir():
        yield Machines(host="127.0.0.1", separate=False)
        return
    tag = secrets.token_hex(2)
    made: list[str] = []
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        try:
            found = _build(tag, sites, made)
        except (OSError, subprocess.CalledProcessError):
            found = Machines(host="127.0.0.1", separate=False)
        yield found
    finally:
        _libc.setns(home, _CLONE_NEWNET)
        os.close(home)
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _build(tag: str, sites: Sequence[str], made: list[str]) -> Machines:
    hub = f"aff{tag}-hub"
    _namespace(hub, made)
    _ip("-n", hub, "link", "add", "br0", "type", "bridge")
    _ip("-n", hub, "addr", "add", f"{_NET}.1/24", "dev", "br0")
    _ip("-n", hub, "link", "set", "br0", "up")
    spaces = {}
    for number, site in enumerate(sites):
        name, outer = f"aff{tag}-{number}", f"v{tag}{number}"
        _namespace(name, made)
        _ip("link", "add", outer, "netns", hub, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", hub, "link", "set", outer, "master", "br0", "up")
        _ip("-n", name, "addr", "add", f"{_NET}.{number + 10}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        spaces[site] = _SPACES / name
    _enter(_SPACES / hub)
    return Machines(host=f"{_NET}.1", separate=True, spaces=spaces)


def _enter(space: Path) -> None:
    with space.open("rb") as target:
        if _libc.setns(target.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def _namespace(name: str, made: list[str]) -> None:
    _ip("netns", "add", name)
    made.append(name)
    _ip("-n", name, "link", "set", "lo", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)
