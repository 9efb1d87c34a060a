"""The agents that live in this process, by the name of their site; what the demo and the notebook use.

The relay finds an agent here through `clients.link.connect`, with the same calls and bytes as over a
socket.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from clients.errors import LinkError
from clients.link import AgentLink

_lock = threading.Lock()
_agents: dict[str, AgentLink] = {}


def agent_of(site: str) -> AgentLink:
    """Return the live agent of `site`.

    Raises:
        LinkError: no agent of that name lives in this process.
    """
    with _lock:
        agent = _agents.get(site)
    if agent is None:
        raise LinkError(
            f"no agent of site {site!r} lives in this process; serve it inside `live_agents(...)`"
        )
    return agent


@contextmanager
def live_agents(agents: Mapping[str, AgentLink]) -> Iterator[None]:
    """Make `agents` (by site name) reachable for the time of the block.

    Raises:
        LinkError: an agent of one of these names lives in this process already.
    """
    with _lock:
        taken = sorted(set(agents) & set(_agents))
        if taken:
            raise LinkError(f"agents of {taken} live in this process already; close that run first")
        _agents.update(agents)
    try:
        yield
    finally:
        with _lock:
            for site in agents:
                _agents.pop(site, None)
