"""A federation of real processes that a test may kill: a coordinator that is kept up, and sites that are.

Everything is as in production: `affidavit coordinator up` and `affidavit site up` supervise SuperLink,
SuperExec, API and gateway, agents, relays and SuperNodes. The test finds them below their supervisors and
sends SIGKILL; nothing in the product knows of it.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from audit.entries import RunCompleted, RunFailed
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.location import log_location
from audit.principal import LocalOwner, Principal
from clients.home import SiteHome
from clients.network.joining import follow_members, join
from clients.reviewing import approve_bundle
from clients.service import approve_charter
from federation.charter import Charter
from federation.coordinator import Coordinator
from federation.network.bundle import build_bundle, bundle_digest
from federation.network.control import SuperLinkControl
from federation.network.errors import NetworkError
from federation.network.membership import InviteRequest, Membership
from federation.network.pki import LOOPBACK, Pki
from federation.network.settings import NetworkHome, NetworkSettings
from federation.network.submit import end_of, submit
from federation.resume import prepared_run
from federation.run_hold import is_held
from federation.service import TrainRequest, run_config, start_run
from tests.ports import free_ports

START_S: Final = 180.0
SCIENTIST: Final = Principal(id="scientist", role="scientist")
CHARTER: Final = """\
affidavit: 1
name: kills
task: binary
features:
  - {name: radius, type: number, unit: mm, lower: 0, upper: 10}
  - {name: texture, type: number, unit: "1", lower: 0, upper: 10}
label: {name: diagnosis, classes: [benign, malignant]}
model: {family: logistic_regression}
plan: {learning_rate: 1, rounds: 3, round_timeout_s: 100, minimum_sites: 2}
privacy:
  unit: row
  relation: add_remove
  epsilon: 5
  delta: 1e-5
  max_grad_norm: 1
  noise_multiplier: 3
sites:
SITES
purposes: [research]
officers:
  - {name: officer, key: "OFFICER"}
"""


def kills_charter(identities: dict[str, str], officer: str, text: str = CHARTER) -> str:
    return text.replace("OFFICER", officer).replace(
        "SITES",
        "\n".join(
            f'  - {{name: {name}, identity: "{key}", nominal_rows: 100}}'
            for name, key in sorted(identities.items())
        ),
    )


WIDE_CHARTER: Final = """\
affidavit: 1
name: pieces
task: binary
features:
  - {name: radius, type: number, unit: mm, lower: 0, upper: 10}
  - {name: texture, type: number, unit: "1", lower: 0, upper: 10}
label: {name: diagnosis, classes: [benign, malignant]}
model: {family: layers, layers: [{layer: linear, in: 2, out: WIDTH, bias: true}, {layer: tanh},
  {layer: linear, in: WIDTH, out: WIDTH, bias: true}, {layer: tanh},
  {layer: linear, in: WIDTH, out: 1, bias: true}]}
plan: {learning_rate: 1, rounds: 2, average_last: 1, round_timeout_s: 900, minimum_sites: 2}
privacy: {unit: row, relation: add_remove, epsilon: 100, delta: 1e-5, max_grad_norm: 1, noise_multiplier: 8,
  grid_bits: 20, precision: float64}
sites:
SITES
purposes: [research]
officers:
  - {name: officer, key: "OFFICER"}
"""


def wide_charter(width: int) -> Callable[[dict[str, str], str], str]:
    """Return what makes the charter of a network of two hidden layers of `width`."""
    text = WIDE_CHARTER.replace("WIDTH", str(width))
    return lambda identities, officer: kills_charter(identities, officer, text)


class Fleet:
    """Use as a context: everything is up inside, and gone afterwards."""

    def __init__(
        self,
        base: Path,
        sites: tuple[str, ...],
        rows: Callable[[str], list[tuple[Any, ...]]],
        *,
        columns: tuple[str, ...] = ("radius", "texture", "diagnosis"),
        charter: Callable[[dict[str, str], str], str] = kills_charter,
        more: str = "",
    ) -> None:
        """`rows(site)`: cells in the order of `columns`; `charter`: its text for these identities by site and
        the officer's key; `more`: lines that the charter has besides."""
        self._columns, self._charter, self._more = columns, charter, more
        self.base, self.home, self.sites = base, base / "coordinator", sites
        self.author, self.officer = SigningKey.generate(), SigningKey.generate()
        self._rows, self._processes = rows, list[subprocess.Popen[bytes]]()
        self.charter: Charter
        self.homes: dict[str, SiteHome] = {}
        self.core_limits: set[tuple[str, str]] = set()  # of what was killed
        self.scanned_bytes = 0

    def __enter__(self) -> Fleet:
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._down()

    # the parties

    def _up(self) -> None:
        public, inner, api = free_ports(3)
        settings = NetworkSettings(
            public_host="localhost", bind="127.0.0.1", port=public, superlink_port=inner, api_port=api
        )
        with Coordinator.create(self.home, self.base / "signer", "log.example.org/kills") as coordinator:
            log_key = coordinator.log_key
        network = NetworkHome.create(self.home, settings)
        pki = Pki.create(network.pki.folder, LOOPBACK, name="kills")
        self.control = SuperLinkControl(settings.superlink, pki.inner_ca)
        self.ledger = Ledger.open(log_location(self.home))
        self.coordinator = Coordinator.open(self.home)
        self._affidavit("coordinator", "up")
        self.until(lambda: _is_ready(self.base / "coordinator.log", "gateway"))
        membership = Membership(self.ledger, network.folder)
        for name in self.sites:
            invitation = membership.invite(
                InviteRequest(label=name, auto_approve=True),
                address=settings.address,
                ca=pki.ca_fingerprint(),
                log_key=log_key,
            )
            self.homes[name] = self._site(name)
            assert join(self.homes[name], invitation).state == "approved"
        identities = {name: home.keys().identity.text for name, home in self.homes.items()}
        self.charter = Charter.parse(self._charter(identities, self.officer.text) + self._more)
        for name, home in self.homes.items():
            home = approve_charter(home, self.charter.canonical().decode())
            follow_members(home, self.charter)
            self.homes[name] = approve_bundle(SiteHome.open(home.path), bundle_digest(build_bundle()))
        for name in self.sites:
            self._affidavit("site", "up", name)
        for name in self.sites:
            self.until(lambda name=name: _is_ready(self.base / f"{name}.log", "agent"))
        self.until(lambda: self.online() == len(self.sites))

    def _site(self, name: str) -> SiteHome:
        data = self.base / f"{name}.csv"
        with data.open("w", newline="") as file:
            csv.writer(file).writerows([self._columns, *self._rows(name)])
        return SiteHome.create(
            self.base / "sites" / name,
            name=name,
            data=data,
            population=name,
            lifetime_epsilon="1000",
            lifetime_delta="0.00001",
            auto_approve=True,
        )

    def _affidavit(self, *arguments: str) -> None:
        log = (self.base / f"{arguments[2] if len(arguments) > 2 else arguments[0]}.log").open("wb")
        command = [sys.executable, "-P", "-m", "affidavit", *arguments, "--json", "--home", str(self.base)]
        with log:
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))

    def _down(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self._processes):
            try:
                process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for name in ("coordinator", "ledger"):
            if hasattr(self, name):
                getattr(self, name).close()

    # what runs

    def start(self) -> str:
        """Prepare a run and hand it to SuperLink; return its id."""
        run = start_run(
            self.coordinator, SCIENTIST, LocalOwner(), TrainRequest(charter=self.charter), self.author
        )
        self.submit(run)
        return run

    def submit(self, run: str) -> None:
        """Hand a run to SuperLink, the first time or again; SuperLink may be dead just now."""
        prepared_run(self.coordinator, run)

        def taken() -> bool:
            try:
                submit(self.coordinator, run_config(self.coordinator, run, SCIENTIST))
            except NetworkError:
                time.sleep(1)
                return False
            return True

        self.until(taken)

    def end(self, run: str) -> RunCompleted | RunFailed | None:
        return end_of(self.ledger, run)

    def is_carried_out(self, run: str) -> bool:
        return is_held(self.ledger, run)

    def online(self) -> int:
        try:
            return sum(node.status == "online" for node in self.control.nodes())
        except NetworkError:
            return 0

    # killing

    def pids(self, kind: str, site: str = "") -> list[int]:
        """Return the processes of a kind that are alive below the supervisors."""
        word = {
            "serverapp": "flwr-serverapp",
            "superlink": "flower-superlink",
            "api": "affidavit serve",
            "supernode": "clients.network.supernode",
            "agent": f"affidavit site agent {site}",
        }[kind]
        mine = {process.pid for process in self._processes}
        return [
            pid
            for pid, command in _descendants(mine)
            if word in command and (not site or f"/sites/{site}/" in command or kind == "agent")
        ]

    def kill(self, kind: str, site: str = "", wait_s: float = 20.0) -> bool:
        """Kill -9 one process of a kind; False where none came up in time."""
        deadline = time.monotonic() + wait_s
        while not (found := self.pids(kind, site)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        with contextlib.suppress(OSError):
            limits = Path(f"/proc/{found[0]}/limits").read_text()
            self.core_limits.add((kind, limits.partition("Max core file size")[2].split()[0]))
        with contextlib.suppress(ProcessLookupError):
            os.kill(found[0], signal.SIGKILL)
        return True

    def until(self, condition: Callable[[], Any], wait_s: float = START_S) -> Any:
        deadline = time.monotonic() + wait_s
        while not (found := condition()):
            assert time.monotonic() < deadline, "it took too long"
            time.sleep(0.1)
        return found


def canary_of(name: str) -> tuple[float, float]:
    """A point of a site's that nothing but its own row holds."""
    dice = random.Random(f"canary of {name}")
    return 2 + dice.random(), 7 + dice.random()


def rows_of(name: str, count: int = 100) -> list[tuple[Any, ...]]:
    """Two clouds of points, and the canary; the same for the same name."""
    dice = random.Random(name)
    found: list[tuple[Any, ...]] = [(*canary_of(name), "benign")]
    for _ in range(count):
        label = dice.random() < 0.5
        centre = 6 if label else 4
        point = (round(dice.gauss(centre, 1), 4), round(dice.gauss(centre, 1), 4))
        found.append((*point, "malignant" if label else "benign"))
    return found


def _is_ready(log: Path, name: str) -> bool:
    if not log.exists():
        return False
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    return any(event.get("kind") == "ready" and event.get("name") == name for event in map(json.loads, lines))


def _descendants(roots: set[int]) -> Iterator[tuple[int, str]]:
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            commands[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue
        parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    for pid, command in commands.items():
        above, seen = parents.get(pid, 0), 0
        while above and seen < 50:
            if above in roots:
                yield pid, command
                break
            above, seen = parents.get(above, 0), seen + 1
