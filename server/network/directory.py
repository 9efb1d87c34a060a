"""Which node SuperLink has for which key, and keeping SuperLink to the roster.

The roster, that is the log, says who belongs; SuperLink is told. Whatever was missed while one of them was
away is put right at the next look.
"""

from __future__ import annotations

import logging
import threading
from typing import Final, Protocol

from federation.network.control import Node
from federation.network.errors import NetworkError
from federation.network.pki import node_key_pem
from federation.network.roster import Roster

_logger = logging.getLogger(__name__)

LOOK_S: Final = 0.5
FULL_LOOK_S: Final = 30.0


class Control(Protocol):
    """What the directory needs of SuperLink; see `federation.network.control`."""

    def nodes(self) -> tuple[Node, ...]: ...
    def register(self, public_key: bytes, name: str) -> int: ...
    def unregister(self, node_id: int) -> None: ...


class NodeDirectory:
    """Node ids by key. `start` keeps looking in a thread of its own."""

    def __init__(self, roster: Roster, control: Control) -> None:
        self._roster, self._control = roster, control
        self._ids: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._settled: frozenset[str] | None = None

    def node_id_of(self, node_key: str) -> int | None:
        return self._ids.get(node_key)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="node-directory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def settle(self) -> None:
        """Register what is approved and unknown, unregister what is known and not approved.

        Raises:
            NetworkError: SuperLink does not answer.
        """
        wanted = {member.node_key: member.site for member in self._roster.refresh().approved()}
        pems = {node_key_pem(key): key for key in wanted}
        ids: dict[str, int] = {}
        for node in self._control.nodes():
            key = pems.get(node.public_key)
            if key is None:
                self._control.unregister(node.node_id)
                _logger.info("SuperLink no longer knows node %d (%s)", node.node_id, node.name)
            else:
                ids[key] = node.node_id
        for pem, key in pems.items():
            if key not in ids:
                ids[key] = self._control.register(pem, wanted[key])
                _logger.info("SuperLink knows site %s as node %d", wanted[key], ids[key])
        self._ids, self._settled = ids, frozenset(wanted)

    def _run(self) -> None:
        waited = FULL_LOOK_S
        while not self._stop.is_set():
            wanted = frozenset(member.node_key for member in self._roster.refresh().approved())
            if wanted != self._settled or waited >= FULL_LOOK_S:
                try:
                    self.settle()
                    waited = 0.0
                except NetworkError as error:
                    self._settled = None
                    _logger.warning("nodes are not settled: %s", error)
            self._stop.wait(LOOK_S)
            waited += LOOK_S
