"""The witness's watch, a process of `site up`: pull the newest checkpoint now and then, prove that the log
only grew, cosign.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Final

import httpx

from audit import log_lines
from audit.errors import WitnessConflictError
from clients.errors import LinkError
from clients.home import SiteHome
from clients.network.coordinator import pinned_context
from clients.network.joining import note_wrong_ca
from clients.network.membership import network_folder
from clients.service import witness_once

_logger = logging.getLogger(__name__)

EVERY_S: Final = 5.0


def watch(home: SiteHome, stop: threading.Event, *, every_s: float = EVERY_S) -> None:
    """Cosign until `stop` is set. A coordinator that is away is waited for.

    Raises:
        WitnessError: the log was rewritten, truncated or forked. Nothing is cosigned from then on.
    """
    folder = network_folder(home.path)
    membership = folder.read()
    seen = -1
    with httpx.Client(verify=pinned_context(folder.ca), timeout=30.0) as client:
        while not stop.is_set():
            try:
                size = witness_once(home, membership.url, client=client)
                if size != seen:
                    _logger.info("cosigned the log of %d entries", size)
                seen = size
            except WitnessConflictError:
                _logger.info("the agent cosigned meanwhile")
            except LinkError as error:
                _logger.warning("%s", error)
                if "certificate verify failed" in str(error).lower():
                    note_wrong_ca(home)
            stop.wait(every_s)


def main() -> None:
    log_lines.configure(log_lines.form_of(), "INFO")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    watch(SiteHome.open(Path(sys.argv[1])), stop)


if __name__ == "__main__":
    main()
