"""The processes of `affidavit coordinator up`, and how to see that each serves."""

from __future__ import annotations

import json
import os
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from federation.network.settings import NetworkHome
from federation.network.supervisor import Part, PartEvent, Supervisor

RENEW_EVERY_S: Final = 3600.0
QUIET: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def coordinator_parts(base: Path) -> list[Part]:
    """Return SuperLink, the SuperExec that runs ServerApps, the API and the gateway, which comes last.

    Args:
        base: the folder that holds the coordinator's and the signer's homes.

    Raises:
        NetworkError: `coordinator init` was not run, or a setting is wrong.
    """
    network = NetworkHome.open(base / "coordinator")
    settings, tls = network.settings(), network.pki.folder
    network.flower_home.mkdir(exist_ok=True, mode=0o700)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    flower = {
        **QUIET,
        "PATH": path,
        "FLWR_HOME": str(network.flower_home.absolute()),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": f"{settings.superexec_poll_s:g}",
    }
    secret = str(network.superexec_secret)
    superlink = [
        _beside("flower-superlink"),
        *("--host", "127.0.0.1", "--port", str(settings.superlink_port)),
        *("--ssl-certfile", str(tls / "inner.pem"), "--ssl-keyfile", str(tls / "inner.key")),
        *("--ssl-ca-certfile", str(network.pki.inner_ca)),
        *("--enable-supernode-auth", "--isolation", "process", "--superexec-auth-secret-file", secret),
        *("--disable-runtime-dependency-installation", "--database", str(network.superlink_database)),
    ]
    superexec = [
        _beside("flower-superexec"),
        *("--runtime-api-address", settings.superlink, "--root-certificates", str(network.pki.inner_ca)),
        *("--superexec-auth-secret-file", secret),
    ]
    affidavit = [sys.executable, "-P", "-m", "affidavit"]
    home = ("--home", str(base))
    return [
        Part(
            name="superlink",
            command=superlink,
            environment=flower,
            ready=tls_answers("127.0.0.1", settings.superlink_port, network.pki.inner_ca),
            after=(),
        ),
        Part(name="superexec", command=superexec, environment=flower, after=("superlink",)),
        Part(
            name="api",
            command=[*affidavit, "serve", "--host", "127.0.0.1", "--port", str(settings.api_port), *home],
            ready=http_answers(f"http://127.0.0.1:{settings.api_port}/healthz"),
            after=(),
        ),
        Part(
            name="gateway",
            command=[
                *(sys.executable, "-P", "-m", "server.network.serving"),
                str(base / "coordinator"),
            ],
            ready=tls_answers(_reach(settings.bind), settings.port, network.pki.ca, check_name=False),
        ),
    ]


def carry_out(base: Path, on_event: Callable[[PartEvent], None], on_warning: Callable[[str], None]) -> None:
    """Keep the coordinator up until a signal comes; renew certificates before they end."""
    network = NetworkHome.open(base / "coordinator")
    lifetime = timedelta(seconds=network.settings().certificate_s)
    every_s = min(RENEW_EVERY_S, lifetime.total_seconds() / 10)
    warn_of_expiry(network, on_warning)
    network.pki.renew(server=lifetime)
    due, warned = time.monotonic() + every_s, time.monotonic()

    def tick() -> None:
        nonlocal due, warned
        now = time.monotonic()
        if now < due:
            return
        due = now + every_s
        if "inner" in network.pki.renew(server=lifetime):
            supervisor.restart("superlink")  # the gateway takes its own new certificate while it serves
        if now - warned >= RENEW_EVERY_S:
            warned = now
            warn_of_expiry(network, on_warning)

    supervisor = Supervisor(coordinator_parts(base), network.logs, on_event=on_event, tick=tick)
    supervisor.install_signals()
    supervisor.run()


def warn_of_expiry(network: NetworkHome, on_warning: Callable[[str], None]) -> None:
    """Say which certificates end soon and are not renewed here."""
    for state in network.pki.states():
        if state.urgency:
            on_warning(
                f"{state.urgency}: {state.path} ends in {state.days_left} days; see docs/network.md, "
                "section Certificates"
            )


def tls_answers(host: str, port: int, ca: Path, *, check_name: bool = True) -> Callable[[], bool]:
    """Return a test whether somebody with a certificate of `ca` listens."""

    def answers() -> bool:
        try:
            context = ssl.create_default_context(cafile=str(ca))
            context.check_hostname = check_name
            with (
                socket.create_connection((host, port), timeout=2) as plain,
                context.wrap_socket(plain, server_hostname=host),
            ):
                return True
        except OSError:
            return False

    return answers


def http_answers(url: str) -> Callable[[], bool]:
    """Return a test whether the API says that it is well."""

    def answers() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2) as reply:  # noqa: S310 - a loopback URL of our own
                return bool(json.loads(reply.read())["status"] == "ok")
        except (OSError, urllib.error.URLError, ValueError, KeyError):
            return False

    return answers


def certificate_rows(base: Path) -> list[dict[str, Any]]:
    """Return what `status` and `doctor` show of the certificates; empty without a network part."""
    folder = base / "coordinator"
    if not (folder / "network" / "network.yaml").is_file():
        return []
    return [
        {
            "name": state.name,
            "days_left": state.days_left,
            "ends": state.not_after.astimezone(UTC).date().isoformat(),
            "urgency": state.urgency,
        }
        for state in NetworkHome.open(folder).pki.states(now=datetime.now(UTC))
    ]


def _reach(bind: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)  # noqa: S104 - compared, not bound


def _beside(name: str) -> str:
    return str(Path(sys.executable).with_name(name))
