"""The real thing once: Flower's own SuperLink and SuperNodes behind the gateway, and who should not be there.

Slow, because nine processes start: SuperLink, SuperExec, the API, the gateway, two SuperNodes, their helpers.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from audit.entries import RunFailed, decode_entry
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.location import log_location
from audit.membership import JoinRefused, NodeRefused, SiteKeysRotated
from audit.site_bodies import RequestRefused
from clients.home import SiteHome
from clients.network.coordinator import CoordinatorError, WrongCaError
from clients.network.joining import join, leave, rotate_keys, standing
from clients.network.membership import network_folder
from clients.network.starting import flower_environment, supernode_command
from clients.site_log import SiteLog
from federation.coordinator import Coordinator
from federation.network.control import SuperLinkControl
from federation.network.errors import JoinRefusedError, RunControlError
from federation.network.invitation import Invitation
from federation.network.membership import InviteRequest, Membership
from federation.network.pki import LOOPBACK, Pki, node_key_pem
from federation.network.settings import NetworkHome, NetworkSettings
from server.logs import FIELDS
from tests.ports import free_ports

pytestmark = pytest.mark.slow

START_S = 120.0
LIFETIME_S = 24  # of the gateway's certificate: everything here goes on while it is exchanged


class World:
    """A coordinator that is up, and what the tests do at both ends of the wire."""

    def __init__(self, base: Path) -> None:
        self.base, self.home = base, base / "coordinator"
        public, inner, api = free_ports(3)
        settings = NetworkSettings(
            public_host="localhost", bind="127.0.0.1", port=public, superlink_port=inner, api_port=api,
            certificate_s=LIFETIME_S,
        )  # fmt: skip
        with Coordinator.create(self.home, base / "signer", "log.example.org/real") as coordinator:
            self.log_key = coordinator.log_key
        self.network = NetworkHome.create(self.home, settings)
        self.pki = Pki.create(self.network.pki.folder, LOOPBACK, name="real")
        self.settings = settings
        self.ledger = Ledger.open(log_location(self.home))
        self.membership = Membership(self.ledger, self.network.folder)
        self.control = SuperLinkControl(settings.superlink, self.pki.inner_ca)
        self.processes: list[subprocess.Popen] = []

    def start(self, command: list[str], log: Path, **environment: str) -> subprocess.Popen:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )
        self.processes.append(process)
        return process

    def up(self) -> None:
        log = self.base / "up.log"
        command = ["-P", "-m", "affidavit", "coordinator", "up", "--json", "--home", str(self.base)]
        process = self.start([sys.executable, *command], log)
        self.until(
            lambda: any(
                event["kind"] == "ready" and event["name"] == "gateway"
                for event in map(
                    json.loads, filter(lambda line: line[:1] == "{", log.read_text().splitlines())
                )
            ),
            process,
        )

    def until(self, condition, process: subprocess.Popen | None = None):
        deadline = time.monotonic() + START_S
        while not (found := condition()):
            assert process is None or process.poll() is None, "a process went away"
            assert time.monotonic() < deadline, "it took too long"
            time.sleep(0.1)
        return found

    def invite(self, label: str, **options) -> Invitation:
        return self.membership.invite(
            InviteRequest(label=label, **options),
            address=self.settings.address,
            ca=self.pki.ca_fingerprint(),
            log_key=self.log_key,
        )

    def site(self, name: str, folder: str = "sites") -> SiteHome:
        return SiteHome.create(
            self.base / folder / name,
            name=name,
            data=self.base / "data.csv",
            population=name,
            lifetime_epsilon="1",
            lifetime_delta="0.00001",
            auto_approve=False,
        )

    def admitted(self, name: str, **options) -> SiteHome:
        home = self.site(name)
        assert join(home, self.invite(name, auto_approve=True), **options).state == "approved"
        return home

    def certificate(self) -> x509.Certificate:
        """What the gateway shows at this moment."""
        address = ("localhost", self.settings.port)
        return x509.load_pem_x509_certificate(ssl.get_server_certificate(address).encode())

    def node_id(self, home: SiteHome, *, status: str = "") -> int | None:
        pem = node_key_pem(network_folder(home.path).node_public_key())
        for node in self.control.nodes():
            if node.public_key == pem and (not status or node.status == status):
                return node.node_id
        return None

    def fleet(self, key: ec.EllipticCurvePrivateKey) -> FleetHttpClient:
        return FleetHttpClient.from_server_address(
            self.settings.address,
            insecure=False,
            root_certificates=self.pki.ca.read_bytes(),
            interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
        )

    def outsider(self) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.pki.ca))
        return httpx.Client(base_url=f"https://{self.settings.address}", verify=context)

    def bodies(self, kind: type) -> list:
        entries = self.ledger.entries(0, self.ledger.tree_size)
        return [body for data in entries if isinstance(body := decode_entry(data).body, kind)]

    def close(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self.processes):
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.ledger.close()


@pytest.fixture(scope="module")
def world():
    with tempfile.TemporaryDirectory(prefix="aff") as folder:  # short: Unix sockets have 107 characters
        made = World(Path(folder))
        try:
            made.up()
            yield made
        finally:
            made.close()


def status_of(call) -> int:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        call()
    return caught.value.response.status_code


def load(home: SiteHome) -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    key = load_ssh_private_key(network_folder(home.path).node_key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def test_two_supernodes_come_online_through_the_gateway_and_go(world):
    homes = [world.admitted(name) for name in ("northgate", "riverside")]
    for home, port in zip(homes, free_ports(2), strict=True):
        folder = network_folder(home.path)
        folder.sockets.mkdir(parents=True)
        world.start(
            supernode_command(folder, world.settings.address, home.name, port),
            folder.folder / "supernode.log",
            **flower_environment(folder),
        )
    for home in homes:
        world.until(lambda home=home: world.node_id(home, status="online"))
    leave(homes[0])
    world.until(lambda: world.node_id(homes[0]) is None)
    with pytest.raises(JoinRefusedError, match="left"):
        standing(homes[0])
    assert world.node_id(homes[1], status="online")


def test_an_outsider_can_do_nothing(world):
    before = world.control.nodes()
    stranger = ec.generate_private_key(ec.SECP384R1())
    pem = public_key_to_bytes(stranger.public_key())
    with world.outsider() as client:
        for path in (
            "/v1/control/list-nodes",  # list nodes
            "/v1/control/start-run",  # submit a bundle
            "/v1/control/register-node",
            "/v1/runtime/acquire-task",  # take a task
            "/v1/runtime/get-fab",
            "/v1/fleet/register-node",
        ):
            assert client.post(path, content=b"").status_code == 404
        for path in ("/v1/fleet/get-fab", "/v1/fleet/pull-messages", "/v1/fleet/pull-object"):
            assert client.post(path, content=b"").status_code == 401  # pull a bundle
    with world.fleet(stranger) as client:
        request = ActivateNodeRequest(public_key=pem, heartbeat_interval=30.0)
        assert status_of(lambda: client.ActivateNode(request)) == 401
        pull = PullMessagesRequest(node=Node(node_id=before[0].node_id if before else 1))
        assert status_of(lambda: client.PullMessages(pull)) == 401
    assert {node.public_key for node in world.control.nodes()} == {node.public_key for node in before}
    assert ("", "unregistered") in {(body.site, body.reason) for body in world.bodies(NodeRefused)}


def test_superlink_gives_no_task_without_the_secret(world):
    context = ssl.create_default_context(cafile=str(world.pki.inner_ca))
    with httpx.Client(base_url=f"https://{world.settings.superlink}", verify=context) as client:
        assert client.post("/v1/runtime/acquire-task", content=b"").status_code >= 400


def test_a_member_speaks_for_no_other_member(world):
    home, other = world.admitted("st-olaf"), world.admitted("eastfield")
    world.until(lambda: world.node_id(home) and world.node_id(other))
    own, foreign = world.node_id(home), world.node_id(other)
    pem = node_key_pem(network_folder(home.path).node_public_key())
    with world.fleet(load(home)) as client:
        world.until(lambda: _activated(client, ActivateNodeRequest(public_key=pem, heartbeat_interval=30.0)))
        forged = PushMessagesRequest(
            node=Node(node_id=own),
            messages_list=[Message(metadata=Metadata(run_id=1, src_node_id=foreign, dst_node_id=1))],
            message_object_trees=[ObjectTree(object_id="0" * 64)],
        )
        assert status_of(lambda: client.PushMessages(forged)) == 401
        pull = PullMessagesRequest(node=Node(node_id=foreign))
        assert status_of(lambda: client.PullMessages(pull)) == 401
        client.PullMessages(PullMessagesRequest(node=Node(node_id=own)))
        world.membership.revoke("st-olaf", "test")
        world.until(lambda: _is_shut_out(client, own))
    world.until(lambda: world.node_id(home) is None)
    said = {(body.site, body.reason) for body in world.bodies(NodeRefused)}
    assert {("st-olaf", "forged_source"), ("st-olaf", "revoked")} <= said
    with pytest.raises(JoinRefusedError, match="shut this site out"):
        standing(home)


def _activated(client: FleetHttpClient, request: ActivateNodeRequest) -> bool:
    try:
        return client.ActivateNode(request).node_id != 0
    except httpx.HTTPStatusError:
        return False  # the gateway waits for SuperLink to know the key; `until` has a deadline


def _is_shut_out(client: FleetHttpClient, node_id: int) -> bool:
    try:
        client.PullMessages(PullMessagesRequest(node=Node(node_id=node_id)))
    except httpx.HTTPStatusError as error:
        return error.response.status_code == 401
    return False


def test_a_stolen_invitation_serves_once(world):
    invitation = world.invite("Westwood")
    join(world.site("westwood"), invitation)
    with pytest.raises(JoinRefusedError, match="somebody else has read it"):
        join(world.site("westwood", "thief"), invitation)
    assert ("westwood", "used") in {(body.site, body.reason) for body in world.bodies(JoinRefused)}


def test_another_ca_is_refused_at_the_site(world):
    invitation = dataclasses.replace(world.invite("Southgate"), ca="ab" * 32)
    home = world.site("southgate")
    with pytest.raises(WrongCaError, match="call the operator"):
        join(home, invitation)
    assert not network_folder(home.path).node_key.exists()
    assert refusals(home) == [("coordinator", "wrong_ca", 1)]
    with pytest.raises(WrongCaError):
        join(home, invitation)
    assert len(refusals(home)) == 1  # once an hour


def test_a_member_that_meets_another_ca_keeps_it_in_its_log_and_says_so(world, tmp_path):
    home = world.admitted("northfield")
    other = Pki.create(tmp_path / "tls", LOOPBACK, name="stranger")
    folder = network_folder(home.path)
    folder.ca.write_bytes(other.ca.read_bytes())
    for ask in (standing, leave, rotate_keys):
        with pytest.raises(CoordinatorError, match="call the operator") as caught:
            ask(home)
        assert caught.value.code == "site.wrong_ca"
    assert refusals(home) == [("coordinator", "wrong_ca", 1)]
    log = world.network.logs / "gateway.log"
    world.until(lambda: "TLS handshakes failed" in log.read_text())
    assert "unknown ca" in log.read_text()
    for line in log.read_text().splitlines():  # the gateway writes what the API writes: one format
        assert {"@timestamp", "log.level", "log.logger", "ecs.version"} <= set(json.loads(line)) <= FIELDS


def refusals(home: SiteHome) -> list[tuple[str, str, int]]:
    log = SiteLog.open(home.path, home.name)
    found = [(body.kind, body.reason, body.count) for _, _, body in log.entries(RequestRefused)]
    log.release()
    return found


def test_a_captured_request_passes_no_second_time(world):
    home = world.admitted("fairview")
    world.until(lambda: world.node_id(home))
    key, timestamp = load(home), datetime.now(UTC).isoformat()
    headers = {
        "flwr-public-key": base64.b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-timestamp": timestamp,
        "flwr-signature": base64.b64encode(key.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
        "content-type": "application/x-protobuf",
    }
    body = PullMessagesRequest(node=Node(node_id=world.node_id(home))).SerializeToString()
    with world.outsider() as client:
        world.until(lambda: world.membership.roster.refresh().of_site("fairview").state == "approved")
        first = client.post("/v1/fleet/pull-messages", content=body, headers=headers)
        again = client.post("/v1/fleet/pull-messages", content=body, headers=headers)
    assert (first.status_code != 401, again.status_code) == (True, 401)
    assert ("fairview", "replayed") in {(item.site, item.reason) for item in world.bodies(NodeRefused)}


def test_nobody_at_the_address_is_said_plainly(world):
    invitation = dataclasses.replace(world.invite("Midtown"), address=f"localhost:{free_ports(1)[0]}")
    with pytest.raises(CoordinatorError, match="does not answer"):
        join(world.site("midtown"), invitation)


def test_a_key_is_exchanged_over_the_wire(world):
    home = world.admitted("hillside")
    folder = network_folder(home.path)
    before = folder.node_public_key()
    after = rotate_keys(home)
    assert folder.node_public_key() == after != before
    world.until(lambda: world.node_id(home) is not None)
    assert node_key_pem(before) not in {node.public_key for node in world.control.nodes()}


def test_no_secret_is_in_any_log_file(world):
    secrets = [world.network.superexec_secret.read_bytes()]
    secrets += [path.read_bytes().splitlines()[1] for path in world.pki.folder.glob("*.key")]
    logs = [path.read_bytes() for path in (*world.network.logs.iterdir(), world.base / "up.log")]
    assert not [secret for secret in secrets for log in logs if secret in log]


def test_a_superlink_that_is_away_is_named(world):
    away = SuperLinkControl(f"127.0.0.1:{free_ports(1)[0]}", world.pki.inner_ca)
    with pytest.raises(RunControlError, match="coordinator up"):
        away.nodes()


def test_a_run_that_is_stopped_now_ends_everywhere(world):
    from clients.demo_data import demo_charter, write_demo_files

    files = write_demo_files(world.base / "data")
    made = affidavit(world, "identity", "new", "curie", "--role", "scientist")
    path = world.base / "charter.yaml"
    path.write_text(
        demo_charter(
            public=files.public,
            identities={site: SigningKey.generate().text for site in files.sites},
            officers={"olsen": made["key"]},
            rounds=2,
        )
    )
    author = world.base / "scientists" / "curie"
    run = affidavit(world, "runs", "start", str(path), "--author", str(author), "--no-follow")
    number = int(run["superlink"])
    world.until(lambda: world.control.run_status(number) == "running")
    world.until(lambda: serverapps(world))  # it looks for sites that never come
    assert affidavit(world, "runs", "stop", run["run"][:12], "--now")["ended"]
    world.until(lambda: world.control.run_status(number).startswith("finished"))
    world.until(lambda: not serverapps(world))
    ends = [body for body in world.bodies(RunFailed) if body.run == run["run"]]
    assert [(body.round, body.reason) for body in ends] == [(0, "stopped")]
    (shown,) = affidavit(world, "runs", "list")["runs"]
    assert (shown["state"], shown["reason"], shown["awaited"]) == ("stopped", "stopped", [])
    assert affidavit(world, "runs", "stop", run["run"], "--now")["ended"]  # again changes nothing
    assert len([body for body in world.bodies(RunFailed) if body.run == run["run"]]) == 1


def affidavit(world, *arguments: str) -> dict:
    command = [sys.executable, "-P", "-m", "affidavit", *arguments, "--home", str(world.base), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def serverapps(world) -> list[str]:
    """The processes of ServerApps that this world's SuperLink started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode()
            if "flwr-serverapp" in line and world.settings.superlink in line:
                found.append(path.parent.name)
    return found


def test_coordinator_and_site_go_on_when_their_certificates_end(world):
    sleeper = world.admitted("sleepy-hollow", node_lifetime_s=8)  # it is never up: nothing renews its key
    home = world.admitted("lakeside", node_lifetime_s=LIFETIME_S)
    command = ["-P", "-m", "affidavit", "site", "up", "lakeside", "--home", str(world.base), "--json"]
    log = world.base / "lakeside.log"
    process = world.start([sys.executable, *command], log)
    first, key = world.certificate(), network_folder(home.path).node_public_key()
    world.until(lambda: world.node_id(home, status="online"), process)
    end = max(first.not_valid_after_utc.timestamp(), time.time() + LIFETIME_S) + 1
    world.until(lambda: time.time() > end, process)
    shown = world.certificate()
    assert shown.serial_number != first.serial_number
    assert shown.not_valid_after_utc > datetime.now(UTC)
    world.until(lambda: world.node_id(home, status="online"), process)
    assert network_folder(home.path).node_public_key() != key
    assert standing(home).state == "approved"
    exchanged = [body for body in world.bodies(SiteKeysRotated) if body.site == "lakeside"]
    assert exchanged
    assert exchanged[0].previous_key == key
    pem = node_key_pem(network_folder(sleeper.path).node_public_key())
    with world.fleet(load(sleeper)) as client:
        request = ActivateNodeRequest(public_key=pem, heartbeat_interval=30.0)
        assert status_of(lambda: client.ActivateNode(request)) == 401
    with pytest.raises(JoinRefusedError, match="past its time"):
        standing(sleeper)
    said = {(body.site, body.reason) for body in world.bodies(NodeRefused)}
    assert ("sleepy-hollow", "expired") in said
    assert ("lakeside", "expired") not in said
    listed = {item["site"]: item["state"] for item in affidavit(world, "site", "list")["sites"]}
    assert (listed["lakeside"], listed["sleepy-hollow"]) == ("approved", "expired")


@pytest.mark.soak
def test_the_whole_network_demo_ends_valid(tmp_path):
    from clients.demo_network import run_network_demo
    from clients.demo_screen import Screen

    with tempfile.TemporaryDirectory(prefix="aff") as folder:
        outcome = run_network_demo(Path(folder) / "demo", Screen(quiet=True), rounds=3)
    assert outcome.verdict == "VALID"
    assert outcome.statements == 12
