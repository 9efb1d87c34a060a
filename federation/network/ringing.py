"""The ServerApp's line to SuperLink with bells on it, so that neither end looks in short turns.

The gateway holds a SuperNode's question for messages while there are none (`server.network.holding`); the
ServerApp rings it when it has sent some, and is rung when a reply has come in whole. All bells hang in
`<home>/network/bells`. Where there is no such folder, or a socket's path there would be too long, both ends
look by themselves as they would without.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from federation.network.bell import Bell, ring

GATEWAY: Final = "gateway"
LONGEST_S: Final = 1.0  # a look without a ring
_BELLS: Final = "network/bells"


def bells_folder(home: Path) -> Path:
    """Return the folder of a coordinator's bells."""
    return home / _BELLS


@contextmanager
def with_bells(grid: Grid, home: Path) -> Iterator[Grid]:
    """Yield `grid` with bells where this home has a network part, else as it is."""
    folder = bells_folder(home)
    try:
        bell = Bell(folder / f"run-{secrets.token_hex(4)}")
    except OSError:
        yield grid
        return
    with bell:
        yield RingingGrid(grid, bell, folder / GATEWAY)


class RingingGrid(Grid):
    """Another grid, which rings after sending and waits for a ring before it looks again."""

    def __init__(self, grid: Grid, bell: Bell, gateway: Path) -> None:
        self._grid, self._bell, self._gateway = grid, bell, gateway

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._bell.hush()
        ids = list(self._grid.push_messages(messages))
        ring(self._gateway)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Wait for a ring, for a second at most, and return what has come.

        A look takes in all that was rung for before it, so it is repeated for another ring alone.
        """
        wanted = list(message_ids)
        if wanted:
            self._bell.wait(LONGEST_S)
        return list(self._grid.pull_messages(wanted))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)
