"""Witnesses of a running server: it offers them what it signs, and callers may wait until they cosigned."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from audit.checkpoints import add_signatures, cosign, parse_checkpoint_note
from audit.entries import KeyRevoked
from audit.errors import SignerRewriteError, WitnessesUnreachableError
from audit.notes import KeyType, NoteSigner
from audit.tlog_policy import Policy
from audit.tlog_proof import TlogProof, verify_tlog_proof
from audit.witness import Witness
from clients.witness_server import WitnessServer
from server.app import create_app
from server.watching import MAX_WAIT_S, Watching
from tests.commands.conftest import run_command
from tests.http_witness import answering, witnessing
from tests.waiting import LeapingLoop, wait_until

PREDICT = {"purpose": "triage", "rows": [{"age": 51, "fever": True, "ward": "north"}]}


def app_of(lab, **settings):
    changed = {"publish_interval_s": 0.1, "request_timeout_s": 60, **settings}
    return TestClient(
        create_app(lab.settings(**changed), clock=lab.clock), raise_server_exceptions=False,
        backend_options={"loop_factory": LeapingLoop},
    )  # fmt: skip


def out_of_patience(lab, client, watching):
    """Begin to move the server's time on once somebody waits for witnesses of a checkpoint that is there."""

    def waits() -> bool:
        note = lab.coordinator.ledger.latest_checkpoint()
        size = 0 if note is None else parse_checkpoint_note(note).tree_size
        return any(
            waiter.level == "witnessed" and waiter.leaf_index < size for waiter in [*watching._waiting]
        )

    loop = client.portal.call(asyncio.get_running_loop)
    thread = threading.Thread(target=lambda: wait_until(waits) and loop.leap(MAX_WAIT_S + 1))
    thread.start()
    return thread


@pytest.fixture
def key(lab):
    return NoteSigner("alpha", lab.site_witness, KeyType.COSIGNATURE)


def write_policy(lab, key, url):
    text = f"log {lab.coordinator.log_key}\nwitness alpha {key.vkey} {url}\nquorum alpha\n"
    (lab.folder / "coordinator" / "policy.txt").write_text(text)
    return Policy.parse(text)


@pytest.fixture
def watched(lab, key, tmp_path):
    """The lab, whose coordinator's policy names a real witness of site alpha."""
    site = WitnessServer(
        Witness.create(tmp_path / "w.json", key, lab.coordinator.log_key), tmp_path,
        now=lambda: int(lab.clock.now().timestamp()),
    )  # fmt: skip
    with witnessing(site) as url:
        yield SimpleNamespace(policy=write_policy(lab, key, url), site=site)


def test_answer_waits_until_witnesses_have_cosigned_its_entry(lab, watched, as_role):
    with app_of(lab) as client:
        headers = as_role("consumer")
        for level in ("witnessed", "checkpointed"):
            answer = client.post(f"/v1/models/toy/predict?wait={level}", headers=headers, json=PREDICT)
            document = answer.json()
            assert (answer.status_code, document["level"]) == (200, level)
            proof = TlogProof.parse(document["proof"].encode())
            found = verify_tlog_proof(
                proof, leaf_hash=bytes.fromhex(document["entry"]["leaf_hash"]), policy=watched.policy,
                now=int(lab.clock.now().timestamp()),
            )  # fmt: skip
            assert found.quorum.satisfied or level == "checkpointed"
            assert proof.leaf_index == document["receipt"]["leaf_index"]
        index = document["receipt"]["leaf_index"]
        shown = client.get(f"/v1/audit/entries/{index}/proof.tlog-proof?wait=witnessed", headers=headers)
        note = TlogProof.parse(shown.content).checkpoint_note
        assert watched.policy.open(note, now=int(lab.clock.now().timestamp())).quorum.satisfied


def test_silent_witness_costs_the_level_and_never_the_answer(lab, key, as_role):
    with answering(lambda *_: (404, b"")) as url:
        write_policy(lab, key, url)
        with app_of(lab) as client:
            headers, watching = as_role("consumer"), client.app.state.context.watching
            leaping = out_of_patience(lab, client, watching)
            answer = client.post(
                "/v1/models/toy/predict?wait=witnessed", headers=headers, json=PREDICT
            ).json()
            assert answer["level"] == "checkpointed"
            leaping.join()
            index = answer["receipt"]["leaf_index"]
            leaping = out_of_patience(lab, client, watching)
            late = client.get(f"/v1/audit/entries/{index}/proof?wait=witnessed", headers=headers)
            assert (late.status_code, late.json()["code"]) == (503, "audit.not_yet")
            assert late.headers["retry-after"]
            leaping.join()
            other = {"Authorization": f"Bearer {lab.key('consumer')}"}
            waits, wait = [], watching.wait
            watching.wait = lambda *asked: waits.append(asked) or wait(*asked)
            denied = client.get(f"/v1/audit/entries/{index}/proof?wait=witnessed", headers=other)
            assert (denied.status_code, waits) == (403, []), "nobody waits for a no"


def test_without_waiting_the_answer_is_sequenced_and_brings_no_proof(client, as_role):
    answer = client.post("/v1/models/toy/predict", headers=as_role("consumer"), json=PREDICT).json()
    assert (answer["level"], answer["proof"]) == ("sequenced", None)


@pytest.mark.parametrize("value", ["", "cosigned", "WITNESSED"])
def test_unknown_level_is_refused_before_anything_is_written(client, lab, as_role, value):
    size = lab.coordinator.ledger.tree_size
    headers = as_role("consumer")
    answer = client.post(f"/v1/models/toy/predict?wait={value}", headers=headers, json=PREDICT)
    assert (answer.status_code, lab.coordinator.ledger.tree_size) == (422, size)


def test_many_callers_share_one_look_at_the_database(lab, key):
    placed = [lab.coordinator.append(KeyRevoked(key_id=str(n)), "server").leaf_index for n in range(3)]
    note = lab.coordinator.publish()
    lab.coordinator.ledger.store_checkpoint(add_signatures(note, [cosign(note, key, 1_000)]))
    looks = []

    async def ask() -> list[bytes | None]:
        watching = Watching(lab.coordinator, lab.clock)
        find = watching._find
        watching._find = lambda *asked: looks.append(asked) or find(*asked)
        waiting = [watching.wait(placed[n % 3], "witnessed", 60) for n in range(300)]
        found = await asyncio.gather(*waiting, watching.wait(10_000, "checkpointed", 0.2))
        await watching.stop()
        return found

    *found, never = asyncio.run(ask())
    assert all(found)
    assert never is None
    assert len(looks) < 20


def test_server_whose_witness_saw_another_history_does_not_start(lab, key, tmp_path):
    """A receipt from it would be a promise that the log already broke."""
    import shutil

    shutil.copytree(lab.folder, tmp_path / "ahead")
    config = tmp_path / "ahead" / "coordinator" / "config.yaml"
    config.write_text(f"origin: tests.example/server\nsigner_home: {tmp_path}/ahead/signer\n")
    from federation.coordinator import Coordinator

    lab.coordinator.publish()
    with Coordinator.open(tmp_path / "ahead" / "coordinator") as ahead:
        for number in range(9):
            ahead.append(KeyRevoked(key_id=f"ahead {number}"), "server")
        seen = ahead.publish()
    for number in range(12):
        lab.coordinator.append(KeyRevoked(key_id=f"here {number}"), "server")
    with answering(lambda *_: (200, seen)) as url:
        write_policy(lab, key, url)
        with pytest.raises(SignerRewriteError), app_of(lab):
            pass
    with pytest.raises(WitnessesUnreachableError), app_of(lab):
        pass
    said = run_command("serve", "--home", lab.folder, "--port", "0", "--json")
    assert (said.code, said.json["error"]["code"]) == (1, "audit.witnesses_unreachable")
    told = [line for line in said.err.splitlines() if not line.startswith("{")]  # the log's lines apart
    assert len(told) == 1


def test_policy_is_shown_to_anybody_with_operators_as_groups(client, lab):
    shown = client.get("/v1/audit/policy")
    assert shown.headers["content-type"] == "text/plain; charset=utf-8"
    policy = Policy.parse(shown.text)
    assert [log.verifier.vkey for log in policy.logs] == [lab.coordinator.log_key]
    assert [witness.name for witness in policy.witnesses] == ["alpha"]
    lab.coordinator.rotate_log_key(50)
    keys = [log.verifier.vkey for log in Policy.parse(client.get("/v1/audit/policy").text).logs]
    assert keys == [lab.coordinator.log_key, policy.logs[0].verifier.vkey], "the new key first"
