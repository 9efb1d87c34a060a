"""Where a running agent of a home is to be found, without loading one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from clients.errors import HomeError, LinkError
from clients.home import SiteHome
from clients.socket_link import SocketLink

RUN: Final = "run"
PLACE: Final = "agent.json"
STATUS: Final = "agent.status"


def running(home: SiteHome) -> dict[str, Any] | None:
    """Ask the running agent of a home how it is; None when none runs.

    Raises:
        HomeError: what it wrote about itself cannot be read.
    """
    path = home.path / RUN / PLACE
    try:
        place = json.loads(path.read_bytes())
        socket = Path(place["socket"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HomeError(path, f"cannot be read: {error}", "remove it, or restart the agent") from error
    try:
        answer, _ = SocketLink(str(socket.parent), socket.stem).handle(STATUS, b"", {})
    except LinkError:
        return None
    found: dict[str, Any] = json.loads(answer)
    return None if "error" in found else found
