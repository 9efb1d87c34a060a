"""The in-process grid with its nodes shared out among forked processes: a core each.

Each child is a copy of this process at the moment of the fork, answers for its share of the nodes one message
after the other, and says at the end what became of them (`leaving`), which this process takes over
(`returned`). Nothing else comes back. What a node's ClientApp reaches must therefore need no other
process: for simulations of many sites. Messages travel pickled, between two halves of one program.

A child has a few messages at a time; more wait here, so that no side waits with a full pipe while there is
something to read. Nobody is waited for without end: a child that has died, that takes or gives no byte in the
middle of a message, or that sleeps over messages without a moment's work, is gone, and says where it stood.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import pickle
import queue
import selectors
import signal
import socket
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Final, NoReturn

from flwr.app import Error, Message
from flwr.clientapp import ClientApp

from federation.grid import InProcessGrid, Node

_logger = logging.getLogger(__name__)

_CLIENT_APP_CRASHED: Final = 8  # Flower's error code for a process that went away with a message
_LEAVE_S: Final = 60.0
_STALL_S: Final = 60.0  # without a byte in the middle of a message, or without work where there is some
_LOOK_S: Final = 1.0
_WAIT_S: Final = 0.02  # for replies, at a time
_AT_ONCE: Final = 8  # messages
_AT_FIRST: Final = 2  # to a child that has nothing to do
_AHEAD: Final = 8  # that a child still has when it is given more
_TOGETHER, _TOGETHER_S = 4, 0.02  # replies, where they come quickly: each time the parent wakes costs a child
_SAFE: Final = "jemalloc_bg_thd"
_HARD: Final = 2  # omp_pause_hard
_TELL: Final = signal.SIGUSR2
_TELLING_S: Final = 0.5
_STDERR: Final = 2
_POOLS: Final = (("openblas", "blas_thread_shutdown_", ()), ("libgomp", "omp_pause_resource_all", (_HARD,)))


def may_fork() -> bool:
    """Whether a copy of this process would work: not beside threads that Python did not start.

    Those of gRPC, say, leave locks held in the copy that nobody there will ever release. jemalloc's, which
    comes with pyarrow, lets go of its own before each fork. Those of numpy's and torch's pools are asked to
    end: a pool starts again when it is next needed.
    """
    if sys.platform != "linux":
        return False
    if not _has_foreign_threads():
        return True
    if not _comes_true(_is_quiet, wait_s=0.5):
        return False  # a pool that ends below somebody's product leaves him waiting for it
    _end_pools()
    # a thread is seen for a moment after it ended
    return _comes_true(lambda: not _has_foreign_threads(), wait_s=0.1)


def _comes_true(condition: Callable[[], bool], *, wait_s: float) -> bool:
    until = time.monotonic() + wait_s
    while not condition():
        if time.monotonic() >= until:
            return False
        time.sleep(0.002)
    return True


def _has_foreign_threads() -> bool:
    """Whether the system knows of more threads than Python; of two counts that differ, no.

    A thread that ends between one count and the other would hide another: so both are taken twice.
    """
    while True:
        before = _thread._count(), _tasks()  # `threading` does not know of all of them
        after = _thread._count(), _tasks()
        if before == after:
            by_python, tasks = after
            return len([name for task in tasks if (name := _name_of(task)) != _SAFE]) > by_python + 1


def _tasks() -> list[str]:
    return sorted(os.listdir("/proc/self/task"))


def _is_quiet() -> bool:
    """Whether every other thread sleeps. Of a product that is shared out, somebody is always at work."""
    own = str(threading.get_native_id())
    return not any(_state_of(task) == "R" and _name_of(task) != _SAFE for task in _tasks() if task != own)


def _state_of(task: str) -> str:
    try:
        return Path("/proc/self/task", task, "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""  # it has ended since


def _end_pools() -> None:
    """Let the pools end: OpenBLAS's, there from numpy's import on, and libgomp's, from torch's first product.

    OpenBLAS's is the function that it calls itself before a fork; OpenMP's is in its standard since 5.0.
    They are called with the interpreter's lock held, so that no thread of Python begins a product meanwhile.
    """
    mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    for path in sorted(mapped):
        for library, function, arguments in _POOLS:
            if library in path.rpartition("/")[2]:
                with contextlib.suppress(OSError, AttributeError):  # replaced on disk, or built without it
                    getattr(ctypes.PyDLL(path), function)(*arguments)


def _name_of(task: str) -> str:
    try:
        return Path("/proc/self/task", task, "comm").read_text().strip()
    except OSError:
        return _SAFE  # it has ended since


def _activity(pid: int) -> tuple[str, int] | None:
    """Return a child's state and how long it has worked, in ticks; None once it is dead."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (fields[0], int(fields[11]) + int(fields[12]))


def _limit_waits(connection: Connection, wait_s: float) -> None:
    """Let a send or a receive fail that moves no byte for so long."""
    limit = struct.pack("ll", int(wait_s), int(wait_s % 1 * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


@dataclass(slots=True)
class _Child:
    pid: int
    connection: Connection
    sites: tuple[str, ...]
    outbox: list[Message] = field(default_factory=list)
    open: dict[str, Message] = field(default_factory=dict)  # sent and not answered, by message id
    is_gone: bool = False
    moved: float = field(default_factory=time.monotonic)  # when it was last seen to do anything
    worked: int = -1  # ticks of the processor, when last seen


class ForkedGrid(InProcessGrid):
    """Delivers messages to ClientApps in `processes` children. Use as a context manager, or call `close`."""

    def __init__(
        self,
        client_app: ClientApp,
        sites: Mapping[str, Mapping[str, str | int | float | bool]],
        *,
        processes: int,
        leaving: Callable[[str], Any],
        returned: Callable[[str, Any], None],
        resting: Callable[[], bool] = lambda: False,
        run_config: Mapping[str, str | int | float | bool] | None = None,
        stall_s: float = _STALL_S,
    ) -> None:
        """Fork now. `leaving(site)` is called in a child at the end, `returned(site, what it gave)` here.

        `resting()` is called in a child while it has no message, until it says that there is no more to do.
        `stall_s`: for how long a child may sleep over messages, or over one that is half sent, before it
        counts as gone. One that computes is never too slow.
        """
        super().__init__(client_app, sites, run_config=run_config, poll_s=_WAIT_S, workers=0)
        self._leaving, self._returned, self._resting = leaving, returned, resting
        self._selector = selectors.DefaultSelector()
        self._children: list[_Child] = []
        self._child_of: dict[str, _Child] = {}
        self._stall_s, self._looked = stall_s, time.monotonic()
        names = sorted(sites)
        try:
            for number in range(processes):
                self._fork(tuple(names[number::processes]))
        except BaseException:
            self.close()
            raise

    def _fork(self, sites: tuple[str, ...]) -> None:
        ours, theirs = Pipe()
        with warnings.catch_warnings():
            # the child starts no work in threads that it does not have: it only runs its nodes
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            for child in self._children:
                child.connection.close()
            ours.close()
            self._be_child(theirs, sites)
        theirs.close()
        _limit_waits(ours, self._stall_s)
        child = _Child(pid, ours, sites)
        self._children.append(child)
        self._child_of |= dict.fromkeys(sites, child)
        self._selector.register(ours, selectors.EVENT_READ, child)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages while they are made: the first nodes are at work before the last one is asked."""
        ids = list(super().push_messages(messages))
        for child in self._children:
            self._feed(child)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return what has come; where nothing has, wait a moment for it."""
        wait_s = 0.0 if self._replies else self._poll_s
        for key, _ in self._selector.select(wait_s):
            self._receive(key.data)
        if time.monotonic() - self._looked >= _LOOK_S:
            self._look()
        return super().pull_messages(message_ids)

    def close(self) -> None:
        """Let the children hand over what became of their nodes, and end."""
        if not self._closed:
            self._closed = True
            with contextlib.ExitStack() as stack:  # whatever comes of one, the others are seen to
                stack.callback(self._selector.close)
                for child in reversed(self._children):
                    child.outbox.clear()
                    stack.callback(self._bid_farewell, child)
                for child in self._children:
                    self._send(child, None)

    def _enqueue(self, node: Node, message: Message) -> None:
        child = self._child_of[node.site]
        child.outbox.append(message)
        if len(child.outbox) >= (_AT_ONCE if child.open else _AT_FIRST):
            self._feed(child)

    def _feed(self, child: _Child) -> None:
        """Give a child what waits for it, up to what keeps it at work."""
        while child.outbox and (child.is_gone or len(child.open) <= _AHEAD):
            batch, child.outbox = child.outbox[:_AT_ONCE], child.outbox[_AT_ONCE:]
            if not child.open:
                child.moved = time.monotonic()
            child.open |= {message.metadata.message_id: message for message in batch}
            self._send(child, batch)

    def _serve_one(self) -> None:
        """The children do."""

    def _send(self, child: _Child, batch: list[Message] | None) -> None:
        if not child.is_gone:
            with contextlib.suppress(OSError):
                child.connection.send_bytes(pickle.dumps(batch, pickle.HIGHEST_PROTOCOL))
                return
        self._lose(child)

    def _receive(self, child: _Child) -> None:
        try:
            replies = pickle.loads(child.connection.recv_bytes())  # noqa: S301 - of a copy of this process
        except (EOFError, OSError):
            self._lose(child)
            return
        child.moved = time.monotonic()
        for reply in replies:
            asked = child.open.pop(reply.metadata.reply_to_message_id, None)
            if asked is not None:
                node = self._nodes[asked.metadata.dst_node_id]
                self._deliver(node.site, reply, self._store)
        self._feed(child)

    def _look(self) -> None:
        """Find children that have died, or that sleep over their messages and will never answer."""
        self._looked = now = time.monotonic()
        for child in self._children:
            if child.is_gone or not child.open:
                continue
            found = _activity(child.pid)
            if found is None:
                self._lose(child)
            elif found != ("S", child.worked):
                child.moved, child.worked = now, found[1]
            elif now - child.moved >= self._stall_s:
                _logger.error("a process of simulated sites did nothing for %.0f s", now - child.moved)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, _TELL)  # where it stands, on its standard error
                time.sleep(_TELLING_S)
                self._lose(child)

    def _lose(self, child: _Child) -> None:
        """Say of everything that a child had, and is given from now on, that its process is gone."""
        if not child.is_gone:
            child.is_gone = True
            _logger.error("the process of %d simulated sites is gone", len(child.sites))
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(child.connection)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)  # it was not waited for: the number is still its own
            child.open |= {message.metadata.message_id: message for message in child.outbox}
            child.outbox.clear()
        for message in child.open.values():
            self._store(Message(Error(_CLIENT_APP_CRASHED, "the process is gone"), reply_to=message))
        child.open.clear()

    def _bid_farewell(self, child: _Child) -> None:
        try:
            while not child.is_gone:
                if not child.connection.poll(_LEAVE_S):
                    raise EOFError
                found = pickle.loads(child.connection.recv_bytes())  # noqa: S301 - of a copy of this process
                if isinstance(found, dict):  # replies that came too late are before it
                    for site, state in found.items():
                        self._returned(site, state)
                    break
        except (EOFError, OSError):
            self._lose(child)
        finally:
            child.connection.close()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, 0)

    def _be_child(self, connection: Connection, sites: tuple[str, ...]) -> NoReturn:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when it is over
            faulthandler.register(_TELL, file=_STDERR, all_threads=True)
            gc.freeze()  # what is the parent's is not looked through again and again
            self._work(connection, sites)
            status = 0
        except BaseException:
            _logger.exception("a process of simulated sites failed")
        finally:
            os._exit(status)  # no handler, file or thread of the parent's is touched

    def _work(self, connection: Connection, sites: tuple[str, ...]) -> None:
        inbox: queue.SimpleQueue[list[Message]] = queue.SimpleQueue()
        is_over, parent_is_gone = threading.Event(), threading.Event()

        def read() -> (
            None
        ):  # always, so that the parent never waits with a message while we wait with a reply
            try:
                while (batch := pickle.loads(connection.recv_bytes())) is not None:  # noqa: S301 - see above
                    inbox.put(batch)
            except (EOFError, OSError):
                parent_is_gone.set()
            except BaseException:  # nobody would read any more, and the parent would wait for answers
                _logger.exception("a process of simulated sites could not read what it was asked")
                os._exit(1)
            is_over.set()
            inbox.put([])

        threading.Thread(target=read, name="grid-reader", daemon=True).start()
        while not is_over.is_set():
            replies: list[Message] = []
            messages, began = inbox.get(), 0.0
            for number, message in enumerate(messages, start=1):
                if is_over.is_set():
                    break  # messages still queued are dropped
                began = time.monotonic() if not replies else began
                replies.append(self._reply(self._nodes[message.metadata.dst_node_id], message))
                is_due = len(replies) >= _TOGETHER or time.monotonic() - began >= _TOGETHER_S
                if is_due or number == len(messages):
                    connection.send_bytes(pickle.dumps(replies, pickle.HIGHEST_PROTOCOL))
                    replies = []
            while inbox.empty() and not is_over.is_set() and self._resting():
                pass
        if not parent_is_gone.is_set():
            states = {site: self._leaving(site) for site in sites}
            connection.send_bytes(pickle.dumps(states, pickle.HIGHEST_PROTOCOL))
