"""Trials under another charter: a canary costs nobody an answer, a shadow is asked what it may answer."""

from __future__ import annotations

import base64
import dataclasses
import json

import pytest
from starlette.testclient import TestClient

from audit.entries import VersionTransition, signing_payload
from audit.models import model_file
from server import live as live_module
from server.app import create_app
from tests.server.conftest import LAYERS, charter

URL = "/v1/models/toy/predict"
OTHER = [0.5, 1.0, -0.25, 0.75, -0.5, 0.5, 0.5]
TIGHT = json.loads(json.dumps(charter([], "")["features"]))
TIGHT[0]["upper"] = "40"


def ask(client, headers, row, purpose="triage", **extra):
    return client.post(URL, headers=headers, json={"purpose": purpose, "rows": [row], **extra})


def trial(lab, state, *, weights=OTHER, epsilon="2.9", **changed):
    """Put a version under a charter of its own on trial; return its digest."""
    digest = lab.publish_charter(**changed) if changed else lab.charter
    version = lab.register(digest, weights=weights, epsilon=epsilon)
    lab.move(version, digest, "candidate", "approved")
    unsigned = VersionTransition(
        version=version, model="toy", charter=digest, from_state="approved", to_state=state,
        gate_results=lab.registered, previous_transition=lab.previous["toy"], officer=lab.officer.text,
        reason="trial", signature="", share=50 if state == "canary" else 0,
    )  # fmt: skip
    signature = base64.b64encode(lab.officer.sign(*signing_payload(unsigned))).decode()
    body = dataclasses.replace(unsigned, signature=signature)
    lab.previous["toy"] = lab.coordinator.append(body, "officer").leaf_hash.hex()
    return version


@pytest.fixture
def drawn(monkeypatch):
    """Every request that may be drawn to a canary is."""
    monkeypatch.setattr(live_module.secrets, "randbelow", lambda below: 0)


def counted(client, as_role, name):
    text = client.get("/metrics", headers=as_role("operator")).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


NARROWER = {
    "purposes": {"purposes": ["audit-trial"]},
    "bounds": {"features": TIGHT},
    "regions": {"regions": ["mars"]},
    "legal basis": {"legal_basis": "required"},
    "epsilon": {"epsilon": "3.5"},
}


@pytest.mark.parametrize("narrower", NARROWER)
@pytest.mark.parametrize("subject", [None, "MRN-1"])
def test_nobody_is_refused_because_of_a_canary(lab, as_role, row, drawn, narrower, subject):
    trial(lab, "canary", **NARROWER[narrower])
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        for _ in range(2):  # before and after it is in memory
            reply = ask(client, as_role("consumer"), row, subject=subject)
            assert reply.status_code == 200, reply.text
            assert reply.json()["version"] == lab.version
        assert counted(client, as_role, "affidavit_canary_passed_total") == 2
    assert lab.entries("prediction.denied") == []
    assert {entry["body"]["charter"] for entry in lab.entries("prediction")} == {lab.charter}


def test_a_canary_answers_what_it_may(lab, as_role, row, drawn):
    canary = trial(lab, "canary", **NARROWER["bounds"])
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert ask(client, as_role("consumer"), {**row, "age": 39}).json()["version"] == canary
        assert ask(client, as_role("consumer"), {**row, "age": 41}).json()["version"] == lab.version
        assert counted(client, as_role, "affidavit_canary_passed_total") == 1


def test_a_canary_that_explains_nothing_leaves_that_to_the_live_version(lab, as_role, row, drawn):
    canary = trial(lab, "canary", answers={"decimals": 2, "label_only": 0, "cache": 0})
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert ask(client, as_role("consumer"), row).json()["version"] == canary
        explained = ask(client, as_role("consumer"), row, explain=True).json()
    assert explained["version"] == lab.version
    assert explained["annotations"]["attributions"]


def test_a_canarys_altered_file_costs_nobody_an_answer(lab, as_role, row, drawn):
    canary = trial(lab, "canary")
    path = lab.folder / "coordinator" / "blobs" / canary[:2] / canary
    path.write_bytes(model_file(LAYERS, [0.0] * 7))
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert ask(client, as_role("consumer"), row).json()["version"] == lab.version


def test_what_the_live_version_refuses_too_is_its_own_refusal(lab, as_role, row, drawn):
    trial(lab, "canary", **NARROWER["purposes"])
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        reply = ask(client, as_role("consumer"), row, purpose="marketing")
        assert (reply.status_code, reply.json()["policies"]) == (403, ["purpose-outside-charter"])
        outside = ask(client, as_role("consumer"), {**row, "age": 121})
        assert outside.json()["code"] == "predict.row_outside_contract"
    (denied,) = lab.entries("prediction.denied")
    assert denied["body"]["version"] == lab.version


def test_who_insists_on_a_canary_hears_its_own_refusal(lab, as_role, row, drawn):
    canary = trial(lab, "canary", **NARROWER["purposes"])
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        reply = ask(client, as_role("consumer"), row, version=canary)
        assert (reply.status_code, reply.json()["policies"]) == (403, ["purpose-outside-charter"])
        assert counted(client, as_role, "affidavit_canary_passed_total") == 0


def test_beside_no_live_version_a_canarys_refusal_stands(lab, as_role, row, drawn):
    trial(lab, "canary", **NARROWER["purposes"])
    lab.move(lab.version, lab.charter, "live", "retired")
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert ask(client, as_role("consumer"), row).status_code == 403


# shadows


@pytest.mark.parametrize("narrower", NARROWER)
def test_a_shadow_is_not_asked_what_its_charter_does_not_allow(lab, as_role, row, narrower):
    trial(lab, "shadow", **NARROWER[narrower])
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert ask(client, as_role("consumer"), row).json()["version"] == lab.version
    assert lab.entries("prediction.shadowed") == []
    assert lab.entries("prediction.denied") == []


def test_a_shadow_that_is_too_old_by_its_charter_is_not_asked(lab, as_role, row):
    trial(lab, "shadow", max_age_days=1)
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        lab.clock.forward(days=3)
        assert ask(client, as_role("consumer"), row).status_code == 200
    assert lab.entries("prediction.shadowed") == []


def test_refused_shadows_are_counted(lab, as_role, row):
    trial(lab, "shadow", **NARROWER["purposes"])
    app = create_app(lab.settings(), clock=lab.clock)
    with TestClient(app) as client:
        assert ask(client, as_role("consumer"), row).status_code == 200
        client.portal.call(app.state.context.predicting.shadowing.drain)
        assert counted(client, as_role, 'affidavit_shadow_rows_total{model="toy",outcome="refused"}') == 1


def test_a_shadow_is_asked_what_it_would_answer_live(lab, as_role, row):
    shadow = trial(lab, "shadow", purposes=["audit-trial", "triage"], regions=["eu"])
    key = lab.key("consumer", region="eu")
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert ask(client, {"Authorization": f"Bearer {key}"}, row).status_code == 200
        assert ask(client, as_role("consumer"), row).status_code == 200
    (entry,) = lab.entries("prediction.shadowed")
    assert entry["body"]["version"] == shadow


def test_a_shadow_reads_the_row_by_its_own_bounds(lab, as_role, row):
    """Its encoding has the live one's length, and other numbers."""
    wide = json.loads(json.dumps(TIGHT))
    wide[0]["upper"] = "1000"
    trial(lab, "shadow", features=wide, weights=[9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    app = create_app(lab.settings(), clock=lab.clock)
    with TestClient(app) as client:
        answer = ask(client, as_role("consumer"), {**row, "age": 90}).json()
        assert answer["answers"][0]["label"] == "well"  # as the shadow says of 90 years of 1000
        client.portal.call(app.state.context.predicting.shadowing.drain)
        assert counted(client, as_role, 'affidavit_shadow_rows_total{model="toy",outcome="agreed"}') == 1


# aliases


@pytest.mark.parametrize("door", ["/v1/models/toy/predict", "/v2/models/toy/versions/{}/infer"])
@pytest.mark.parametrize("role", ["consumer", "tester"])
def test_live_names_nothing_where_nothing_is_live(lab, as_role, row, door, role):
    lab.register(lab.charter, weights=OTHER)
    lab.move(lab.version, lab.charter, "live", "retired")
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        if "{" in door:
            inputs = [
                {"name": name, "shape": [1], "datatype": kind, "data": [row[name]]}
                for name, kind in (("age", "INT64"), ("fever", "BOOL"), ("ward", "BYTES"))
            ]
            body = {"inputs": inputs, "parameters": {"purpose": "triage"}}
            reply = client.post(door.format("live"), headers=as_role(role), json=body)
            assert (reply.status_code, reply.headers["affidavit-code"]) == (404, "models.version_not_found")
            for path in ("live", "live/ready"):
                found = client.get(f"/v2/models/toy/versions/{path}", headers=as_role(role))
                assert (found.status_code, found.headers["affidavit-code"]) == (
                    404,
                    "models.version_not_found",
                )
        else:
            reply = ask(client, as_role(role), row, version="live")
            assert (reply.status_code, reply.json()["code"]) == (404, "models.version_not_found")
    assert lab.entries("prediction") == []


def test_candidate_names_nothing_where_there_is_none(client, lab, as_role, row):
    for role in ("consumer", "tester"):
        reply = ask(client, as_role(role), row, version="candidate")
        assert (reply.status_code, reply.json()["code"]) == (404, "models.version_not_found")
        found = client.get("/v2/models/toy/versions/candidate", headers=as_role(role))
        assert (found.status_code, found.headers["affidavit-code"]) == (404, "models.version_not_found")
