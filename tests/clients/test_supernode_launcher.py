"""The launcher under Flower's real SuperLink and SuperNode: what is not approved never runs.

Soak: two runs over four processes of Flower take half a minute.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from clients.agent_server import AgentServer
from clients.confinement import landlock_abi
from clients.launcher import NOT_APPROVED, install_stub
from tests.ports import free_ports

pytestmark = pytest.mark.soak
BIN = Path(sys.executable).parent


class Door:
    """Stands for the agent: approves what it is told to, and answers codes."""

    def __init__(self):
        self.approved, self.asked = set(), []

    def handle(self, kind, header, blobs):
        if kind != "bundle.check":
            return b'{"error":"bad_request"}', {}
        self.asked.append(json.loads(header)["digest"])
        return json.dumps({"approved": self.asked[-1] in self.approved}).encode(), {}


@pytest.fixture
def flower(tmp_path, repository):
    """Start SuperLink and SuperNode with our launcher in front; return `(submit, door, folder)`."""
    door = Door()
    (tmp_path / "run").mkdir(mode=0o700)
    server = AgentServer(door, tmp_path / "run" / "alpha.sock")
    server.start()
    install_stub(
        tmp_path / "bin", agent=f"unix:{tmp_path / 'run'}", site="alpha", scratch=tmp_path / "scratch"
    )
    shutil.copytree(Path(__file__).parent / "hostile_bundle", tmp_path / "app")
    link_port, node_port = free_ports(2)
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "t"\n[superlink.t]\naddress = "127.0.0.1:{link_port}"\ninsecure = true\n'
    )
    given = {**os.environ, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25", "PYTHONPATH": str(repository)}
    started = [
        subprocess.Popen(
            [BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(link_port),
             "--disable-runtime-dependency-installation", "--database", str(tmp_path / "superlink.db")],
            env={**given, "FLWR_HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"},
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
    ]  # fmt: skip
    try:
        await_health(link_port)
        node = subprocess.Popen(
            [BIN / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link_port}",
             "--port", str(node_port), "--node-config", 'site="alpha"'],
            env={**given, "FLWR_HOME": str(tmp_path / "node"), "AFFIDAVIT_SECRET": "hunter2",
                 "PATH": f"{tmp_path / 'bin'}:{BIN}:{os.environ['PATH']}"},
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        started.append(node)

        def submit(orders):
            (tmp_path / "orders.json").write_text(json.dumps(orders))
            result = tmp_path / "result.json"
            result.unlink(missing_ok=True)
            subprocess.run(
                [BIN / "flwr", "run", str(tmp_path / "app"), "t", "--stream", "-c",
                 f'orders="{tmp_path / "orders.json"}" result="{result}"'],
                env={**given, "FLWR_HOME": str(home)}, cwd=tmp_path, timeout=120, check=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            (told,) = json.loads(result.read_text())
            return told

        yield submit, door, tmp_path
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(20)
        server.close()


@pytest.mark.skipif(landlock_abi() < 6, reason="this kernel's Landlock confines too little")
def test_only_an_approved_bundle_runs_and_it_runs_confined(flower):
    submit, door, folder = flower
    precious = folder / "precious.db"
    precious.write_text("rows")
    orders = {
        "environment": {"do": "environment"},
        "read": {"do": "read", "path": str(precious)},
        "kill": {"do": "kill", "pid": os.getpid()},
        "connect": {"do": "connect", "host": "127.0.0.1", "port": 9},
        "ask": {"do": "ask", "kind": "rows", "header": "e30=", "socket": str(folder / "run" / "alpha.sock")},
    }
    refused = submit(orders)
    assert refused["code"] == 2
    assert NOT_APPROVED in refused["reason"]
    assert str(folder) not in refused["reason"]
    (digest,) = door.asked
    door.approved.add(digest)
    told = submit(orders)
    assert door.asked == [digest] * 2
    assert [told[name]["error"] for name in ("read", "kill", "connect")] == ["PermissionError"] * 3
    assert json.loads(told["ask"]["answer"]["header"]) == {"error": "bad_request"}
    assert "hunter2" not in json.dumps(told["environment"])
    assert not list((folder / "scratch").glob("message-*/*"))


def await_health(port):
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
