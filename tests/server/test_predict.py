"""Predictions: every answer has an entry and a receipt; what is refused says why and is an entry too."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from starlette.testclient import TestClient

from audit.commitments import commit, verify_opening
from audit.encoding import encode_row
from audit.entries import ZERO_DIGEST, MechanismEvent, RowCommitment, SiteStatement, SiteUndelivered
from audit.errors import LedgerBusyError, LedgerClosedError, LedgerWriteError
from audit.forward import forward
from audit.keys import SigningKey
from audit.merkle import hash_leaf
from audit.models import answer_of
from audit.notes import NoteVerifier
from audit.receipts import Receipt, verify_receipt
from audit.row_tree import RowPathError, verify_row
from server.app import create_app
from tests.server.conftest import charter

EVENT = MechanismEvent(
    mechanism="discrete_gaussian", sampling="full", sample_rate="1", steps=1, sigma_grid=8 << 20,
    sensitivity_grid=1 << 20, dimension=7, grid_bits=20, relation="add_remove", unit="row",
)  # fmt: skip
URL = "/v1/models/toy/predict"


def ask(client, headers, *rows, purpose="triage", url=URL, **more):
    return client.post(url, headers=headers, json={"purpose": purpose, "rows": list(rows), **more})


@pytest.mark.parametrize(("site", "index"), [(None, None), ("alpha", 0), ("beta", 1)])
def test_answer_is_recomputed_by_the_verifiers_own_definition(client, lab, as_role, row, site, index):
    answer = ask(client, as_role("consumer"), row, **({"site": site} if site else {})).json()
    charter = json.loads(lab.entries("charter.published")[0]["body"]["canonical"])
    plain = json.loads(answer["opened"][0]["input"])
    outputs = forward(lab.layers, lab.weights, encode_row(charter["features"], plain), index)
    expected = answer_of("binary", charter["label"], outputs)
    committed = json.loads(answer["opened"][0]["output"])
    assert {key: committed[key] for key in expected} == expected
    assert set(committed) == {*expected, "ood"}
    assert answer["answers"][0] == {**expected, "probability": float(expected["probability"])}


def test_answer_entry_names_what_decided_and_what_answered(client, lab, as_role, row):
    answer = ask(client, as_role("consumer"), row).json()
    (entry,) = lab.entries("prediction")
    body = entry["body"]
    assert entry["leaf_index"] == answer["entry"]["leaf_index"]
    assert body["version"] == answer["version"] == lab.version
    assert body["charter"] == lab.charter
    assert body["transition"] == lab.previous["toy"]
    assert body["policies"] == answer["decision"]["policies"] == ["consumers-may-predict"]
    assert body["request_id"] == answer["decision"]["id"]
    assert body["principal"].startswith("p-")
    assert not {"age", "51", "north"} & set(json.dumps(body).replace('"', " ").split())


def test_returned_salts_open_the_commitments_of_the_entry(client, lab, as_role, row):
    answer = ask(client, as_role("consumer"), row).json()
    (entry,) = lab.entries("prediction")
    for committed, opened in zip(entry["body"]["rows"], answer["opened"], strict=True):
        for field in ("input", "output"):
            salt = bytes.fromhex(opened[f"{field}_salt"])
            verify_opening(committed[field], field=field, salt=salt, value=opened[field].encode())


def test_each_of_many_rows_has_its_own_path_to_the_root_of_the_entry(client, lab, as_role, row):
    answer = ask(client, as_role("consumer"), *({**row, "age": age} for age in range(7))).json()
    body = lab.entries("prediction")[0]["body"]
    assert (body["rows"], body["row_count"]) == ([], 7)
    for number, opened in enumerate(answer["opened"]):
        commitments = {
            field: commit(field, bytes.fromhex(opened[f"{field}_salt"]), opened[field].encode())
            for field in ("input", "output")
        }
        assert opened["row"] == str(number)
        verify_row(RowCommitment(**commitments), number, 7, opened["path"], body["rows_root"])
        with pytest.raises(RowPathError):
            verify_row(RowCommitment(**commitments), (number + 1) % 7, 7, opened["path"], body["rows_root"])


def test_equal_rows_have_unlike_commitments(client, lab, as_role, row):
    first, second = ask(client, as_role("consumer"), row, row).json()["opened"]
    assert first["input"] == second["input"]
    assert first["input_salt"] != second["input_salt"]
    ask(client, as_role("consumer"), row)
    ask(client, as_role("consumer"), row)
    third, fourth = (entry["body"]["rows"][0] for entry in lab.entries("prediction")[1:])
    assert third["input"] != fourth["input"]
    assert third["output"] != fourth["output"]


def test_receipt_is_the_logs_own_promise_about_this_leaf(client, lab, as_role, row):
    answer = ask(client, as_role("consumer"), row).json()
    receipt = Receipt.parse(json.dumps(answer["receipt"]).encode())
    verify_receipt(receipt, NoteVerifier.parse(lab.coordinator.log_key))
    leaf = lab.coordinator.ledger.entry(answer["entry"]["leaf_index"])
    assert receipt.leaf_hash == hash_leaf(leaf)
    assert receipt.leaf_index == answer["entry"]["leaf_index"]


def test_every_concurrent_answer_has_its_own_entry_and_receipt(lab, as_role, row):
    answers, failures = [], []
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:

        def work() -> None:
            for _ in range(5):
                reply = ask(client, as_role("consumer"), row)
                (answers if reply.status_code == 200 else failures).append(reply.json())

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    verifier = NoteVerifier.parse(lab.coordinator.log_key)
    receipts = [Receipt.parse(json.dumps(answer["receipt"]).encode()) for answer in answers]
    for receipt in receipts:
        verify_receipt(receipt, verifier)
    entries = {entry["leaf_index"] for entry in lab.entries("prediction")}
    assert len(answers) == len(entries) == 30
    assert {receipt.leaf_index for receipt in receipts} == entries


def test_wrong_purpose_is_refused_by_name_and_logged(client, lab, as_role, row):
    reply = ask(client, as_role("consumer"), row, purpose="marketing")
    problem = reply.json()
    (entry,) = lab.entries("prediction.denied")
    assert reply.status_code == 403
    assert reply.headers["content-type"] == "application/problem+json"
    assert problem["code"] == "predict.denied"
    assert problem["policies"] == entry["body"]["policies"] == ["purpose-outside-charter"]
    assert problem["entry"]["leaf_index"] == entry["leaf_index"]
    assert lab.entries("prediction") == []


@pytest.mark.parametrize("role", ["node", "officer", "scientist", "operator"])
def test_only_consumers_predict(client, lab, as_role, row, role):
    problem = ask(client, as_role(role), row).json()
    assert problem["code"] == "predict.denied"
    assert problem["policies"] == ["default-deny"]
    assert lab.entries("prediction.denied")[0]["body"]["role"] == role


def test_unknown_model_is_not_found(client, lab, as_role, row):
    reply = ask(client, as_role("consumer"), row, url="/v1/models/other/predict")
    assert (reply.status_code, reply.json()["code"]) == (404, "models.not_found")


def test_unknown_version_is_not_found(client, as_role, row):
    reply = ask(client, as_role("consumer"), row, version="0" * 64)
    assert (reply.status_code, reply.json()["code"]) == (404, "models.version_not_found")


def test_unapproved_version_never_answers(client, lab, as_role, row):
    candidate = lab.register(lab.charter, weights=[9.0] * 7)
    problem = ask(client, as_role("consumer"), row, version=candidate).json()
    assert problem["policies"] == ["version-not-live"]
    assert ask(client, as_role("consumer"), row).json()["version"] == lab.version


def test_model_without_a_live_version_is_refused(client, lab, as_role, row):
    digest = lab.publish_charter(name="young")
    lab.register(digest, model="young")
    problem = ask(client, as_role("consumer"), row, url="/v1/models/young/predict").json()
    assert problem["policies"] == ["version-not-live"]


def test_retired_version_stops_answering_at_the_next_request(client, lab, as_role, row):
    assert ask(client, as_role("consumer"), row).status_code == 200
    lab.move(lab.version, lab.charter, "live", "retired")
    assert ask(client, as_role("consumer"), row).json()["policies"] == ["version-not-live"]


def test_forged_approval_in_the_database_does_not_count(client, lab, as_role, row):
    candidate = lab.register(lab.charter, weights=[9.0] * 7)
    lab.move(candidate, lab.charter, "candidate", "approved", forge=True)
    lab.move(candidate, lab.charter, "approved", "live", forge=True)
    assert ask(client, as_role("consumer"), row, version=candidate).status_code == 403
    assert ask(client, as_role("consumer"), row).json()["version"] == lab.version


def test_approval_by_a_stranger_to_the_charter_does_not_count(client, lab, as_role, row):
    candidate = lab.register(lab.charter, weights=[9.0] * 7)
    lab.move(candidate, lab.charter, "candidate", "approved", key=SigningKey.generate())
    assert (
        client.get("/v1/models/toy", headers=as_role("officer")).json()["versions"][0]["state"] == "candidate"
    )


def test_approval_replayed_out_of_its_chain_does_not_count(client, lab, as_role):
    candidate = lab.register(lab.charter, weights=[9.0] * 7)
    lab.previous["toy"] = "1" * 64
    lab.move(candidate, lab.charter, "candidate", "approved")
    assert (
        client.get("/v1/models/toy", headers=as_role("officer")).json()["versions"][0]["state"] == "candidate"
    )


def test_epsilon_over_the_charter_is_refused(client, lab, as_role, row):
    digest = lab.publish_charter(name="spent")
    version = lab.register(digest, model="spent", epsilon="3.0001")
    lab.move(version, digest, "candidate", "approved", model="spent")
    lab.move(version, digest, "approved", "live", model="spent")
    problem = ask(client, as_role("consumer"), row, url="/v1/models/spent/predict").json()
    assert problem["policies"] == ["epsilon-over-charter"]


def spent_by(lab, **told):
    """A live model whose registration tells its costs so."""
    digest = lab.publish_charter(name="spent")
    version = lab.register(digest, model="spent", **told)
    lab.move(version, digest, "candidate", "approved", model="spent")
    lab.move(version, digest, "approved", "live", model="spent")
    return digest


@pytest.mark.parametrize("counted", [(), ("alpha",), ("alpha", "alpha"), ("alpha", "gamma")], ids=str)
def test_a_version_that_lacks_figures_counts_as_over_the_charter(client, lab, as_role, row, counted):
    spent_by(lab, counted=counted)
    for role in ("consumer", "tester"):
        reply = ask(client, as_role(role), row, url="/v1/models/spent/predict")
        assert reply.status_code == 403
        assert reply.json()["policies"] == ["epsilon-over-charter"]


@pytest.mark.parametrize("undelivered", [False, True])
@pytest.mark.parametrize("released", [False, True])
def test_a_site_without_a_figure_must_have_released_nothing(
    client, lab, as_role, row, released, undelivered
):  # fmt: skip
    plan = charter([], "")["plan"] | {"minimum_sites": 1}
    digest = lab.publish_charter(name="spent", plan=plan)
    for site in ("alpha", *(("beta",) if released else ())):
        statement = SiteStatement(
            run="run-1", round=1, charter=digest, site=site, population="ab" * 16, base_model=ZERO_DIGEST,
            participants=("alpha", "beta"), agent_code=ZERO_DIGEST, previous_round=ZERO_DIGEST, event=EVENT,
            sequence=1, previous_event=ZERO_DIGEST, update=ZERO_DIGEST, signature="",
        )  # fmt: skip
        lab.coordinator.append(SiteUndelivered(statement=statement) if undelivered else statement, "site")
    version = lab.register(digest, model="spent", counted=("alpha",))
    lab.move(version, digest, "candidate", "approved", model="spent")
    lab.move(version, digest, "approved", "live", model="spent")
    reply = ask(client, as_role("consumer"), row, url="/v1/models/spent/predict")
    assert reply.status_code == (403 if released else 200)
    if released:
        assert reply.json()["policies"] == ["epsilon-over-charter"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"age": 121}, "age"),
        ({"age": -1}, "age"),
        ({"age": 51.5}, "age"),
        ({"age": "fifty"}, "age"),
        ({"age": True}, "age"),
        ({"age": None}, "age"),
        ({"ward": "east"}, "ward"),
        ({"ward": ""}, "ward"),
        ({"fever": "perhaps"}, "fever"),
        ({"shoe_size": 44}, "shoe_size"),
    ],
)
def test_row_outside_the_contract_names_the_field_and_gets_no_entry(client, lab, as_role, row, change, field):
    reply = ask(client, as_role("consumer"), row, {**row, **change})
    problem = reply.json()
    assert (reply.status_code, problem["code"]) == (422, "predict.row_outside_contract")
    assert [(found["row"], found["field"]) for found in problem["fields"]] == [(1, field)]
    assert lab.entries("prediction") == []


def test_missing_column_names_the_field(client, as_role, row):
    del row["ward"]
    assert ask(client, as_role("consumer"), row).json()["fields"][0]["field"] == "ward"


def test_unknown_site_is_named(client, lab, as_role, row):
    reply = ask(client, as_role("consumer"), row, site="gamma")
    assert (reply.status_code, reply.json()["fields"][0]["field"]) == (422, "site")
    assert lab.entries("prediction") == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"purpose":"triage"}',
        b'{"purpose":"triage","rows":[]}',
        b'{"purpose":"triage","rows":[[1,2]]}',
        b'{"purpose":"triage","rows":[{"age":{"deep":1}}]}',
        b'{"purpose":"triage","purpose":"audit-trial","rows":[{"age":1}]}',
        b'{"purpose":"triage","rows":[{"age":1,"age":2}]}',
        b'{"purpose":"triage","rows":[{"age":NaN}]}',
        b'{"purpose":"triage","rows":[{"age":Infinity}]}',
        b'{"purpose":"triage","rows":[{"age":1e999}]}',
        b'{"purpose":7,"rows":[{"age":1}]}',
        b'{"purpose":"Triage; DROP","rows":[{"age":1}]}',
        b'{"purpose":"triage","rows":[{"age":1}],"admin":true}',
        b'{"purpose":"triage","rows":[{"age":1}],"version":"latest"}',
        b'{"purpose":"triage","rows":[{"age":"\\ud800"}]}',
        b'{"purpose":"triage","rows":[{"age":1}]} trailing',
        b"\xff\xfe{}",
        b"[" * 5000,
    ],
    ids=lambda body: repr(body[:44]),
)
def test_malformed_body_is_refused_by_code_and_not_logged(client, lab, as_role, body):
    before = lab.coordinator.ledger.tree_size
    reply = client.post(URL, headers=as_role("consumer"), content=body)
    assert (reply.status_code, reply.json()["code"]) == (422, "request.malformed")
    assert lab.coordinator.ledger.tree_size == before


def test_more_rows_than_an_entry_can_hold_are_refused(client, lab, as_role, row):
    reply = ask(client, as_role("consumer"), *[row] * 1025)
    assert (reply.status_code, reply.json()["code"]) == (422, "request.malformed")
    assert lab.entries("prediction") == []


def test_many_rows_are_answered_in_order(client, lab, as_role, row):
    rows = [{**row, "age": age} for age in range(120)]
    answers = ask(client, as_role("consumer"), *rows).json()["answers"]
    chances = [answer["probability"] for answer in answers]
    assert len(chances) == 120
    assert chances == sorted(chances)


@pytest.mark.parametrize(
    "error",
    [
        LedgerWriteError("disk full"),
        LedgerClosedError("closed"),
        LedgerBusyError(retry_after_s=1, pending=9),
        OSError(5, "io"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_without_a_durable_entry_there_is_no_answer(client, lab, as_role, row, error):
    context = client.app.state.context
    real = context.coordinator.ledger

    class Broken:
        def append_from_loop(self, *_: object, **__: object) -> None:
            raise error

    context.journal._ledger = Broken()
    reply = ask(client, as_role("consumer"), row)
    assert (reply.status_code, reply.json()["code"]) == (503, "audit.ledger_unavailable")
    assert "answers" not in reply.text
    assert reply.headers["retry-after"]
    context.journal._ledger = real
    assert lab.entries("prediction") == []
    assert ask(client, as_role("consumer"), row).status_code == 200


def test_entry_that_never_becomes_durable_means_no_answer(lab, as_role, row):
    class Silent:
        def append_from_loop(self, *_: object, **__: object):
            return asyncio.get_running_loop().create_future()

    settings = lab.settings(request_timeout_s=0.4)
    with TestClient(create_app(settings, clock=lab.clock), raise_server_exceptions=False) as client:
        client.app.state.context.journal._ledger = Silent()
        reply = ask(client, as_role("consumer"), row)
    assert reply.status_code == 503
    assert "answers" not in reply.text


def test_denial_that_cannot_be_logged_is_still_no_answer(client, as_role, row):
    class Broken:
        def append_from_loop(self, *_: object, **__: object) -> None:
            raise LedgerWriteError("disk full")

    client.app.state.context.journal._ledger = Broken()
    assert ask(client, as_role("consumer"), row, purpose="marketing").status_code == 503


@pytest.mark.parametrize("damage", ["gone", "altered", "other"])
def test_swapped_model_file_stops_the_answers(lab, as_role, row, damage):
    blobs = lab.coordinator.blobs
    path = blobs.folder / lab.version[:2] / lab.version
    if damage == "gone":
        path.unlink()
    elif damage == "altered":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    else:
        path.write_bytes(b"another model")
    with TestClient(create_app(lab.settings(), clock=lab.clock), raise_server_exceptions=False) as client:
        reply = ask(client, as_role("consumer"), row)
    assert (reply.status_code, reply.json()["code"]) == (503, "models.artefact_unusable")
    assert lab.entries("prediction") == []


def test_file_swapped_under_a_running_server_changes_no_answer(client, lab, as_role, row):
    before = ask(client, as_role("consumer"), row).json()["answers"]
    (lab.coordinator.blobs.folder / lab.version[:2] / lab.version).write_bytes(b"another model")
    assert ask(client, as_role("consumer"), row).json()["answers"] == before


def test_receipts_asked_for_together_share_one_signature(lab):
    from server.receipting import Receipting

    async def gather() -> list[dict]:
        receipting = Receipting(lab.coordinator.signer, lab.clock, merge_delay_s=60)
        ledger = lab.coordinator.ledger
        sequenced = [ledger.stored_entry(index) for index in range(5)]
        return await asyncio.gather(*[receipting.receipt(item) for item in sequenced])

    receipts = asyncio.run(gather())
    assert len({receipt["signature"] for receipt in receipts}) == 1
    assert [receipt["batch_index"] for receipt in receipts] == [0, 1, 2, 3, 4]
    for receipt in receipts:
        verify_receipt(
            Receipt.parse(json.dumps(receipt).encode()), NoteVerifier.parse(lab.coordinator.log_key)
        )
