"""What a node says passes only in its own name, freshly signed, once."""

from __future__ import annotations

import base64
from datetime import timedelta

import pytest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node

from server.network.fleet import FLEET, FleetGate, NodeRefusedError
from server.network.limits import OnceOnly, RateLimit

OWN, OTHER = 7_000_000_000_000_000_001, 7_000_000_000_000_000_002


@pytest.fixture
def member(office):
    hospital = office.hospital()
    hospital.invitation = office.admit(hospital)
    return hospital


@pytest.fixture
def gate(office, member):
    ids = {member.node_key: OWN}
    return FleetGate(office.membership.roster, ids.get, clock=office.clock)


def refusal(act, *arguments) -> tuple[str, int]:
    with pytest.raises(NodeRefusedError) as caught:
        act(*arguments)
    return caught.value.reason, caught.value.status


def push(node_id: int, source: int, trees: int = 1) -> bytes:
    return PushMessagesRequest(
        node=Node(node_id=node_id),
        messages_list=[Message(metadata=Metadata(src_node_id=source, dst_node_id=1))],
        message_object_trees=[ObjectTree(object_id="x")] * trees,
    ).SerializeToString()


def test_a_members_request_passes(gate, member, office):
    node = gate.authenticate(member.headers(office.clock()))
    assert node.site == "st-mary"
    gate.check_body("/v1/fleet/push-messages", node, push(OWN, OWN))
    gate.check_body("/v1/fleet/deactivate-node", node, DeactivateNodeRequest(node_id=OWN).SerializeToString())
    gate.check_body(
        "/v1/fleet/activate-node", node, ActivateNodeRequest(public_key=node.pem).SerializeToString()
    )


def test_a_captured_request_passes_no_second_time(gate, member, office):
    headers = member.headers(office.clock())
    gate.authenticate(headers)
    assert refusal(gate.authenticate, headers) == ("replayed", 401)


def test_another_signature_over_a_used_time_passes_no_second_time(gate, member, office):
    gate.authenticate(member.headers(office.clock()))
    assert refusal(gate.authenticate, member.headers(office.clock())) == ("replayed", 401)


@pytest.mark.parametrize("seconds", [-600, -121, 11, 600])
def test_an_old_or_future_signature_is_a_replay(gate, member, office, seconds):
    headers = member.headers(office.clock() + timedelta(seconds=seconds))
    assert refusal(gate.authenticate, headers) == ("replayed", 401)


def test_a_strangers_key_is_unregistered(gate, office):
    stranger = office.hospital("stranger")
    assert refusal(gate.authenticate, stranger.headers(office.clock())) == ("unregistered", 401)


def test_a_site_that_only_asked_is_unregistered(gate, office):
    waiting = office.hospital("st-olaf")
    office.ask(waiting, office.invite("St Olaf"))
    assert refusal(gate.authenticate, waiting.headers(office.clock())) == ("unregistered", 401)


def test_a_revoked_site_is_out_at_once(gate, member, office):
    office.membership.revoke("st-mary", "")
    assert refusal(gate.authenticate, member.headers(office.clock())) == ("revoked", 401)


def test_a_site_that_left_is_out(gate, member, office):
    office.membership.leave(member.leaving(member.invitation))
    assert refusal(gate.authenticate, member.headers(office.clock())) == ("left", 401)


def test_an_expired_node_key_is_out(gate, member, office):
    office.clock.turn(days=366)
    assert refusal(gate.authenticate, member.headers(office.clock())) == ("expired", 401)


def test_an_exchanged_key_is_out(gate, member, office):
    office.membership.rotate(member.rotation(member.invitation, office.hospital("a").node_key))
    assert refusal(gate.authenticate, member.headers(office.clock())) == ("unregistered", 401)


@pytest.mark.parametrize("name", ["flwr-public-key", "flwr-timestamp", "flwr-signature"])
@pytest.mark.parametrize("value", [None, "", "!", "AAAA", "2026-11-24T08:00:00"])
def test_damaged_headers_are_noise(gate, member, office, name, value):
    headers = member.headers(office.clock())
    if value is None:
        del headers[name]
    else:
        headers[name] = value
    assert refusal(gate.authenticate, headers) == ("", 401)


def test_one_sites_key_with_anothers_signature_is_noise(gate, member, office):
    other = office.hospital("st-olaf")
    headers = {
        **member.headers(office.clock()),
        "flwr-signature": other.headers(office.clock())["flwr-signature"],
    }
    assert refusal(gate.authenticate, headers) == ("", 401)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/fleet/push-messages", push(OWN, OTHER)),
        ("/v1/fleet/push-messages", push(OTHER, OWN)),
        ("/v1/fleet/push-messages", push(OWN, OWN, trees=0)),
        ("/v1/fleet/push-messages", push(OWN, OWN, trees=2)),
        ("/v1/fleet/push-messages", PushMessagesRequest(node=Node(node_id=OWN)).SerializeToString()),
        ("/v1/fleet/pull-messages", PullMessagesRequest(node=Node(node_id=OTHER)).SerializeToString()),
        ("/v1/fleet/pull-messages", b""),
        ("/v1/fleet/push-object", PushObjectRequest(node=Node(node_id=OTHER)).SerializeToString()),
        ("/v1/fleet/deactivate-node", DeactivateNodeRequest(node_id=OTHER).SerializeToString()),
        ("/v1/fleet/activate-node", ActivateNodeRequest(public_key=b"another").SerializeToString()),
    ],
)
def test_a_body_in_another_nodes_name_is_a_forgery(gate, member, office, path, body):
    node = gate.authenticate(member.headers(office.clock()))
    assert refusal(gate.check_body, path, node, body) == ("forged_source", 401)


def test_a_second_forged_message_behind_an_honest_one_is_refused(gate, member, office):
    node = gate.authenticate(member.headers(office.clock()))
    body = PushMessagesRequest(
        node=Node(node_id=OWN),
        messages_list=[
            Message(metadata=Metadata(src_node_id=OWN)),
            Message(metadata=Metadata(src_node_id=OTHER)),
        ],
        message_object_trees=[ObjectTree(), ObjectTree()],
    ).SerializeToString()
    assert refusal(gate.check_body, "/v1/fleet/push-messages", node, body)[0] == "forged_source"


@pytest.mark.parametrize("path", sorted(FLEET))
def test_garbage_is_no_message(gate, member, office, path):
    node = gate.authenticate(member.headers(office.clock()))
    assert refusal(gate.check_body, path, node, b"\xff\xff\xff") == ("", 400)


def test_an_approved_key_that_superlink_does_not_know_yet_is_asked_to_wait(office, member):
    gate = FleetGate(office.membership.roster, lambda key: None, clock=office.clock)
    node = gate.authenticate(member.headers(office.clock()))
    body = ActivateNodeRequest(public_key=node.pem).SerializeToString()
    assert refusal(gate.check_body, "/v1/fleet/activate-node", node, body) == ("", 503)


def test_every_route_that_passes_is_one_that_supernode_calls():
    import inspect

    from flwr.supernode import fleet_http_client

    called = inspect.getsource(fleet_http_client)
    assert all(path in called for path in FLEET)
    assert {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}.isdisjoint(FLEET)


def test_header_names_are_flowers_own():
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER

    from server.network import fleet

    assert fleet.PUBLIC_KEY_HEADER == FLEET_HTTP_PUBLIC_KEY_HEADER
    assert fleet.SIGNATURE_HEADER == FLEET_HTTP_SIGNATURE_HEADER
    assert fleet.TIMESTAMP_HEADER == TIMESTAMP_HEADER


def test_a_rate_is_a_burst_and_then_so_many_a_second():
    now = [0.0]
    limit = RateLimit(2.0, 3, clock=lambda: now[0])
    assert [limit.allows("a") for _ in range(4)] == [True, True, True, False]
    assert limit.allows("b")
    now[0] = 0.5
    assert [limit.allows("a") for _ in range(2)] == [True, False]


def test_what_was_seen_is_forgotten_only_after_its_time():
    now = [0.0]
    once = OnceOnly(10.0, clock=lambda: now[0])
    assert once.is_new(b"x")
    now[0] = 9.9
    assert not once.is_new(b"x")
    now[0] = 10.1
    assert once.is_new(b"x")
    assert len(once) == 1


def test_a_signature_is_base64_of_der(member, office):
    assert base64.b64decode(member.headers(office.clock())["flwr-signature"])[0] == 0x30
