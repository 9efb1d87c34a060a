"""Start Flower's SuperNode with a shorter wait between its looks for work: `python -P -m
clients.network.supernode …`, with SuperNode's own options.

SuperNode sleeps three seconds when idle, a constant in its module. A round is two messages, so half of a
small round would be sleep. AFFIDAVIT_SUPERNODE_POLL_S sets the wait; nothing else is changed.
"""

from __future__ import annotations

import os
import sys
import time
import types
from typing import Any, Final

DEFAULT_POLL_S: Final = 0.5


def quicken(module: Any, poll_s: float) -> None:
    """Give `module` a `time` whose sleep lasts at most `poll_s`; everybody else's stays.

    Raises:
        AttributeError: the module no longer has a `time`; then this file has to follow Flower.
    """
    original = module.time
    shorter = types.SimpleNamespace(**{name: getattr(original, name) for name in dir(time)})
    shorter.sleep = lambda seconds: time.sleep(min(seconds, poll_s))
    module.time = shorter


def main() -> None:
    import flwr.supernode.start_client_internal as internal
    from flwr.supernode.cli import flower_supernode

    poll_s = float(os.environ.get("AFFIDAVIT_SUPERNODE_POLL_S", DEFAULT_POLL_S))
    quicken(internal, max(poll_s, 0.05))
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
