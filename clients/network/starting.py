"""The processes of `affidavit site up`: the agent, the SuperNode, the relay between, the witness's watch.

All connections go out. The agent is reached by a Unix socket in a folder of the site's own user.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from audit._files import write_durably
from clients.agent_place import PLACE, RUN
from clients.errors import ClientsError, HomeError
from clients.home import SiteHome
from clients.identity import STATEMENT_KEY
from clients.network.joining import needs_rotation, rotate_keys
from clients.network.membership import NetworkFolder, network_folder
from federation.network.errors import NetworkError
from federation.network.supervisor import Part, PartEvent, Supervisor

CHECK_S: Final = 600.0
WATCH_S: Final = 10.0
SUPERNODE_WAITS_S: Final = (1.0, 10.0)  # after a kill, SuperLink refuses a node for up to a minute


class Watched:
    """Files that parts read when they start: another content means a restart of those parts."""

    def __init__(self, *paths: Path) -> None:
        """The first of `paths` has to be there for a part to start at all."""
        self._paths = paths
        self._started: dict[str, tuple[int, ...]] = {}

    def begin(self, name: str) -> Callable[[], bool]:
        """Return whether `name` can start; asked just before it does."""

        def may_begin() -> bool:
            self._started[name] = self._stamps()
            return self._started[name][0] > 0

        return may_begin

    def outdated(self) -> tuple[str, ...]:
        """Return the parts that started under other files than there are now."""
        now = self._stamps()
        return tuple(name for name, then in self._started.items() if then[0] > 0 and then != now)

    def _stamps(self) -> tuple[int, ...]:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def agent_of(home: SiteHome) -> int | None:
    """Return the process of the site's agent, None where none answers."""
    try:
        place = json.loads((home.path / RUN / PLACE).read_bytes())
        os.kill(place["pid"], 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return int(place["pid"])


def site_parts(home: SiteHome, base: Path, trust: Watched, node: Watched) -> list[Part]:
    """Return the agent, the SuperNode, its relay and the watch of a site that was approved.

    Raises:
        NotJoinedError: it belongs nowhere.
    """
    folder = network_folder(home.path)
    membership = folder.read()
    folder.sockets.mkdir(parents=True, exist_ok=True, mode=0o700)
    port = _free_port()
    return [
        Part(
            name="agent",
            command=_agent_command(home, base, folder),
            ready=(folder.sockets / f"{home.name}.sock").exists,
            begin=trust.begin("agent"),
            after=(),
        ),
        Part(
            name="supernode",
            command=supernode_command(folder, membership.address, home.name, port),
            environment=flower_environment(folder),
            begin=node.begin("supernode"),
            backoff_s=SUPERNODE_WAITS_S,
            after=(),
        ),
        Part(
            name="relay",
            command=relay_command(folder, home.name, port),
            environment=flower_environment(folder),
            ready=folder.bell.exists,
            after=(),
        ),
        Part(
            name="watch",
            command=[sys.executable, "-P", "-m", "clients.network.watching", str(home.path)],
            begin=trust.begin("watch"),
            after=(),
        ),
    ]


def _agent_command(home: SiteHome, base: Path, folder: NetworkFolder) -> list[str]:
    affidavit = [sys.executable, "-P", "-m", "affidavit"]
    return [*affidavit, "site", "agent", home.name, "--run", str(folder.sockets), "--home", str(base)]


def supernode_command(folder: NetworkFolder, address: str, site: str, port: int) -> list[str]:
    """Return Flower's SuperNode, which gives its tasks to the relay alone."""
    return [
        *(sys.executable, "-P", "-m", "clients.network.supernode"),
        *("--superlink", address, "--root-certificates", str(folder.ca)),
        *("--auth-supernode-private-key", str(folder.node_key)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(_task_secret(folder))),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--node-config", f'site="{site}" agent="unix:{folder.sockets.absolute()}"'),
    ]


def relay_command(folder: NetworkFolder, site: str, port: int) -> list[str]:
    """Return the relay that takes the tasks of the SuperNode on `port`."""
    return [
        *(sys.executable, "-P", "-m", "clients.network.warm_relay", str(folder.bell)),
        *("--agent", f"unix:{folder.sockets.absolute()}", "--site", site),
        *("--scratch", str(folder.folder / "scratch")),
        *("--runtime-api-address", f"127.0.0.1:{port}", "--secret-file", str(_task_secret(folder))),
    ]


def flower_environment(folder: NetworkFolder) -> dict[str, str]:
    """Return what the SuperNode's process and the relay's see; nothing of it is secret."""
    flower = folder.folder / "flower"
    flower.mkdir(parents=True, exist_ok=True, mode=0o700)
    return {
        "FLWR_HOME": str(flower.absolute()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "AFFIDAVIT_RELAY_BELL": str(folder.bell.absolute()),
    }


def _task_secret(folder: NetworkFolder) -> Path:
    """The secret that the relay shows to the SuperNode, made once."""
    if not folder.task_secret.exists():
        write_durably(folder.task_secret, secrets.token_hex(32).encode())
    return folder.task_secret


def carry_out(
    home: SiteHome, base: Path, on_event: Callable[[PartEvent], None], on_warning: Callable[[str], None]
) -> None:
    """Keep the site up until a signal comes; exchange the node key before it ends.

    Raises:
        HomeError: the site is up already.
        NotJoinedError: it belongs nowhere.
    """
    folder = network_folder(home.path)
    every_s = min(CHECK_S, folder.read().node_lifetime_s / 20)
    _claim(folder)
    due, node = time.monotonic(), Watched(folder.node_key, folder.ca)
    trust = Watched(home.path / "policy.txt", home.path / "keys" / STATEMENT_KEY)

    def tick() -> None:
        nonlocal due
        for name in (*trust.outdated(), *node.outdated()):
            supervisor.restart(name)
        if time.monotonic() < due:
            return
        due = time.monotonic() + every_s
        if needs_rotation(folder):
            try:
                rotate_keys(home)
                on_warning("the node key was exchanged for a new one")
            except (ClientsError, NetworkError) as error:
                on_warning(f"the node key ends {folder.read().node_expires} and was not exchanged: {error}")

    supervisor = Supervisor(site_parts(home, base, trust, node), folder.logs, on_event=on_event, tick=tick)
    supervisor.install_signals()
    try:
        supervisor.run()
    finally:
        folder.pid_file.unlink(missing_ok=True)


def stop(home: SiteHome, *, timeout_s: float = 20.0) -> bool:
    """Stop a site that is up; False when it is not."""
    path = network_folder(home.path).pid_file
    pid = running_pid(path)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while running_pid(path) is not None:
        if time.monotonic() > deadline:
            raise HomeError(path, f"process {pid} does not stop", "look at its logs")
        time.sleep(0.05)
    return True


def running_pid(path: Path) -> int | None:
    """Return the process that a pid file names, when it still runs."""
    try:
        pid = int(path.read_text())
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    return pid


def _claim(folder: NetworkFolder) -> None:
    pid = running_pid(folder.pid_file)
    if pid is not None and pid != os.getpid():
        raise HomeError(
            folder.pid_file, f"the site is up already, as process {pid}", "`affidavit site down` first"
        )
    write_durably(folder.pid_file, str(os.getpid()).encode())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
