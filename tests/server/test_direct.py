"""The quick way and FastAPI's give the same answer to everything; a query is what sends a request the long
way.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from tests.waiting import LeapingLoop

PREDICT = "/v1/models/toy/predict"
INFER = "/v2/models/toy/infer"
FRESH = {
    "x-request-id", "content-length", "affidavit-entry",
}  # fmt: skip


def rows(row, **changed):
    return {"purpose": "triage", "rows": [row], **changed}


def tensors(**changed):
    inputs = [
        {"name": "age", "shape": [1], "datatype": "INT64", "data": [51]},
        {"name": "fever", "shape": [1], "datatype": "BOOL", "data": [True]},
        {"name": "ward", "shape": [1], "datatype": "BYTES", "data": ["north"]},
    ]
    return {"inputs": inputs, "parameters": {"purpose": "triage"}, **changed}


def shape_of(value):
    """A document without what is new in each answer: ids, places, hashes, salts."""
    if isinstance(value, dict):
        return {
            name: shape_of(item) if name not in ("opened", "receipt", "instance", "entry") else type(item)
            for name, item in value.items()
            if name not in ("decision_id", "entry_id", "leaf_index", "leaf_hash", "id")
        }
    return [shape_of(item) for item in value] if isinstance(value, list) else value


def both(client, path, **request):
    """Ask both ways; return the two replies."""
    return [client.post(path + query, **request) for query in ("", "?as=a-stranger")]


def agree(quick, slow):
    assert quick.status_code == slow.status_code, (quick.text, slow.text)
    assert shape_of(quick.json()) == shape_of(slow.json())
    heads = [
        {name: value for name, value in reply.headers.items() if name not in FRESH} for reply in (quick, slow)
    ]
    assert heads[0] == heads[1]
    assert quick.headers.keys() == slow.headers.keys()


BODIES = {
    "good": lambda row: json.dumps(rows(row)),
    "denied purpose": lambda row: json.dumps(rows(row, purpose="marketing")),
    "malformed purpose": lambda row: json.dumps(rows(row, purpose="\n")),
    "unknown member": lambda row: json.dumps(rows(row, more=1)),
    "outside the contract": lambda row: json.dumps(rows({**row, "age": 500})),
    "unknown feature": lambda row: json.dumps(rows({**row, "name": "x"})),
    "no rows": lambda row: json.dumps(rows(row, rows=[])),
    "unknown site": lambda row: json.dumps(rows(row, site="gamma")),
    "version of nobody": lambda row: json.dumps(rows(row, version="ab" * 32)),
    "a key twice": lambda row: '{"purpose":"triage","purpose":"triage","rows":[]}',
    "not a number": lambda row: '{"purpose":"triage","rows":[{"age":NaN}]}',
    "no JSON": lambda row: "{",
    "empty": lambda row: "",
    "a person": lambda row: json.dumps(rows(row, consent="c-1")),
}


@pytest.mark.parametrize("name", BODIES)
def test_predict_is_one_call_by_both_ways(client, as_role, row, name):
    agree(*both(client, PREDICT, headers=as_role("consumer"), content=BODIES[name](row)))


ASKS = {
    "good": tensors(),
    "denied purpose": tensors(parameters={"purpose": "marketing"}),
    "no purpose": tensors(parameters={}),
    "unknown parameter": tensors(parameters={"purpose": "triage", "x": 1}),
    "no inputs": {},
    "unknown tensor": tensors(inputs=[{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]),
    "binary answer": tensors(outputs=[{"name": "label", "parameters": {"binary_data": True}}]),
}


@pytest.mark.parametrize("path", [INFER, "/v2/models/toy/versions/live/infer"])
@pytest.mark.parametrize("name", ASKS)
def test_infer_is_one_call_by_both_ways(client, as_role, name, path):
    quick, slow = both(client, path, headers=as_role("consumer"), json=ASKS[name])
    if name == "binary answer":
        assert quick.status_code == slow.status_code == 200
        assert quick.headers.keys() == slow.headers.keys()
        assert quick.content[-8:] == slow.content[-8:]
    else:
        agree(quick, slow)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Basic abc"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer  "},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": ""},
        {"X-Request-Timeout": "never"},
        {"X-Request-Timeout": "0"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [PREDICT, INFER])
def test_nobody_gets_in_by_either_way(client, headers, path):
    agree(*both(client, path, headers=headers, json={}))


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer "])
def test_the_scheme_is_read_alike(client, lab, row, scheme):
    headers = {"Authorization": f"{scheme} {lab.tokens['consumer']}"}
    quick, slow = both(client, PREDICT, headers=headers, json=rows(row))
    agree(quick, slow)
    assert quick.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/TOY/predict",
        "/v1/models/nobody/predict",
        "/v1/models/toy/predict/",
        "/v1/models//predict",
        "/v1/models/toy%2Fx/predict",
        "/v1/models/toy%0A/predict",
        "/v2/models/nobody/infer",
        "/v2/models/toy/versions//infer",
        "/v2/models/toy/versions/LIVE/infer",
        "/v2/models/" + "a" * 90 + "/infer",
        "/v1/models/toy/predict\u0661",
    ],
)
def test_odd_paths_are_answered_alike(client, as_role, row, path):
    body = tensors() if path.startswith("/v2") else rows(row)
    agree(*both(client, path, headers=as_role("consumer"), json=body))


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", [PREDICT, INFER])
def test_other_methods_go_the_long_way(client, as_role, method, path):
    assert client.request(method, path, headers=as_role("consumer")).status_code == 405


@pytest.mark.parametrize(("path", "route"), [(PREDICT, "/v1/models/{name}/predict"),
                                             (INFER, "/v2/models/{model}/infer")])  # fmt: skip
def test_metrics_and_log_name_the_same_route_and_caller(client, as_role, row, caplog, path, route):
    body = tensors() if path == INFER else rows(row)
    with caplog.at_level(logging.INFO, logger="server.access_log"):
        both(client, path, headers=as_role("consumer"), json=body)
    lines = [record.ecs for record in caplog.records if record.name == "server.access_log"]
    assert [line["url.path"] for line in lines] == [route, route]
    assert lines[0]["user.id"] == lines[1]["user.id"] != ""
    text = client.get("/metrics", headers=as_role("operator")).text
    assert f'affidavit_http_requests_total{{method="POST",route="{route}",status="200"}} 2.0' in text


def test_refusals_are_entries_by_both_ways(client, lab, as_role, row):
    replies = both(client, PREDICT, headers=as_role("consumer"), json=rows(row, purpose="marketing"))
    entries = lab.entries("prediction.denied")
    assert [reply.json()["entry"]["leaf_index"] for reply in replies] == [e["leaf_index"] for e in entries]


def test_each_answer_has_its_own_request_id_and_keeps_the_callers(client, lab, as_role, row):
    given = "ab" * 16
    headers = {**as_role("consumer"), "X-Request-ID": given}
    replies = both(client, PREDICT, headers=headers, json=rows(row))
    assert {reply.headers["x-request-id"] for reply in replies} == {given}
    assert {entry["body"]["request_id"] for entry in lab.entries("prediction")} == {given}


def test_fault_of_ours_is_500_by_both_ways_and_tells_nothing(client, lab, as_role, row):
    def explode(*_: object) -> None:
        raise RuntimeError("secret path /etc/keys")

    client.app.state.context.predicting.warm.ready = explode
    quick, slow = both(client, PREDICT, headers=as_role("consumer"), json=rows(row))
    agree(quick, slow)
    assert quick.status_code == 500
    assert "secret" not in quick.text
    assert lab.entries("prediction") == []


def test_deadline_ends_the_quick_way_too(lab, as_role, row):
    app = create_app(lab.settings(request_timeout_s=90), clock=lab.clock)
    with TestClient(app, backend_options={"loop_factory": LeapingLoop}) as client:
        sequencer = client.app.state.context.coordinator.ledger._sequencer
        loop, told = client.portal.call(asyncio.get_running_loop), threading.Event()
        reply = client.post(PREDICT, headers=as_role("consumer"), json=rows(row))
        commit = sequencer._commit

        def late_commit(batch):
            loop.leap(41)
            assert told.wait(60)
            return commit(batch)

        sequencer._commit = late_commit
        headers = {**as_role("consumer"), "X-Request-Timeout": "40"}
        late = client.post(PREDICT, headers=headers, json=rows(row))
        told.set()
    assert reply.status_code == 200
    assert (late.status_code, late.json()["code"]) == (504, "request.deadline")
