"""The agent as a process of its own behind its Unix socket: `python -P -m clients.network.agent_process HOME
SOCKETS`.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from pathlib import Path


def main() -> int:
    from clients.agent import Agent
    from clients.socket_link import served_agents

    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    home, sockets = Path(sys.argv[1]), Path(sys.argv[2])
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    agent = Agent.open(home)
    try:
        (sockets / f"{agent.name}.sock").unlink(
            missing_ok=True
        )  # a killed agent's; the ledger's lock is ours
        with served_agents(sockets, {agent.name: agent}):
            stop.wait()
    finally:
        agent.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
