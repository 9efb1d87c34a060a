"""How a relay reaches the agent of its site: an interface, and the ways to get one.

The target is the site's own choice (its SuperNode's `--node-config`), never the coordinator's:

    inprocess:<module>:<callable>   call `<callable>(site)` in this process; resolved at run time
    unix:<folder>                   the socket `<folder>/<site>.sock`, see `clients.socket_link`

The relay imports this module and no agent: the named module is found by `importlib` when a message arrives.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Final, Protocol

from clients.errors import LinkError

DEFAULT_TARGET: Final = "inprocess:clients.inprocess:agent_of"
MAX_HEADER_BYTES: Final = 4 << 20
MAX_BLOB_BYTES: Final = 1 << 30


class AgentLink(Protocol):
    """One request to the agent, one answer; never raises: an error is a code in the answer's header."""

    def handle(
        self, kind: str, header: bytes, blobs: Mapping[str, bytes]
    ) -> tuple[bytes, dict[str, bytes]]: ...


def connect(target: str, site: str) -> AgentLink:
    """Return the link to the agent of `site` that `target` names.

    Raises:
        LinkError: the target has another form, or nobody answers there.
    """
    scheme, _, rest = target.partition(":")
    if scheme == "inprocess":
        module_name, _, attribute = rest.partition(":")
        if not module_name or not attribute:
            raise LinkError(f"agent link {target!r}: write inprocess:<module>:<callable>")
        try:
            find = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise LinkError(f"agent link {target!r}: {error}") from error
        link: AgentLink = find(site)
        return link
    if scheme == "unix":
        socket_link = importlib.import_module("clients.socket_link")
        socket: AgentLink = socket_link.SocketLink(rest, site)
        return socket
    raise LinkError(f"agent link {target!r}: the forms are inprocess:<module>:<callable> and unix:<folder>")
