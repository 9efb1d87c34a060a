"""Start Flower's SuperNode, less asleep: `python -P -m clients.network.supernode …`, with SuperNode's own
options.

SuperNode sleeps three seconds when it found no message, and looks for a reply twice a second; both are
constants of its module. A round is two messages, so most of a small round would be sleep. Here it asks again
at once where the gateway held its question until there was something to say; else after
AFFIDAVIT_SUPERNODE_POLL_S (0.25) for half a minute after a message, and every second otherwise. It rings the
relay's bell (AFFIDAVIT_RELAY_BELL) when it has taken a message in. Nothing else is changed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from federation.network.bell import ring, with_sleep

DEFAULT_POLL_S: Final = 0.25
IDLE_POLL_S: Final = 1.0
ACTIVE_S: Final = 30.0
HELD_S: Final = 0.5  # an answer that took longer was held: asking again costs nobody anything
REPLY_POLL_S: Final = 0.03  # a look into this process's own memory

_IDLE_SLEEP_S: Final = 1.0  # what sleeps longer than this waits for a message, the rest for a reply


class Pace:
    """How long SuperNode waits, by when the last message came."""

    def __init__(
        self,
        poll_s: float,
        *,
        sleep: Callable[[float], object] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._poll_s, self._sleep, self._monotonic = poll_s, sleep, monotonic
        self._last: float | None = None
        self._was_held = False

    def asked(self, took_s: float, *, got: bool) -> None:
        """One question for messages was answered after `took_s`; `got` says whether there was one."""
        self._was_held = took_s >= HELD_S
        if got:
            self._last = self._monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleep in place of SuperNode's own `sleep(seconds)`, never longer."""
        if seconds <= _IDLE_SLEEP_S:
            self._sleep(min(seconds, REPLY_POLL_S))
            return
        active = self._last is not None and self._monotonic() - self._last < ACTIVE_S
        wait_s = self._poll_s if active else max(self._poll_s, IDLE_POLL_S)
        self._sleep(min(seconds, REPLY_POLL_S if self._was_held else wait_s))


def quicken(module: Any, pace: Pace, taken: Callable[[], None]) -> None:
    """Give SuperNode's module the pace; `taken` is called for each message that it took in.

    Raises:
        AttributeError: the module has another form by now; then this file has to follow Flower.
    """
    original = module._pull_and_store_message

    def pull(*args: Any, **kwargs: Any) -> Any:
        begun = time.monotonic()
        run_id = original(*args, **kwargs)
        pace.asked(time.monotonic() - begun, got=run_id is not None)
        if run_id is not None:
            taken()
        return run_id

    module._pull_and_store_message = pull
    module.time = with_sleep(module.time, pace.sleep)


def main() -> None:
    import flwr.supernode.start_client_internal as internal
    from flwr.supernode.cli import flower_supernode

    poll_s = float(os.environ.get("AFFIDAVIT_SUPERNODE_POLL_S", DEFAULT_POLL_S))
    bell = os.environ.get("AFFIDAVIT_RELAY_BELL", "")
    quicken(internal, Pace(max(poll_s, 0.05)), lambda: ring(Path(bell)) if bell else None)
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
