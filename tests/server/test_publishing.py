"""The server publishes within a second under the one lease, and witnesses have one checkpoint to meet on."""

from __future__ import annotations

import time

import pytest
from fastapi.testclient import TestClient

from audit.checkpoints import parse_checkpoint_note
from audit.entries import KeyRevoked
from server.app import create_app
from server.settings import Settings


def size_of(reply) -> int:
    return parse_checkpoint_note(reply.content).tree_size


def test_default_interval_keeps_checkpoints_within_a_second():
    assert Settings().publish_interval_s <= 0.5


def test_entry_of_another_process_is_checkpointed_within_a_second(lab):
    app = create_app(lab.settings(publish_interval_s=0.2), clock=lab.clock)
    with TestClient(app, raise_server_exceptions=False) as client:
        lab.coordinator.append(KeyRevoked(key_id="a"), "server")
        size, deadline = lab.coordinator.ledger.tree_size, time.monotonic() + 5
        begun = time.monotonic()
        while size_of(client.get("/v1/audit/checkpoint")) < size and time.monotonic() < deadline:
            time.sleep(0.02)
        assert time.monotonic() - begun < 1.0
        assert not lab.coordinator.publisher.lease.acquire(), "the server holds the lease"
        lab.coordinator.append(KeyRevoked(key_id="b"), "server")
        assert parse_checkpoint_note(lab.coordinator.publish()).tree_size == size + 1
    assert lab.coordinator.publisher.lease.acquire(), "and gives it back when it stops"


def test_witnesses_meet_on_one_checkpoint_while_the_log_grows(lab):
    app = create_app(lab.settings(publish_interval_s=0.1), clock=lab.clock)
    with TestClient(app, raise_server_exceptions=False) as client:
        met = client.get("/v1/audit/checkpoint?meeting=true").content
        placed = lab.coordinator.append(KeyRevoked(key_id="a"), "server")
        lab.coordinator.ledger.wait_checkpointed(placed.leaf_index, 5)
        assert size_of(client.get("/v1/audit/checkpoint")) > parse_checkpoint_note(met).tree_size
        assert client.get("/v1/audit/checkpoint?meeting=true").content == met


@pytest.mark.parametrize("value", ["maybe", "", "2"])
def test_meeting_that_is_no_truth_value_is_refused(client, value):
    assert client.get(f"/v1/audit/checkpoint?meeting={value}").status_code == 422
