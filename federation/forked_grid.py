"""The in-process grid with its nodes shared out among forked processes: a core each.

Each child is a copy of this process at the moment of the fork, answers for its share of the nodes one message
after the other, and says at the end what became of them (`leaving`), which this process takes over
(`returned`). Nothing else comes back. What a node's ClientApp reaches must therefore need no other
process: for simulations of many sites. Messages travel pickled, between two halves of one program.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import gc
import logging
import os
import pickle
import queue
import selectors
import signal
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
_AT_ONCE: Final = 8  # messages
_TOGETHER, _TOGETHER_S = 4, 0.02  # replies, where they come quickly: each time the parent wakes costs a child
_SAFE: Final = "jemalloc_bg_thd"
_HARD: Final = 2  # omp_pause_hard
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
    _end_pools()
    return not _has_foreign_threads(wait_s=0.1)  # a thread is seen for a moment after it ended


def _has_foreign_threads(*, wait_s: float = 0.0) -> bool:
    until = time.monotonic() + wait_s
    while True:
        by_python = _thread._count() + 1  # this one too; `threading` does not know of all of them
        tasks = [_name_of(task) for task in os.listdir("/proc/self/task")]
        if len([name for name in tasks if name != _SAFE]) <= by_python:
            return False
        if time.monotonic() >= until:
            return True
        time.sleep(0.002)


def _end_pools() -> None:
    """Let the pools end: OpenBLAS's, there from numpy's import on, and libgomp's, from torch's first product.

    OpenBLAS's is the function that it calls itself before a fork; OpenMP's is in its standard since 5.0.
    """
    mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    for path in sorted(mapped):
        for library, function, arguments in _POOLS:
            if library in path.rpartition("/")[2]:
                with contextlib.suppress(OSError, AttributeError):  # replaced on disk, or built without it
                    getattr(ctypes.CDLL(path), function)(*arguments)


def _name_of(task: str) -> str:
    try:
        return Path("/proc/self/task", task, "comm").read_text().strip()
    except OSError:
        return _SAFE  # it has ended since


@dataclass(slots=True)
class _Child:
    pid: int
    connection: Connection
    sites: tuple[str, ...]
    outbox: list[Message] = field(default_factory=list)
    open: dict[str, Message] = field(default_factory=dict)  # sent and not answered, by message id
    is_gone: bool = False


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
        run_config: Mapping[str, str | int | float | bool] | None = None,
    ) -> None:
        """Fork now. `leaving(site)` is called in a child at the end, `returned(site, what it gave)` here."""
        super().__init__(client_app, sites, run_config=run_config, workers=0)
        self._leaving, self._returned = leaving, returned
        self._selector = selectors.DefaultSelector()
        self._children: list[_Child] = []
        self._child_of: dict[str, _Child] = {}
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
        child = _Child(pid, ours, sites)
        self._children.append(child)
        self._child_of |= dict.fromkeys(sites, child)
        self._selector.register(ours, selectors.EVENT_READ, child)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        while any(child.outbox for child in self._children):  # in turns, so that all begin soon
            for child in self._children:
                batch, child.outbox = child.outbox[:_AT_ONCE], child.outbox[_AT_ONCE:]
                if batch:
                    child.open |= {message.metadata.message_id: message for message in batch}
                    self._send(child, batch)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wait_s = 0.0 if self._replies else self._poll_s
        for key, _ in self._selector.select(wait_s):
            self._receive(key.data)
        return super().pull_messages(message_ids)

    def close(self) -> None:
        """Let the children hand over what became of their nodes, and end."""
        if not self._closed:
            self._closed = True
            for child in self._children:
                self._send(child, None)
            for child in self._children:
                self._bid_farewell(child)
            self._selector.close()

    def _enqueue(self, node: Node, message: Message) -> None:
        self._child_of[node.site].outbox.append(message)

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
        for reply in replies:
            asked = child.open.pop(reply.metadata.reply_to_message_id, None)
            if asked is not None:
                node = self._nodes[asked.metadata.dst_node_id]
                self._deliver(node.site, reply, self._store)

    def _lose(self, child: _Child) -> None:
        """Say of everything that a child had, and is given from now on, that its process is gone."""
        if not child.is_gone:
            child.is_gone = True
            _logger.error("the process of %d simulated sites is gone", len(child.sites))
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(child.connection)
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
            if child.is_gone:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, 0)

    def _be_child(self, connection: Connection, sites: tuple[str, ...]) -> NoReturn:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when it is over
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
        if not parent_is_gone.is_set():
            states = {site: self._leaving(site) for site in sites}
            connection.send_bytes(pickle.dumps(states, pickle.HIGHEST_PROTOCOL))
