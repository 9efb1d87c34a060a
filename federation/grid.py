"""An in-process `Grid`: Flower's real ServerApp and ClientApp objects, without Ray, processes or ports.

Each node is one ClientApp with its own `node_config` and its own queue: its messages are handled one after
the other, in order. Up to `MANY_NODES` nodes have a thread each, so that a slow one holds up nobody; more
are served by whoever waits for them, for threads would only fight for the interpreter. A transport can be
told to lose, delay or repeat messages, which is how the round loop is tested against a bad network.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID: Final = 1  # Flower's own constant for the SuperLink
_CLIENT_APP_RAISED: Final = 2  # Flower's error code for an exception in a ClientApp
_POLL_S: Final = 0.002
MANY_NODES: Final = 32

Fault = Callable[[str, Message], float | None]
"""(site, message) -> seconds to wait before delivery, 0 for now, None to lose it. Called for requests and
replies.
"""


@dataclass(slots=True)
class Node:
    """One simulated SuperNode, and the messages that wait for it."""

    node_id: int
    site: str
    context: Context
    inbox: deque[Message] = field(default_factory=deque)
    is_scheduled: bool = False  # in the queue of nodes with work, or with a worker now


class InProcessGrid(Grid):
    """Delivers messages to ClientApps in worker threads. Use as a context manager, or call `close`."""

    def __init__(
        self,
        client_app: ClientApp,
        sites: Mapping[str, Mapping[str, str | int | float | bool]],
        *,
        run_config: Mapping[str, str | int | float | bool] | None = None,
        fault: Fault | None = None,
        poll_s: float = _POLL_S,
        workers: int | None = None,
    ) -> None:
        """Start one node for each site: `sites` maps its name to its node_config (`site` is added).

        `workers` is how many threads serve them: by default one a node up to `MANY_NODES`, else none: whoever
        asks for replies does the work, node by node.
        """
        run_id = secrets.randbits(62) | 1
        self._run = Run.create_empty(run_id)
        self._fault, self._poll_s = fault, poll_s
        self._client_app, self._closed = client_app, False
        self._replies: dict[str, Message] = {}
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SERVER_NODE_ID
        self._nodes: dict[int, Node] = {}
        self._ready: queue.SimpleQueue[Node | None] = queue.SimpleQueue()
        for name, config in sorted(sites.items()):
            node_id = secrets.randbits(62) | 2
            context = Context(
                run_id=run_id,
                node_id=node_id,
                node_config={**config, "site": name},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            self._nodes[node_id] = Node(node_id=node_id, site=name, context=context)
        if workers is None:
            workers = len(self._nodes) if len(self._nodes) <= MANY_NODES else 0
        self._workers = [
            threading.Thread(target=self._serve, name=f"grid-{number}", daemon=True)
            for number in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    def __enter__(self) -> InProcessGrid:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers; messages still queued are dropped."""
        self._closed = True
        for _ in self._workers:
            self._ready.put(None)
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join(timeout=5)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node.node_id, name=node.site) for node in self._nodes.values()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{next(self._ids)}"
            ids.append(message.metadata.message_id)
            node = self._nodes.get(message.metadata.dst_node_id)
            if node is not None and not self._closed:
                self._deliver(node.site, message, functools.partial(self._enqueue, node))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if not self._workers:
            self._serve_one()
        with self._lock:
            if not self._replies:
                return []
            ids = message_ids if isinstance(message_ids, set) else set(message_ids)
            return [self._replies.pop(name) for name in sorted(self._replies.keys() & ids)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        waiting = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (deadline is None or time.monotonic() < deadline):
            found = list(self.pull_messages(waiting))
            replies += found
            waiting -= {reply.metadata.reply_to_message_id for reply in found}
            if waiting and not found:
                time.sleep(self._poll_s)
        return replies

    def _enqueue(self, node: Node, message: Message) -> None:
        with self._lock:
            node.inbox.append(message)
            if not node.is_scheduled:
                node.is_scheduled = True
                self._ready.put(node)

    def _serve(self) -> None:
        while (node := self._ready.get()) is not None and not self._closed:
            self._answer(node)

    def _serve_one(self) -> None:
        """Let the next node with work answer one message, here and now."""
        with contextlib.suppress(queue.Empty):
            node = self._ready.get_nowait()
            if node is not None and not self._closed:
                self._answer(node)

    def _answer(self, node: Node) -> None:
        self._deliver(node.site, self._reply(node, node.inbox.popleft()), self._store)
        with self._lock:
            node.is_scheduled = bool(node.inbox)
            if node.is_scheduled:
                self._ready.put(node)

    def _reply(self, node: Node, message: Message) -> Message:
        try:
            return self._client_app(message, node.context)
        except Exception as error:  # noqa: BLE001 - a node's failure is an error reply, as Flower's is
            return Message(Error(_CLIENT_APP_RAISED, type(error).__name__), reply_to=message)

    def _store(self, reply: Message) -> None:
        with self._lock:
            self._replies[reply.metadata.reply_to_message_id] = reply

    def _deliver(self, site: str, message: Message, put: Callable[[Message], None]) -> None:
        delay_s = 0.0 if self._fault is None else self._fault(site, message)
        if delay_s is None:
            return
        if delay_s <= 0:
            put(message)
            return
        timer = threading.Timer(delay_s, put, args=(message,))
        timer.daemon = True
        timer.start()
