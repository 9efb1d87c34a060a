"""The agent as a process of its own: one a site, warm, behind its Unix socket, ended by a signal.

`serve(home)` opens the agent (torch is loaded once), listens, writes `run/agent.json` into the home so that
the site's people find it, and returns when `stop` is set. The exclusive lock on the ledger makes it the only
one of its home. It drops no privileges: start it as the user who owns the home (docs/site-agent.md).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from audit._files import write_durably
from audit.errors import AuditError
from clients.agent import Agent
from clients.agent_place import PLACE, RUN
from clients.agent_server import AgentServer, Limits
from clients.confinement import keep_secrets
from clients.home import SiteHome
from clients.proposals import Proposals

_logger = logging.getLogger(__name__)

SETTLE_S: Final = 1.0

Ready = Callable[[dict[str, Any]], None]


def serve(
    home: SiteHome,
    *,
    folder: Path | None = None,
    stop: threading.Event,
    ready: Ready | None = None,
    limits: Limits | None = None,
) -> None:
    """Answer for a site until `stop` is set.

    Args:
        folder: where the socket goes; the home's `run/` when None, which the site's own user alone reaches.
        ready: told once the socket listens.

    Raises:
        ClientsError: the home is incomplete or held by another agent, or the socket cannot be made.
    """
    keep_secrets()
    own = home.path / RUN
    own.mkdir(mode=0o700, exist_ok=True)
    place = folder or own
    if folder is not None:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    agent = Agent.open(home)
    try:
        began = datetime.now(UTC)
        server = AgentServer(
            agent,
            place.absolute() / f"{agent.name}.sock",
            uids=frozenset(agent.home.config.relay_uids),
            limits=limits,
            refused=lambda kind, code: _note(agent, kind, code),
            status=lambda: status_of(agent, server, began),
        )
        server.start()
        try:
            found = {"pid": os.getpid(), "socket": str(server.path)}
            write_durably(own / PLACE, json.dumps(found).encode())
            if ready is not None:
                ready(status_of(agent, server, began))
            while not stop.wait(SETTLE_S):
                try:
                    agent.settle()
                except AuditError:
                    _logger.exception("site %s cannot sign its own log", agent.name)
        finally:
            server.close()
            (own / PLACE).unlink(missing_ok=True)
    finally:
        agent.close()


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """Set `stop` on SIGTERM and SIGINT for the time of the block; call it in the main thread."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda *_: stop.set())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def status_of(agent: Agent, server: AgentServer, began: datetime) -> dict[str, Any]:
    """Return what a running agent says of itself."""
    return {
        "site": agent.name,
        "pid": os.getpid(),
        "since": began.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "socket": str(server.path),
        "answered": server.counts["answered"],
        "turned_away": server.counts["turned_away"],
        "refused": agent.refusals.total,
        "log_entries": agent.log.tree_size,
        "log_key": agent.log.log_key,
        "waiting": list(Proposals(agent.home.path).ids()),
    }


def _note(agent: Agent, kind: str, code: str) -> None:
    try:
        agent.refusals.refused(kind, code)
    except AuditError:
        _logger.exception("site %s cannot write its own log", agent.name)
