"""Whether this process should get requests: started, the log readable, writable and signed, live models
loaded, not draining.

`/healthz` says that the process lives, and asks nobody else; `/readyz` (and the protocol's
`/v2/health/ready`) that it should be sent requests. When it is told to stop it turns unready first, waits
for balancers to notice (`drain_s`), and then finishes what it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from audit.errors import AuditError
from server.errors import ArtefactError
from server.live import LiveModels
from server.warm import WarmModels

State = Literal["starting", "ready", "draining"]
STARTING: Final = "the server is starting"
DRAINING: Final = "the server is draining: it finishes what it has, and takes nothing new"


class Readiness:
    """One process's word on itself."""

    def __init__(
        self,
        live: LiveModels,
        warm: WarmModels,
        backlog: Callable[[], str],
        recording: Callable[[], str],
    ) -> None:
        """Prepare; `backlog` says why the log's checkpoints keep receipts' promises no more, or nothing, and
        `recording` why no entry becomes durable.
        """
        self._live, self._warm, self._backlog, self._recording = live, warm, backlog, recording
        self.state: State = "starting"

    def problem(self) -> str:
        """Return why this process should get no requests, or an empty text."""
        if self.state != "ready":
            return STARTING if self.state == "starting" else DRAINING
        try:
            self._live.refresh()
            for model in self._live.models():
                served = self._live.choose(model)
                if served.is_answering:
                    self._warm.get(served)
            return self._backlog() or self._recording()
        except (AuditError, ArtefactError) as error:
            return f"{error}"
