"""The processes of `affidavit site up`: the agent, the SuperNode that calls it, the witness's watch.

All connections go out. The agent is reached by a Unix socket in a folder of the site's own user.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from audit._files import write_durably
from clients.errors import ClientsError, HomeError
from clients.home import SiteHome
from clients.network.joining import needs_rotation, rotate_keys
from clients.network.membership import NetworkFolder, network_folder
from clients.network.warm_relay import STUB, write_stub
from federation.network.errors import NetworkError
from federation.network.supervisor import Part, PartEvent, Supervisor

CHECK_S: Final = 600.0
WATCH_S: Final = 10.0
SUPERNODE_WAITS_S: Final = (1.0, 10.0)  # after a kill, SuperLink refuses a node for up to a minute


def site_parts(home: SiteHome, base: Path) -> list[Part]:
    """Return the agent, the SuperNode and the watch of a site that was approved.

    Raises:
        NotJoinedError: it belongs nowhere.
    """
    folder = network_folder(home.path)
    membership = folder.read()
    folder.sockets.mkdir(parents=True, exist_ok=True, mode=0o700)
    policy = home.path / "policy.txt"
    return [
        Part(
            name="agent",
            command=_agent_command(home, base, folder),
            ready=(folder.sockets / f"{home.name}.sock").exists,
            begin=policy.is_file,
        ),
        Part(
            name="relay",
            command=[
                *(sys.executable, "-P", "-m", "clients.network.warm_relay", str(folder.relay)),
                *("--agent", f"unix:{folder.sockets.absolute()}", "--site", home.name),
                *("--scratch", str(folder.folder / "scratch")),
            ],
            environment=relay_environment(folder, home.name),
            ready=folder.relay.exists,
        ),
        Part(
            name="supernode",
            command=[
                *(sys.executable, "-P", "-m", "clients.network.supernode"),
                *("--superlink", membership.address, "--root-certificates", str(folder.ca)),
                *("--auth-supernode-private-key", str(folder.node_key)),
                *("--host", "127.0.0.1", "--port", str(_free_port())),
                *("--node-config", f'site="{home.name}" agent="unix:{folder.sockets.absolute()}"'),
            ],
            environment=relay_environment(folder, home.name),
            backoff_s=SUPERNODE_WAITS_S,
        ),
        Part(
            name="watch",
            command=[sys.executable, "-P", "-m", "clients.network.watching", str(home.path)],
            begin=policy.is_file,
        ),
    ]


def _agent_command(home: SiteHome, base: Path, folder: NetworkFolder) -> list[str]:
    affidavit = [sys.executable, "-P", "-m", "affidavit"]
    return [*affidavit, "site", "agent", home.name, "--run", str(folder.sockets), "--home", str(base)]


def relay_environment(folder: NetworkFolder, site: str) -> dict[str, str]:
    """Return what the SuperNode's process sees; nothing of it is secret.

    Where this installation confines bundles (`clients.launcher`), a cold start does so too.
    """
    flower, own = folder.folder / "flower", Path(sys.executable).parent
    flower.mkdir(parents=True, exist_ok=True, mode=0o700)
    cold = own / STUB
    if importlib.util.find_spec("clients.launcher") is not None:
        launcher = importlib.import_module("clients.launcher")
        agent = f"unix:{folder.sockets.absolute()}"
        cold = launcher.install_stub(
            folder.folder / "bin" / "cold", agent=agent, site=site, scratch=folder.folder / "scratch"
        )
    stub = write_stub(folder.folder / "bin", folder.relay, cold)
    return {
        "PATH": os.pathsep.join((str(stub.parent.absolute()), str(own), os.environ.get("PATH", ""))),
        "FLWR_HOME": str(flower.absolute()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
    }


def carry_out(
    home: SiteHome, base: Path, on_event: Callable[[PartEvent], None], on_warning: Callable[[str], None]
) -> None:
    """Keep the site up until a signal comes; exchange the node key before it ends.

    Raises:
        HomeError: the site is up already.
        NotJoinedError: it belongs nowhere.
    """
    folder = network_folder(home.path)
    folder.read()
    _claim(folder)
    due, seen = time.monotonic(), _stamp(home)

    def tick() -> None:
        nonlocal due, seen
        if _stamp(home) != seen:
            seen = _stamp(home)
            for name in ("agent", "watch"):
                supervisor.restart(name)
        if time.monotonic() < due:
            return
        due = time.monotonic() + CHECK_S
        if needs_rotation(folder):
            try:
                rotate_keys(home)
                supervisor.restart("supernode")
                on_warning("the node key was exchanged for a new one")
            except (ClientsError, NetworkError) as error:
                on_warning(f"the node key ends {folder.read().node_expires} and was not exchanged: {error}")

    supervisor = Supervisor(site_parts(home, base), folder.logs, on_event=on_event, tick=tick)
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


def _stamp(home: SiteHome) -> int:
    try:
        return (home.path / "policy.txt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
