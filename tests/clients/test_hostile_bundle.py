"""A hostile bundle under the launcher's confinement, beside a real agent in a process of its own.

The bundle is a real ClientApp object; the agent is `affidavit site agent`. Everything happens once, in the
fixture; each test looks at one thing that was tried. The fixture takes over five seconds: a process with
torch, one with Flower.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from audit.canonical import canonical_bytes
from audit.entries import SiteRefused, SiteStatement
from audit.log_lines import FIELDS
from audit.site_bodies import RequestRefused
from clients.agent_place import running
from clients.confinement import landlock_abi
from clients.home import SiteHome
from clients.ledger import SiteLedger
from clients.site_log import SiteLog
from clients.socket_link import SocketLink

BUNDLE = Path(__file__).parent / "hostile_bundle"
CONFINED = """
import json, sys
from pathlib import Path
root, bundle, folder, orders = sys.argv[1:]
sys.path.insert(0, root)
from clients.confinement import Limits, confine, limit
from clients.launcher import _leave_no_packages, allowance
limit(Limits())
given = allowance(Path(folder), None)
confine(type(given)(read=(*given.read, Path(bundle)), write=given.write))
_leave_no_packages()
sys.path.insert(0, bundle)
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
from hostile.client import app
assert "clients" not in sys.modules
message = Message(RecordDict({"orders": ConfigRecord({"json": orders})}), 2, "query")
message.metadata.__dict__["_message_id"] = "message-1"
context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
print(app(message, context).content["done"]["json"])
"""


@dataclass
class Attacked:
    """What the bundle was told, and what the site's own people find afterwards."""

    told: dict[str, Any]
    home: SiteHome
    status: dict[str, Any]
    before: int
    after: int
    refused: list[SiteRefused]
    declined: list[RequestRefused]
    statements: int

    def code(self, name: str) -> str:
        answer = json.loads(self.told[name]["answer"]["header"])
        if "refusal" in answer:
            return str(answer["refusal"]["reason"])
        return str(answer.get("error", answer))


@pytest.fixture(scope="module")
def attacked(
    tmp_path_factory: pytest.TempPathFactory, repository: Path, make_network: Callable[..., Any]
) -> Attacked:
    folder = tmp_path_factory.mktemp("hostile")
    network = make_network(folder)
    network.start()
    old = network.round_header(1, "alpha"), network.base
    network.play(1)
    fresh = network.round_header(2, "alpha")
    weaker, base = network.variant(noise="0.5"), network.base
    network.agents["alpha"].close()
    home = SiteHome.open(folder / "sites" / "alpha")
    network.agents["alpha"].home.approve("0" * 64)
    before = head_of(home)
    with agent_process(repository, folder) as place:
        orders = orders_of(network, place["socket"], place["pid"], home, old, fresh, weaker)
        scratch = folder / "scratch"
        scratch.mkdir()
        done = subprocess.run(
            [
                sys.executable,
                "-I",
                "-c",
                CONFINED,
                str(repository),
                str(BUNDLE),
                str(scratch),
                json.dumps(orders),
            ],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            cwd=scratch,
            env={"PATH": "/usr/bin:/bin", "FLWR_HOME": str(scratch), "FLWR_TELEMETRY_ENABLED": "0"},
        )
        assert done.returncode == 0, done.stderr
        link = SocketLink(str(Path(place["socket"]).parent), "alpha")
        honest = link.handle("round", canonical_bytes(fresh), {"base_model": base})
        status = running(home) or {}
    told = json.loads(done.stdout.splitlines()[-1])
    told["honest"] = {"answer": {"header": honest[0].decode()}}
    log = SiteLog.open(home.path, "alpha")
    found = Attacked(
        told=told,
        home=home,
        status=status,
        before=before,
        after=head_of(home),
        refused=[body for _, _, body in log.entries(SiteRefused)],
        declined=[body for _, _, body in log.entries(RequestRefused)],
        statements=log.count(SiteStatement),
    )
    log.release()
    network.close()
    return found


def orders_of(network, socket, pid, home, old, fresh, weaker) -> dict[str, Any]:
    def ask(kind, header, **blobs):
        packed = {name: base64.b64encode(data).decode() for name, data in blobs.items()}
        raw = header if isinstance(header, bytes) else canonical_bytes(header)
        return {"do": "ask", "socket": socket, "kind": kind, "header": base64.b64encode(raw).decode()} | (
            {"blobs": packed} if packed else {}
        )

    base = network.base  # the start of another run would change it
    start = {"run_started": network.run_started(weaker, run="run-2"), "charter": network.text(weaker)}
    longer = network.run_started(run="run-3", rounds=network.charter.plan.rounds + 5)
    return {
        "rows": ask("rows", {}),
        "data": ask("data.read", {"columns": ["age"]}),
        "garbage": ask("round", b"\xff\xfe", base_model=base),
        "no noise": ask("round", fresh | {"noise_multiplier": "0"}, base_model=base),
        "other clip": ask("round", fresh | {"max_grad_norm": "1000"}, base_model=base),
        "other charter": ask("round", fresh | {"charter": weaker.digest}, base_model=base),
        "weaker run": ask("run.propose", start),
        "extra steps": ask("run.propose", {"run_started": longer, "charter": network.text()}),
        "extra round": ask("round", fresh | {"round": 9}, base_model=base),
        "old round, other base": ask("round", old[0], base_model=base),
        "second release": ask("round", old[0] | {"participants": ["alpha", "beta"]}, base_model=old[1]),
        "unknown run": ask("round", fresh | {"run": "run-7"}, base_model=base),
        "status": ask("agent.status", b""),
        "other bundle": ask("bundle.check", {"digest": "f" * 64}),
        "ledger": {"do": "read", "path": str(home.ledger_path)},
        "key": {"do": "read", "path": str(home.path / "keys" / "statement.pem")},
        "rows file": {"do": "read", "path": str(home.config.data)},
        "rules": {"do": "write", "path": str(home.path / "site.yaml")},
        "home": {"do": "list", "path": str(home.path)},
        "memory": {"do": "read", "path": f"/proc/{pid}/environ"},
        "kill": {"do": "kill", "pid": pid, "really": True},
        "connect": {"do": "connect", "host": "127.0.0.1", "port": 9},
        "dawdle": {"do": "dawdle", "socket": socket, "count": 5},
        "flood": {"do": "flood", "socket": socket, "count": 150},
    }


def head_of(home: SiteHome) -> int:
    ledger = SiteLedger(home.ledger_path, home.high_water_path, look=True)
    try:
        return ledger.head(home.config.population.pseudonym).sequence
    finally:
        ledger.close()


class agent_process:  # noqa: N801 - used as a statement
    """`affidavit site agent alpha` for the time of the block."""

    def __init__(self, repository: Path, homes: Path) -> None:
        command = [sys.executable, "affidavit.py", "site", "agent", "alpha", "--home", str(homes), "--json"]
        self.process = subprocess.Popen(
            command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        watchdog = threading.Timer(90, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        assert line, self.process.communicate()[1]
        place: dict[str, Any] = json.loads(line)
        return place

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, errors
        lines = [json.loads(line) for line in errors.splitlines()]
        assert lines, "what the bundle asked for is on the site's own console"
        assert all(set(line) <= FIELDS and line["log.level"] == "warning" for line in lines), errors


@pytest.mark.parametrize(
    ("tried", "code"),
    [
        ("rows", "bad_request"),
        ("data", "bad_request"),
        ("garbage", "bad_request"),
        ("no noise", "bad_request"),
        ("other clip", "bad_request"),
        ("other charter", "charter_not_approved"),
        ("weaker run", "charter_not_approved"),
        ("extra steps", "bad_request"),
        ("extra round", "round_out_of_order"),
        ("old round, other base", "already_released"),
        ("second release", "already_released"),
        ("unknown run", "run_not_accepted"),
    ],
)
def test_whatever_the_bundle_asks_for_it_gets_a_code(attacked, tried, code):
    assert attacked.code(tried) == code
    assert attacked.told[tried]["answer"]["blobs"] == []


def test_every_refusal_is_a_signed_entry_at_the_site(attacked):
    signed = [(body.run, body.round, body.reason) for body in attacked.refused]
    assert ("run-1", 9, "round_out_of_order") in signed
    assert ("run-1", 1, "already_released") in signed
    assert ("run-2", 0, "charter_not_approved") in signed
    assert ("run-7", 2, "run_not_accepted") in signed
    unsigned = [(body.kind, body.reason) for body in attacked.declined]
    assert ("rows", "bad_request") in unsigned
    assert ("data.read", "bad_request") in unsigned
    assert unsigned.count(("round", "bad_request")) == 3


def test_the_budget_moves_by_what_was_released_and_nothing_else(attacked):
    assert attacked.before == 1
    assert "statement" in json.loads(attacked.told["honest"]["answer"]["header"])
    assert attacked.after == attacked.statements == 2


def test_a_flood_is_cut_short_counted_and_leaves_the_agent_responsive(attacked):
    flood = attacked.told["flood"]["codes"]
    assert sum(flood.values()) == 150
    assert flood.get("bad_request", 0) < 75, flood
    counted = sum(body.count for body in attacked.declined if body.reason == "rate_limited")
    assert 75 <= counted <= attacked.status["turned_away"]
    assert len(attacked.declined) < 90  # entries, for some 170 refusals
    assert "statement" in json.loads(attacked.told["honest"]["answer"]["header"])


@pytest.mark.skipif(landlock_abi() < 1, reason="this kernel has no Landlock: users have to be kept apart")
@pytest.mark.parametrize("tried", ["ledger", "key", "rows file", "rules", "home", "memory"])
def test_a_bundle_of_the_agents_own_user_opens_nothing_of_the_site(attacked, tried):
    assert attacked.told[tried]["error"] == "PermissionError"


@pytest.mark.skipif(landlock_abi() < 6, reason="this kernel's Landlock does not confine signals")
def test_a_bundle_cannot_end_the_agent(attacked):
    assert attacked.told["kill"]["error"] == "PermissionError"
    assert attacked.status["pid"] > 0


@pytest.mark.skipif(landlock_abi() < 4, reason="this kernel's Landlock does not confine connections")
def test_a_bundle_connects_nowhere_but_to_its_supernode(attacked):
    assert attacked.told["connect"]["error"] == "PermissionError"


def test_a_bundle_that_was_not_approved_is_told_so(attacked):
    assert json.loads(attacked.told["other bundle"]["answer"]["header"]) == {"approved": False}


def test_the_agent_leaves_nothing_behind_when_it_is_stopped(attacked):
    assert list((attacked.home.path / "run").iterdir()) == []
    assert os.stat(attacked.home.path / "run").st_mode & 0o077 == 0
