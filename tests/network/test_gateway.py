"""Who reaches the gateway and is not a member can do nothing; a member can do what a SuperNode must."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node

from audit.entries import body_document
from audit.membership import NodeRefused
from federation.network.control import Node as KnownNode
from federation.network.membership import utc_now
from federation.network.pki import node_key_pem
from server.network.directory import NodeDirectory
from server.network.fleet import FLEET
from server.network.gateway import Gateway, Limits

CA_PEM = b"-----BEGIN CERTIFICATE-----\n"
LIMIT = 1 << 20


class PlayedSuperLink:
    """Remembers what reached it, on the control line and on the wire."""

    def __init__(self) -> None:
        self.known: dict[bytes, int] = {}
        self.wire: list[tuple[str, bytes]] = []
        self.next = 9_000_000_000_000_000_001

    def nodes(self):
        return tuple(
            KnownNode(node_id=number, public_key=pem, name="", status="online")
            for pem, number in self.known.items()
        )

    def register(self, public_key: bytes, name: str) -> int:
        self.next += 1
        self.known[public_key] = self.next
        return self.next

    def unregister(self, node_id: int) -> None:
        self.known = {pem: number for pem, number in self.known.items() if number != node_id}

    async def app(self, scope, receive, send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.wire.append((scope["path"], body))
        headers = [(b"content-type", b"application/x-protobuf"), (b"server", b"inner")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"answered"})


@pytest.fixture
def body_timeout_s():
    return 60.0


@pytest.fixture
def door(office, body_timeout_s):
    office.membership._clock = utc_now
    superlink = PlayedSuperLink()
    directory = NodeDirectory(office.membership.roster, superlink)
    hospital = office.hospital()
    hospital.invitation = office.invite("St Mary")
    office.membership.request(
        hospital.invitation.secret,
        hospital.joined(hospital.invitation, now=utc_now()),
        body_document(hospital.enrolment()),
    )
    office.membership.approve("st-mary")
    directory.settle()
    inner = httpx.AsyncClient(transport=httpx.ASGITransport(superlink.app), base_url="http://inner")
    gateway = Gateway(
        office.membership,
        directory,
        superlink=inner,
        api=inner,
        ca_pem=CA_PEM,
        limits=Limits(max_body_bytes=LIMIT, body_timeout_s=body_timeout_s, requests_per_s=1, burst=50),
    )
    return gateway, superlink, hospital, directory


def call(gateway, method: str, path: str, **options) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(gateway)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


OUTSIDERS_WISHES = [
    "/v1/control/list-nodes",
    "/v1/control/register-node",
    "/v1/control/start-run",
    "/v1/control/stop-run",
    "/v1/runtime/acquire-task",
    "/v1/runtime/pull-task-input",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/../control/list-nodes",
    "/v1/fleet/pull-messages/",
    "//v1/fleet/pull-messages",
    "/V1/FLEET/PULL-MESSAGES",
    "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2flist-nodes",
    "/v1/audit/entries",
    "/v1/audit/evidence/0",
    "/v1/keys",
    "/v1/models",
    "/docs",
    "/openapi.json",
    "/health",
    "/metrics",
    "/",
]


@pytest.mark.parametrize("path", OUTSIDERS_WISHES)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_what_is_not_listed_is_not_found(door, method, path):
    gateway, superlink, *_ = door
    assert call(gateway, method, path).status_code == 404
    assert superlink.wire == []


@pytest.mark.parametrize("path", sorted(FLEET))
def test_fleet_routes_without_a_members_signature_reach_nobody(door, path):
    gateway, superlink, *_ = door
    assert call(gateway, "POST", path, content=b"x").status_code == 401
    assert call(gateway, "GET", path).status_code == 404
    assert superlink.wire == []


def test_a_members_request_reaches_superlink_and_its_answer_comes_back(door):
    gateway, superlink, hospital, directory = door
    own = directory.node_id_of(hospital.node_key)
    body = PullMessagesRequest(node=Node(node_id=own)).SerializeToString()
    reply = call(
        gateway, "POST", "/v1/fleet/pull-messages", content=body, headers=hospital.headers(utc_now())
    )
    assert (reply.status_code, reply.content) == (200, b"answered")
    assert superlink.wire == [("/v1/fleet/pull-messages", body)]
    assert "server" not in reply.headers


def test_a_captured_request_is_refused_and_logged(door, office):
    gateway, superlink, hospital, directory = door
    own = directory.node_id_of(hospital.node_key)
    options = {
        "content": PullMessagesRequest(node=Node(node_id=own)).SerializeToString(),
        "headers": hospital.headers(utc_now()),
    }
    assert call(gateway, "POST", "/v1/fleet/pull-messages", **options).status_code == 200
    assert call(gateway, "POST", "/v1/fleet/pull-messages", **options).status_code == 401
    assert len(superlink.wire) == 1
    assert [(body.site, body.reason) for body in office.bodies(NodeRefused)] == [("st-mary", "replayed")]


def test_a_reply_in_anothers_name_is_refused_and_logged(door, office):
    gateway, superlink, hospital, directory = door
    own = directory.node_id_of(hospital.node_key)
    forged = PushMessagesRequest(
        node=Node(node_id=own),
        messages_list=[Message(metadata=Metadata(src_node_id=own + 1, reply_to_message_id="known"))],
        message_object_trees=[ObjectTree(object_id="x")],
    ).SerializeToString()
    reply = call(
        gateway, "POST", "/v1/fleet/push-messages", content=forged, headers=hospital.headers(utc_now())
    )
    assert reply.status_code == 401
    assert superlink.wire == []
    assert [body.reason for body in office.bodies(NodeRefused)] == ["forged_source"]


def test_a_revoked_site_reaches_nobody_from_the_next_request_on(door, office):
    gateway, superlink, hospital, directory = door
    body = ActivateNodeRequest(public_key=node_key_pem(hospital.node_key)).SerializeToString()
    options = {"content": body}
    path = "/v1/fleet/activate-node"
    assert call(gateway, "POST", path, headers=hospital.headers(utc_now()), **options).status_code == 200
    office.membership.revoke("st-mary", "")
    assert call(gateway, "POST", path, headers=hospital.headers(utc_now()), **options).status_code == 401
    directory.settle()
    assert superlink.known == {}
    assert [body.reason for body in office.bodies(NodeRefused)] == ["revoked"]


def test_a_body_that_says_it_is_too_large_is_not_read(door):
    gateway, superlink, hospital, _ = door
    read = []

    async def endless():
        while True:
            read.append(1)
            yield b"x" * 65_536

    headers = {**hospital.headers(utc_now()), "content-length": str(LIMIT + 1)}
    reply = call(gateway, "POST", "/v1/fleet/push-object", content=endless(), headers=headers)
    assert reply.status_code == 413
    assert read == []
    assert superlink.wire == []


def test_a_body_that_does_not_say_how_long_it_is_is_cut_off(door):
    gateway, superlink, hospital, _ = door
    sent = 0

    async def endless():
        nonlocal sent
        while sent < 64 * LIMIT:
            sent += 65_536
            yield b"x" * 65_536

    reply = call(
        gateway, "POST", "/v1/fleet/push-object", content=endless(), headers=hospital.headers(utc_now())
    )
    assert reply.status_code == 413
    assert sent <= LIMIT + 4 * 65_536
    assert superlink.wire == []


def test_only_objects_may_be_large(door):
    gateway, superlink, hospital, directory = door
    own = directory.node_id_of(hospital.node_key)
    large = PushObjectRequest(node=Node(node_id=own), object_content=b"x" * (LIMIT // 2)).SerializeToString()
    for path, status in (("/v1/fleet/pull-messages", 413), ("/v1/fleet/push-object", 200)):
        reply = call(gateway, "POST", path, content=large, headers=hospital.headers(utc_now()))
        assert reply.status_code == status
    assert [path for path, _ in superlink.wire] == ["/v1/fleet/push-object"]


@pytest.mark.parametrize("body_timeout_s", [0.2])
def test_a_body_that_does_not_come_is_not_waited_for(door):
    gateway, _, hospital, _ = door

    async def slow():
        yield b"x"
        await asyncio.sleep(600)
        yield b"x"

    reply = call(
        gateway, "POST", "/v1/fleet/push-object", content=slow(), headers=hospital.headers(utc_now())
    )
    assert reply.status_code == 408


def test_a_node_that_floods_is_told_to_wait(door):
    gateway, _superlink, hospital, directory = door
    own = directory.node_id_of(hospital.node_key)
    body = PullMessagesRequest(node=Node(node_id=own)).SerializeToString()

    async def flood() -> list[int]:
        transport = httpx.ASGITransport(gateway)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return [
                (
                    await client.post(
                        "/v1/fleet/pull-messages", content=body, headers=hospital.headers(utc_now())
                    )
                ).status_code
                for _ in range(120)
            ]

    statuses = asyncio.run(flood())
    assert statuses[:50] == [200] * 50
    assert 503 in statuses


def test_a_stranger_who_floods_is_told_to_wait(door):
    gateway, *_ = door
    statuses = [call(gateway, "GET", "/v1/join/ca").status_code for _ in range(80)]
    assert statuses[0] == 200
    assert 429 in statuses


def test_the_ca_is_there_for_whoever_compares_it(door):
    assert call(door[0], "GET", "/v1/join/ca").content == CA_PEM


def test_joining_through_the_door_tells_where_it_stands(door, office):
    gateway, *_ = door
    newcomer, invitation = office.hospital("st-olaf"), office.invite("St Olaf")
    body = {
        "secret": invitation.secret,
        "joined": newcomer.joined(invitation, now=utc_now()),
        "enrolment": body_document(newcomer.enrolment()),
    }
    reply = call(gateway, "POST", "/v1/join/request", json=body)
    assert (reply.status_code, reply.json()["state"]) == (200, "requested")
    thief = type(newcomer).make(office.folder / "thief", "st-olaf")
    stolen = {**body, "joined": thief.joined(invitation, now=utc_now())}
    reply = call(gateway, "POST", "/v1/join/request", json=stolen)
    assert (reply.status_code, reply.json()["reason"]) == (403, "used")
    assert invitation.secret not in reply.text


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"secret": 1}', b'{"a":1,"a":2}', b"\xff" * 100])
@pytest.mark.parametrize("path", ["/v1/join/request", "/v1/join/leave", "/v1/join/keys"])
def test_malformed_join_messages_are_answered_by_a_code(door, path, body):
    reply = call(door[0], "POST", path, content=body)
    assert reply.status_code in (403, 409, 422)
    assert set(reply.json()) >= {"code", "detail"}


def test_members_are_shown_to_members_alone(door, office):
    import hashlib

    gateway, _, hospital, _ = door
    own = hashlib.sha256(hospital.keys.identity.text.encode()).hexdigest()
    shown = call(gateway, "GET", f"/v1/join/sites/{own}/members").json()
    assert [item["site"] for item in shown["enrolments"]] == ["st-mary"]
    assert call(gateway, "GET", f"/v1/join/sites/{'0' * 64}/members").status_code == 404
    office.membership.revoke("st-mary", "")
    assert call(gateway, "GET", f"/v1/join/sites/{own}/members").status_code == 403
    assert call(gateway, "GET", f"/v1/join/sites/{own}").json()["state"] == "revoked"


def test_join_messages_are_small(door):
    reply = call(door[0], "POST", "/v1/join/request", content=json.dumps({"x": "y" * 20_000}))
    assert reply.status_code == 413


def test_superlink_is_put_right_when_it_knows_more_or_less_than_the_log(door):
    _, superlink, hospital, directory = door
    superlink.known = {b"somebody the operator never approved": 5}
    directory.settle()
    assert superlink.known == {node_key_pem(hospital.node_key): directory.node_id_of(hospital.node_key)}
