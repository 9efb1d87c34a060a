"""The server publishes within a second under the one lease, and witnesses have one checkpoint to meet on."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from audit.checkpoints import add_signatures, cosign, parse_checkpoint_note
from audit.entries import KeyRevoked
from audit.keys import SigningKey
from audit.notes import KeyType, NoteSigner
from server.app import create_app
from server.errors import CheckpointLateError
from server.publishing import Backlog
from server.settings import Settings
from tests.waiting import took_at_best, wait_until


def size_of(reply) -> int:
    return parse_checkpoint_note(reply.content).tree_size


def test_default_interval_keeps_checkpoints_within_a_second():
    assert Settings().publish_interval_s <= 0.5


def test_entry_of_another_process_is_checkpointed_within_a_second(lab):
    app = create_app(lab.settings(publish_interval_s=0.2), clock=lab.clock)
    with TestClient(app, raise_server_exceptions=False) as client:

        def another() -> None:
            size = lab.coordinator.append(KeyRevoked(key_id="a"), "server").leaf_index + 1
            wait_until(lambda: size_of(client.get("/v1/audit/checkpoint")) >= size)

        assert took_at_best(another, 1.0) < 1.0
        size = lab.coordinator.ledger.tree_size
        assert not lab.coordinator.publisher.lease.acquire(), "the server holds the lease"
        lab.coordinator.append(KeyRevoked(key_id="b"), "server")
        assert parse_checkpoint_note(lab.coordinator.publish()).tree_size == size + 1
    assert lab.coordinator.publisher.lease.acquire(), "and gives it back when it stops"


def test_witnesses_meet_on_one_checkpoint_while_the_log_grows(lab):
    app = create_app(lab.settings(publish_interval_s=0.1), clock=lab.clock)
    with TestClient(app, raise_server_exceptions=False) as client:
        met = client.get("/v1/audit/checkpoint?meeting=true").content
        placed = lab.coordinator.append(KeyRevoked(key_id="a"), "server")
        lab.coordinator.ledger.wait_checkpointed(placed.leaf_index, 60)
        assert size_of(client.get("/v1/audit/checkpoint")) > parse_checkpoint_note(met).tree_size
        assert client.get("/v1/audit/checkpoint?meeting=true").content == met


def test_what_a_witness_has_just_cosigned_is_where_all_meet_whichever_worker_began_it(lab):
    """Workers share nothing but the log: each with a meeting of its own would split the witnesses."""
    key = NoteSigner("north", SigningKey.generate(), KeyType.COSIGNATURE)
    first = lab.coordinator.publish()
    lab.coordinator.append(KeyRevoked(key_id="a"), "server")
    now = int(lab.clock().timestamp())
    lab.coordinator.ledger.store_checkpoint(add_signatures(first, [cosign(first, key, now - 1)]))
    app = create_app(lab.settings(publish_interval_s=0.1), clock=lab.clock)
    with TestClient(app, raise_server_exceptions=False) as client:
        newest = lab.coordinator.ledger.tree_size
        wait_until(lambda: size_of(client.get("/v1/audit/checkpoint")) == newest)
        met = client.get("/v1/audit/checkpoint?meeting=true")
        assert size_of(met) == parse_checkpoint_note(first).tree_size < newest
        assert "\u2014 north " in met.text


def test_checkpoint_that_needs_no_witness_any_more_is_no_meeting(lab):
    """As after a run, whose last round all sites have just cosigned: no answer since then is in it."""
    first = lab.coordinator.publish()
    now = int(lab.clock().timestamp())
    alpha = NoteSigner("alpha", lab.site_witness, KeyType.COSIGNATURE)  # the one site that is enrolled
    lab.coordinator.ledger.store_checkpoint(add_signatures(first, [cosign(first, alpha, now - 1)]))
    app = create_app(lab.settings(publish_interval_s=3600), clock=lab.clock)
    with TestClient(app, raise_server_exceptions=False) as client:
        placed = lab.coordinator.append(KeyRevoked(key_id="a"), "server")
        assert size_of(client.get("/v1/audit/checkpoint?meeting=true")) == placed.leaf_index + 1


@pytest.mark.parametrize("ago_s", [6, 3600])
def test_meeting_that_is_over_is_not_begun_again_and_a_new_one_holds_all_that_is_durable(lab, ago_s):
    key = NoteSigner("north", SigningKey.generate(), KeyType.COSIGNATURE)
    first = lab.coordinator.publish()
    then = int(lab.clock().timestamp()) - ago_s
    lab.coordinator.ledger.store_checkpoint(add_signatures(first, [cosign(first, key, then)]))
    app = create_app(lab.settings(publish_interval_s=3600), clock=lab.clock)
    with TestClient(app, raise_server_exceptions=False) as client:
        placed = lab.coordinator.append(KeyRevoked(key_id="a"), "server")
        assert size_of(client.get("/v1/audit/checkpoint?meeting=true")) == placed.leaf_index + 1


@pytest.mark.parametrize("value", ["maybe", "", "2"])
def test_meeting_that_is_no_truth_value_is_refused(client, value):
    assert client.get(f"/v1/audit/checkpoint?meeting={value}").status_code == 422


# checkpoints that do not come


def test_backlog_counts_from_the_oldest_entry_that_waits():
    now = [100.0]
    backlog = Backlog(5.0, lambda: now[0])
    backlog.look(10, 10)
    assert backlog.problem() == ""
    backlog.look(10, 12)
    for now[0] in (102.0, 104.0):
        backlog.look(10, 900)  # what comes after does not make the older ones younger
    assert backlog.problem() == ""
    now[0] = 105.1
    assert "entry 11 waits" in backlog.problem()
    with pytest.raises(CheckpointLateError):
        backlog.facts(None, None, None)
    backlog.look(12, 900)  # those are covered: now the others wait, from here on
    assert backlog.problem() == ""
    now[0] = 110.2
    assert "entry 899 waits" in backlog.problem()
    backlog.look(900, 900)
    assert backlog.problem() == ""


def test_a_log_that_grows_under_a_signer_that_keeps_up_is_never_late():
    now = [0.0]
    backlog = Backlog(5.0, lambda: now[0])
    for step in range(100):
        now[0] = step * 1.0
        backlog.look(10 * step, 10 * step + 10)
        assert backlog.problem() == ""
