"""A SuperNode's question for messages, held at the gateway while there are none.

A SuperNode asks again and again; most answers are empty, and each costs SuperLink a look into its database.
The gateway keeps a question back when the same node's last answer was empty and, since then, nobody has rung
(`federation.network.ringing`) or the node was given a message for each ring; for two and a half seconds at
most, then it passes it on whatever happened. So a lost ring costs that time, and a message is on its way as
soon as it is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesResponse
from google.protobuf.message import DecodeError

from federation.network.bell import Bell, ring

HOLD_S: Final = 2.5
MAX_HELD: Final = 256  # questions beyond that are passed on at once


class PullHold:
    """Whose questions wait, and who is told when a reply is whole. For one event loop."""

    def __init__(self, *, hold_s: float = HOLD_S, most: int = MAX_HELD) -> None:
        self._hold_s, self._most = hold_s, most
        self._folder: Path | None = None
        self._bell: Bell | None = None
        self._rings, self._rung = 0, asyncio.Event()
        self._empty: dict[str, int] = {}  # node -> how often it had rung before its last empty answer
        self._taken: dict[str, int] = {}  # node -> messages it was given since
        self._parts: dict[str, int] = {}  # node -> objects of its reply that are still to come
        self._held = 0

    def start(self, bell: Path) -> bool:
        """Hang the bell at `bell` in the running loop; False, and nothing is held, where it cannot hang."""
        try:
            bell.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._bell = Bell(bell)
        except OSError:
            return False
        self._folder = bell.parent
        asyncio.get_running_loop().add_reader(self._bell.fileno(), self._ring)
        return True

    def stop(self) -> None:
        if self._bell is not None:
            asyncio.get_running_loop().remove_reader(self._bell.fileno())
            self._bell.close()
            self._bell = None
        self._release()

    async def wait(self, node: str, gone: Callable[[], Awaitable[Any]]) -> bool:
        """Wait until it is worth asking SuperLink for `node`; return whether the node is still there.

        It is not, while the node was given as many messages since its last empty answer as it has rung: who
        sends rings once, with one message for a node at most.

        `gone` returns when the node has hung up: what is then pulled for it would be lost.
        """
        nothing_new = node in self._empty and self._rings - self._empty[node] <= self._taken[node]
        if self._bell is None or not nothing_new or self._held >= self._most:
            return True
        left, rung = asyncio.ensure_future(gone()), asyncio.ensure_future(self._rung.wait())
        self._held += 1
        try:
            await asyncio.wait({left, rung}, timeout=self._hold_s, return_when=asyncio.FIRST_COMPLETED)
            return not left.done()
        finally:
            self._held -= 1
            for task in (left, rung):
                task.cancel()

    @property
    def rings(self) -> int:
        """How often it has rung; to be noted before SuperLink is asked."""
        return self._rings

    def answered(self, node: str, rings: int, content: bytes) -> None:
        """Take note of SuperLink's answer to a question for messages."""
        if _is_empty(content):
            self._empty[node], self._taken[node] = rings, 0
        elif node in self._empty:  # what came without a ring, which was lost, uses up no later one
            self._taken[node] = min(self._taken[node] + 1, rings - self._empty[node])

    def reply_begun(self, node: str, content: bytes) -> None:
        """Take note of SuperLink's answer to a reply's head: which objects it still wants."""
        try:
            wanted = len(PushMessagesResponse.FromString(content).objects_to_push)
        except DecodeError:
            return
        self._parts[node] = wanted
        if not wanted:
            self._tell()

    def reply_part(self, node: str) -> None:
        """One object of a reply has come in; with the last one whoever waits for replies is told."""
        left = self._parts.get(node, 1) - 1
        self._parts[node] = left
        if left <= 0:
            self._parts.pop(node, None)
            self._tell()

    def _tell(self) -> None:
        if self._folder is not None:
            for path in self._folder.glob("run-*"):
                ring(path)

    def _ring(self) -> None:
        if self._bell is not None:
            self._rings += max(1, self._bell.hush())
        self._release()

    def _release(self) -> None:
        self._rung.set()
        self._rung = asyncio.Event()


def _is_empty(content: bytes) -> bool:
    try:
        return not PullMessagesResponse.FromString(content).messages_list
    except DecodeError:
        return False
