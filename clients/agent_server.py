"""The agent's end of its Unix socket: who may knock, how often, how long, how much.

The socket is `<folder>/<site>.sock`, mode 0660, in a folder that nobody else may write. The kernel says who
is on the other side (SO_PEERCRED): the agent's own user and the relay users that `site.yaml` lists, nobody
else. Each process has a budget of requests, so that one that floods does not starve the next; each frame has
a size and a deadline; connections are capped. What is turned away here never reaches the agent's lock.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from clients.agent_place import STATUS
from clients.errors import LinkError
from clients.link import AgentLink
from clients.socket_link import FRAME_TIMEOUT_S, MAX_FRAME_BYTES, Frame, send_frame

_logger = logging.getLogger(__name__)

MAX_PATH_BYTES: Final = 107  # of sockaddr_un
_PEERCRED: Final = struct.Struct("3i")

Refused = Callable[[str, str], None]
Target = Callable[[socket.socket], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much the door lets through."""

    connections: int = 32
    burst: int = 30  # requests that a process may make at once
    per_second: float = 5.0  # and afterwards
    user_burst: int = 300  # the same over all processes of a user
    user_per_second: float = 50.0
    head_timeout_s: float = 5.0
    frame_timeout_s: float = FRAME_TIMEOUT_S
    answer_timeout_s: float = 60.0  # for the other end to take each part of an answer
    bytes_in_flight: int = 2 * MAX_FRAME_BYTES


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is on the other side of a connection, by the kernel."""

    pid: int
    uid: int


class AgentServer:
    """Listens on one agent's socket from `start` to `close`."""

    def __init__(
        self,
        agent: AgentLink,
        path: Path,
        *,
        uids: frozenset[int] = frozenset(),
        limits: Limits | None = None,
        refused: Refused | None = None,
        status: Callable[[], Mapping[str, Any]] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nobody can connect yet.

        Args:
            uids: users besides this process's own that may speak to the agent.
            refused: told of what is turned away here, as (kind, code).
            status: what `agent.status` answers, to this process's own user alone.
        """
        self.path = path
        self._agent, self._uids = agent, uids | {os.geteuid()}
        self._limits = limits or Limits()
        self._refused, self._status = refused, status
        self._buckets = Buckets(self._limits, monotonic)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._in_flight = 0
        self._listener: socket.socket | None = None
        self._threads: set[threading.Thread] = set()
        self.counts = {"answered": 0, "turned_away": 0}

    def start(self) -> None:
        """Listen.

        Raises:
            LinkError: the folder is open to others, another agent answers there, or the path is too long.
        """
        _check_folder(self.path.parent)
        _clear(self.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self.path))
            self.path.chmod(0o660)
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise LinkError(f"cannot listen on {self.path}: {error}") from error
        self._listener = listener
        self._begin(self._accept, listener, name=f"agent-{self.path.stem}")

    def close(self, timeout_s: float = 10.0) -> None:
        """Let nobody in any more, give those inside `timeout_s` to finish, then hang up."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        self.path.unlink(missing_ok=True)
        deadline = time.monotonic() + timeout_s
        for thread in self._living():
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            left = list(self._open)
        for connection in left:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._living():
            thread.join(1.0)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # the listener was closed
            with self._lock:
                full = len(self._open) >= self._limits.connections
                if not full:
                    self._open.add(connection)
            if full:
                self._turn_away(connection, "connect", "rate_limited")
                connection.close()
                continue
            self._begin(self._serve, connection, name=f"agent-{self.path.stem}-peer")

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._exchange(connection)
        except (OSError, LinkError) as error:
            _logger.warning("a relay's connection failed: %s", error)
        finally:
            with self._lock:
                self._open.discard(connection)

    def _exchange(self, connection: socket.socket) -> None:
        peer = peer_of(connection)
        if peer.uid not in self._uids:
            _logger.warning("user %d may not speak to this agent", peer.uid)
            self._turn_away(connection, "connect", "peer_not_allowed")
            return
        if not self._buckets.take(peer):
            self._turn_away(connection, "connect", "rate_limited")
            return
        limits = self._limits
        try:
            frame = Frame(connection, limits.head_timeout_s)
            head = frame.head()
        except LinkError:
            self._note("connect", "bad_request")
            raise
        if head.kind == STATUS:
            self._answer_status(connection, peer)
            return
        with self._room(head.size_bytes) as fits:
            if not fits:
                self._turn_away(connection, head.kind, "rate_limited")
                return
            try:
                header, blobs = frame.within(limits.frame_timeout_s).body(head)
            except LinkError:
                self._note(head.kind, "bad_request")
                raise
            answer, answer_blobs = self._agent.handle(head.kind, header, blobs)
        self.counts["answered"] += 1
        connection.settimeout(limits.answer_timeout_s)
        send_frame(connection, "answer", answer, answer_blobs)

    def _answer_status(self, connection: socket.socket, peer: Peer) -> None:
        if self._status is None or peer.uid != os.geteuid():
            self._turn_away(connection, STATUS, "peer_not_allowed")
            return
        connection.settimeout(self._limits.answer_timeout_s)
        send_frame(connection, "answer", json.dumps(dict(self._status())).encode(), {})

    def _turn_away(self, connection: socket.socket, kind: str, code: str) -> None:
        self._note(kind, code)
        with suppress(OSError):
            connection.settimeout(0.2)
            send_frame(connection, "answer", json.dumps({"error": code}).encode(), {})
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1 << 16)  # closing on bytes that nobody read would take the answer back

    def _note(self, kind: str, code: str) -> None:
        self.counts["turned_away"] += 1
        if self._refused is not None:
            self._refused(kind, code)

    @contextmanager
    def _room(self, size: int) -> Iterator[bool]:
        with self._lock:
            fits = self._in_flight + size <= self._limits.bytes_in_flight
            if fits:
                self._in_flight += size
        try:
            yield fits
        finally:
            if fits:
                with self._lock:
                    self._in_flight -= size

    def _begin(
        self, target: Callable[[socket.socket], None], connection: socket.socket, *, name: str
    ) -> None:
        def run() -> None:
            try:
                target(connection)
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _living(self) -> list[threading.Thread]:
        with self._lock:
            return [thread for thread in self._threads if thread is not threading.current_thread()]


class Buckets:
    """Token buckets, one a process and one a user."""

    _KEPT: Final = 1024

    def __init__(self, limits: Limits, monotonic: Callable[[], float]) -> None:
        self._limits, self._monotonic = limits, monotonic
        self._lock = threading.Lock()
        self._levels: OrderedDict[tuple[int, int], tuple[float, float]] = OrderedDict()

    def take(self, peer: Peer) -> bool:
        """Take one request out of the peer's buckets; False when one of them is empty."""
        limits, now = self._limits, self._monotonic()
        own, user = (peer.uid, peer.pid), (peer.uid, -1)
        with self._lock:
            left = self._level(own, limits.burst, limits.per_second, now)
            shared = self._level(user, limits.user_burst, limits.user_per_second, now)
            granted = left >= 1
            if granted:  # who is over their own budget takes nothing out of the shared one
                left -= 1
                granted = shared >= 1
                if granted:
                    shared -= 1
            self._put(own, left, now)
            self._put(user, shared, now)
        return granted

    def _level(self, key: tuple[int, int], burst: int, per_second: float, now: float) -> float:
        level, then = self._levels.get(key, (float(burst), now))
        return min(float(burst), level + (now - then) * per_second)

    def _put(self, key: tuple[int, int], level: float, now: float) -> None:
        self._levels[key] = (level, now)
        self._levels.move_to_end(key)
        while len(self._levels) > self._KEPT:
            self._levels.popitem(last=False)


def peer_of(connection: socket.socket) -> Peer:
    """Return the process and user at the other end, as they were when it connected."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, uid, _ = _PEERCRED.unpack(raw)
    return Peer(pid, uid)


@contextmanager
def served_agents(folder: Path, agents: Mapping[str, AgentLink]) -> Iterator[None]:
    """Listen on `<folder>/<site>.sock` for each agent for the time of the block.

    Raises:
        LinkError: a socket cannot be made there.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    generous = Limits(burst=10_000, per_second=1e4, user_burst=100_000, user_per_second=1e5)
    with ExitStack() as stack:
        for site, agent in agents.items():
            server = AgentServer(agent, folder / f"{site}.sock", limits=generous)
            server.start()
            stack.callback(server.close)
        yield


def _check_folder(folder: Path) -> None:
    try:
        found = folder.stat()
    except OSError as error:
        raise LinkError(f"{folder}: {error.strerror}; make the agent's folder first") from error
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise LinkError(
            f"{folder}: others may write there; it must be this user's own, mode 0700 or 0750, so that "
            "nobody can put another socket in its place"
        )


def _clear(path: Path) -> None:
    """Remove the socket of an agent that died; never one that somebody answers on, and no other file."""
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise LinkError(f"{path}: is longer than {MAX_PATH_BYTES} bytes; choose a shorter --run folder")
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise LinkError(f"{path}: is in the way and no socket; remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise LinkError(f"{path}: another agent answers there; stop it first, or choose another --run folder")
