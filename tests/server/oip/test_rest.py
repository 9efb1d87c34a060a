"""The protocol's REST routes: one use case behind both doors, its errors in the protocol's own form."""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from audit.merkle import hash_leaf
from audit.notes import NoteVerifier
from audit.receipts import Receipt, verify_receipt
from server.app import create_app
from server.guard import Guard
from server.hooks import Annotation

URL = "/v2/models/toy/infer"


def ask(**changed):
    inputs = [
        {"name": "age", "shape": [1], "datatype": "INT64", "data": [51]},
        {"name": "fever", "shape": [1], "datatype": "BOOL", "data": [True]},
        {"name": "ward", "shape": [1], "datatype": "BYTES", "data": ["north"]},
    ]
    return {"id": "42", "inputs": inputs, "parameters": {"purpose": "triage"}, **changed}


def test_both_doors_give_one_answer(client, lab, as_role, row):
    headers = as_role("consumer")
    inferred = client.post(URL, headers=headers, json=ask()).json()
    predicted = client.post(
        "/v1/models/toy/predict", headers=headers, json={"purpose": "triage", "rows": [row]}
    ).json()
    outputs = {output["name"]: output["data"] for output in inferred["outputs"]}
    assert outputs["label"] == [predicted["answers"][0]["label"]]
    assert outputs["probability"] == [predicted["answers"][0]["probability"]]
    assert (inferred["id"], inferred["model_name"]) == ("42", "toy")
    assert inferred["model_version"] == inferred["parameters"]["model_digest"] == lab.version
    first, second = (entry["body"] for entry in lab.entries("prediction"))
    assert set(first) == set(second)
    opened = json.loads(inferred["parameters"]["opened"])[0]
    assert opened["input"] == predicted["opened"][0]["input"]


def test_answer_names_its_entry_and_brings_its_receipt(client, lab, as_role):
    shown = client.post(URL, headers=as_role("consumer"), json=ask()).json()["parameters"]
    (entry,) = lab.entries("prediction")
    assert shown["leaf_index"] == entry["leaf_index"]
    assert shown["decision_id"] == entry["body"]["request_id"]
    assert shown["leaf_hash"] == hash_leaf(lab.coordinator.ledger.entry(entry["leaf_index"])).hex()
    receipt = Receipt.parse(shown["receipt"].encode())
    verify_receipt(receipt, NoteVerifier.parse(lab.coordinator.log_key))
    assert receipt.leaf_index == shown["leaf_index"]


def test_many_rows_have_one_entry(client, lab, as_role):
    inputs = [
        {"name": "age", "shape": [40], "datatype": "INT64", "data": list(range(40))},
        {"name": "ward", "shape": [40, 1], "datatype": "BYTES", "data": [["north"], ["south"]] * 20},
    ]
    reply = client.post(URL, headers=as_role("consumer"), json=ask(inputs=inputs)).json()
    (entry,) = lab.entries("prediction")
    assert entry["body"]["row_count"] == 40
    assert [output["shape"] for output in reply["outputs"]] == [[40], [40]]
    assert len(json.loads(reply["parameters"]["opened"])) == 40


def test_purpose_may_stand_in_a_header(client, as_role):
    body = ask(parameters={})
    assert client.post(URL, headers=as_role("consumer"), json=body).status_code == 422
    headers = {**as_role("consumer"), "Affidavit-Purpose": "triage"}
    assert client.post(URL, headers=headers, json=body).status_code == 200


def test_chosen_outputs_alone_come_back(client, as_role):
    reply = client.post(URL, headers=as_role("consumer"), json=ask(outputs=[{"name": "label"}])).json()
    assert [output["name"] for output in reply["outputs"]] == ["label"]


@pytest.mark.parametrize("version", ["live", "DIGEST"])
def test_path_may_name_the_version(client, lab, as_role, version):
    version = version.replace("DIGEST", lab.version)
    reply = client.post(f"/v2/models/toy/versions/{version}/infer", headers=as_role("consumer"), json=ask())
    assert reply.json()["model_version"] == lab.version


def test_metadata_names_what_goes_in_and_out(client, lab, as_role):
    document = client.get("/v2/models/toy", headers=as_role("consumer")).json()
    assert document["versions"] == [lab.version]
    assert {item["name"]: item["datatype"] for item in document["inputs"]} == {
        "age": "INT64", "fever": "BOOL", "ward": "BYTES"
    }  # fmt: skip
    assert [item["name"] for item in document["outputs"]] == ["label", "probability"]
    assert json.loads(document["properties"]["purposes"]) == ["audit-trial", "triage"]


def test_health_needs_no_key_and_says_both_words(client):
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"live": True, "ready": True}
    assert client.get("/v2").json()["name"] == client.get("/v2/").json()["name"] == "affidavit"
    assert client.get("/readyz").json() == {"status": "ready"}


def test_candidate_is_not_ready_and_answers_nobody(client, lab, as_role):
    candidate = lab.register(lab.charter, weights=[9.0] * 7)
    for version in (candidate, "candidate"):
        path = f"/v2/models/toy/versions/{version}"
        assert client.get(f"{path}/ready", headers=as_role("consumer")).status_code == 503
        reply = client.post(f"{path}/infer", headers=as_role("consumer"), json=ask())
        assert reply.status_code == 403
        assert int(reply.headers["affidavit-entry"]) == lab.entries("prediction.denied")[-1]["leaf_index"]
    assert client.get("/v2/models/toy/ready", headers=as_role("consumer")).json()["ready"] is True


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"),
    [
        ("GET", "/v2/nothing", {}, 404, "request.no_such_route"),
        ("GET", "/v2/models/toy/infer", {}, 405, "request.method_not_allowed"),
        ("POST", URL, {}, 401, "access.unauthenticated"),
        ("POST", URL, "consumer", 422, "request.malformed"),
        ("POST", "/v2/models/other/infer", "consumer", 404, "models.not_found"),
        ("GET", "/v2/models/" + "x" * 81, "consumer", 422, "request.malformed"),
        ("GET", "/v2/models/Toy!", "consumer", 422, "request.malformed"),
        ("GET", "/v2/models/toy/versions/1", "consumer", 422, "request.malformed"),
        ("GET", "/v2/models/toy/versions/" + "0" * 64, "consumer", 404, "models.version_not_found"),
        ("POST", URL, "officer", 403, "predict.denied"),
    ],
)
def test_errors_have_the_protocols_form(client, as_role, method, path, headers, status, code):
    body = {"json": ask()} if headers == "officer" else {"content": b"{}"}
    if method == "GET":
        body = {}
    reply = client.request(method, path, headers=as_role(headers) if headers else {}, **body)
    if path == "/v2/models/other/infer":
        reply = client.post(path, headers=as_role("consumer"), json=ask())
    assert (reply.status_code, reply.headers["affidavit-code"]) == (status, code)
    assert list(reply.json()) == ["error"]
    assert reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"purpose": 5}},
        {"parameters": {"purpose": "triage", "site": "NOT A SITE"}},
        {"parameters": {"purpose": "triage", "subject": "x" * 257}},
        {"parameters": {"purpose": "triage", "unknown": True}},
        {"parameters": {"purpose": "triage", "wait": "never"}},
        {"parameters": {"purpose": "triage", "wait": ""}},
        {"parameters": {"purpose": ""}},
        {"parameters": {"purpose": "triage", "subject": ""}},
        {"parameters": {"purpose": "triage", "site": ""}},
        {"parameters": {"purpose": "triage", "consent": ""}},
        {"parameters": {"purpose": "triage", "legal_basis": ""}},
        {"parameters": {"purpose": "triage", "subject": None}},
        {"parameters": {"purpose": "triage", "timeout": -1}},
        {"parameters": {"purpose": "triage", "timeout": True}},
        {"parameters": {"purpose": "triage", "timeout": "5"}},
        {"parameters": {"purpose": "triage", "priority": "high"}},
        {"parameters": {"purpose": "triage", "sequence_start": 1}},
        {"outputs": [{"name": "secret"}]},
        {"outputs": [{"name": "label", "parameters": {"classification": 1}}]},
        {"model_name": "another"},
        {"model_version": "0" * 64},
    ],
)
def test_parameters_that_mean_nothing_are_refused(client, lab, as_role, change):
    reply = client.post(URL, headers=as_role("consumer"), json=ask(**change))
    assert reply.status_code == 422
    assert list(reply.json()) == ["error"]
    assert lab.entries("prediction") == []


def test_compressed_request_and_answer(client, as_role):
    body = gzip.compress(json.dumps(ask()).encode())
    headers = {**as_role("consumer"), "Content-Encoding": "gzip", "Accept-Encoding": "gzip"}
    reply = client.post(URL, headers=headers, content=body)
    assert reply.headers["content-encoding"] == "gzip"
    assert reply.json()["id"] == "42"


def test_bomb_is_refused_before_it_is_unpacked(lab, as_role):
    with TestClient(create_app(lab.settings(max_body_bytes=4096), clock=lab.clock)) as client:
        headers = {**as_role("consumer"), "Content-Encoding": "gzip"}
        reply = client.post(URL, headers=headers, content=gzip.compress(b" " * 3_000_000))
        assert (reply.status_code, reply.headers["affidavit-code"]) == (413, "request.too_large")


def test_waiting_brings_the_proof(lab, as_role):
    with TestClient(create_app(lab.settings(publish_interval_s=0.05), clock=lab.clock)) as client:
        body = ask(parameters={"purpose": "triage", "wait": "checkpointed"})
        shown = client.post(URL, headers=as_role("consumer"), json=body).json()["parameters"]
        assert shown["level"] == "checkpointed"
        assert shown["proof"].startswith("c2sp.org/tlog-proof")


def test_an_empty_purpose_is_refused_though_the_header_names_one(client, lab, as_role):
    headers = {**as_role("consumer"), "Affidavit-Purpose": "triage"}
    reply = client.post(URL, headers=headers, json=ask(parameters={"purpose": ""}))
    assert (reply.status_code, reply.json()["error"]) == (
        422, "parameters.purpose: is empty; give it, or leave it out",
    )  # fmt: skip
    assert lab.entries("prediction") == []


def test_columns_in_place_of_rows_get_no_answer(client, lab, as_role):
    inputs = [{"name": "age", "shape": [2, 1], "datatype": "INT64", "data": [[51, 52]]}]
    reply = client.post(URL, headers=as_role("consumer"), json=ask(inputs=inputs))
    assert reply.status_code == 422
    assert reply.json()["error"].startswith("age: data: level 0 has 1 items, where shape [2, 1] says 2")
    assert lab.entries("prediction") == []


def test_the_bodys_own_names_may_repeat_the_paths(client, lab, as_role):
    path = f"/v2/models/toy/versions/{lab.version}/infer"
    named = ask(model_name="toy", model_version=lab.version)
    assert client.post(path, headers=as_role("consumer"), json=named).status_code == 200
    for names in ({"model_name": "toy"}, {"model_name": None, "model_version": None}, {"model_version": ""}):
        assert client.post(URL, headers=as_role("consumer"), json=ask(**names)).status_code == 200
    reply = client.post(URL, headers=as_role("consumer"), json=named)
    assert (reply.status_code, reply.json()["error"][:13]) == (422, "model_version")


def test_what_other_servers_schedule_by_is_taken_and_changes_nothing(client, as_role):
    more = {"priority": 1, "sequence_id": 5, "sequence_start": True, "sequence_end": False, "timeout": 0}
    reply = client.post(URL, headers=as_role("consumer"), json=ask(parameters={"purpose": "triage", **more}))
    assert reply.status_code == 200


def held(client, gate):
    """Keep each answer back until the gate opens."""
    predicting = client.app.state.context.predicting

    class Held:
        async def annotate(self, answering):
            await gate.wait()
            return Annotation()

    predicting.hooks = replace(predicting.hooks, annotators=(Held(),))


@pytest.mark.parametrize("query", ["", "?as=a-stranger"])
def test_timeout_of_the_protocols_clients_ends_the_request(client, as_role, query):
    """The gate never opens: only the caller's own limit, in microseconds, ends it."""
    held(client, asyncio.Event())
    body = ask(parameters={"purpose": "triage", "timeout": 1})
    reply = client.post(URL + query, headers=as_role("consumer"), json=body)
    assert (reply.status_code, reply.headers["affidavit-code"]) == (504, "request.deadline")
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("microseconds", "seconds"), [(2**53 - 1, [30.0]), (2_500_000, [2.5]), (1, [1e-6]), (0, [])]
)
def test_timeout_is_in_microseconds_and_no_longer_than_the_servers(
    client, as_role, microseconds, seconds, monkeypatch
):
    seen = []
    monkeypatch.setattr("server.deadlines.OwnLimit.set", lambda _, seconds: seen.append(seconds))
    body = ask(parameters={"purpose": "triage", "timeout": microseconds})
    assert client.post(URL, headers=as_role("consumer"), json=body).status_code == 200
    assert seen == seconds


@pytest.mark.parametrize(
    ("path", "wait", "told"),
    [
        (URL, None, False), (URL, "sequenced", False), (URL, "checkpointed", True),
        (URL + "?as=a-stranger", "checkpointed", True),
        ("/v1/models/toy/predict", None, False), ("/v1/models/toy/predict?wait=checkpointed", None, True),
        ("/v1/models/toy/predict?wait=sequenced", None, False),
    ],
)  # fmt: skip
def test_waiting_for_a_proof_says_nothing_about_load(lab, as_role, row, path, wait, told):
    """Every answer here is later than it should be; those that waited by their own wish lower no limit."""
    settings = lab.settings(publish_interval_s=0.02, shed_latency_s=1e-9)
    with TestClient(create_app(settings, clock=lab.clock)) as client:
        shedder = shedder_of(client.app)
        body = ask(parameters={"purpose": "triage", **({"wait": wait} if wait else {})})
        if "/predict" in path:
            body = {"purpose": "triage", "rows": [row]}
        reply = client.post(path, headers=as_role("consumer"), json=body)
        assert reply.status_code == 200
        assert (shedder.limit == shedder.most) is told


def shedder_of(app):
    layer = app.middleware_stack
    while not isinstance(layer, Guard):
        layer = layer.app
    return layer._shedder


@pytest.mark.parametrize("number", [float("inf"), float("-inf")])
def test_infinity_in_a_raw_batch_is_refused_by_row_and_feature(client, lab, as_role, number):
    raw = struct.pack("<3d", 51, number, 52)
    inputs = [{"name": "age", "shape": [3], "datatype": "FP64", "parameters": {"binary_data_size": 24}}]
    head = json.dumps(ask(inputs=inputs)).encode()
    headers = {**as_role("consumer"), "Inference-Header-Content-Length": str(len(head))}
    reply = client.post(URL, headers=headers, content=head + raw)
    assert (reply.status_code, reply.headers["affidavit-code"]) == (422, "predict.row_outside_contract")
    assert reply.json()["error"].startswith("row 1, age: ")
    assert lab.entries("prediction") == []
