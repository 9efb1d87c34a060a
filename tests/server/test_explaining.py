"""Scores and attributions beside an answer: what is shown, committed to, sealed, refused, and proved."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from audit.answers import AnswerTerms
from audit.explanations import (
    GRADIENTS,
    LINEAR,
    attribution_document,
    completeness_problem,
    linear_attributions,
)
from audit.forward import forward
from audit.models import model_file
from server import explaining
from server.app import create_app
from tests.server.conftest import LAYERS, WEIGHTS

MLP = [
    {"layer": "linear", "in": 4, "out": 3, "bias": 1},
    {"layer": "tanh"},
    {"layer": "linear", "in": 3, "out": 1, "bias": 1},
]
MLP_WEIGHTS = [
    0.3,
    -0.8,
    0.5,
    0.1,
    0.9,
    0.2,
    -0.4,
    0.7,
    -0.6,
    0.4,
    0.8,
    -0.2,
    0.1,
    -0.1,
    0.2,
    1.1,
    -0.7,
    0.6,
    0.05,
]


def asked(client, headers, row, model="toy", **more):
    body = {"purpose": "triage", "rows": [row], **more}
    return client.post(f"/v1/models/{model}/predict", headers=headers, json=body)


@pytest.fixture
def mlp(lab, monkeypatch):
    """A second model, which is not linear."""
    name = "curved"
    charter = lab.publish_charter(name=name, model={"family": "layers", "site_intercept": 0, "layers": MLP})
    monkeypatch.setattr("tests.server.conftest.LAYERS", MLP)
    version = lab.register(charter, weights=MLP_WEIGHTS, model=name)
    lab.move(version, charter, "candidate", "approved", model=name)
    lab.move(version, charter, "approved", "live", model=name)
    assert lab.coordinator.blobs.get(version) == model_file(MLP, MLP_WEIGHTS)
    return name


def test_every_answer_bears_a_score_and_says_by_what(client, as_role, row):
    answer = asked(client, as_role("consumer"), row).json()
    (score,) = answer["annotations"]["ood"]
    assert score == {"basis": "bounds", "out": False, "score": "0"}
    assert "ood" not in answer["answers"][0]
    assert json.loads(answer["opened"][0]["output"])["ood"] == score
    edge = asked(client, as_role("consumer"), {**row, "age": 120}).json()
    assert edge["annotations"]["ood"][0]["out"] is True
    text = client.get("/metrics", headers=as_role("operator")).text
    assert 'affidavit_ood_rows_total{basis="bounds",model="toy"} 1.0' in text


def test_a_linear_model_explains_itself_exactly(client, as_role, row):
    answer = asked(client, as_role("consumer"), row, explain=True).json()
    (found,) = answer["annotations"]["attributions"]
    assert found["method"] == LINEAR
    assert set(found["values"]) == {"age", "fever", "ward"}
    encoded = [2 * 51 / 120 - 1, 1.0, 1.0, 0.0]
    assert float(found["total"]) == pytest.approx(forward(LAYERS, WEIGHTS, encoded)[0], abs=1e-6)
    assert abs(float(found["gap"])) < 4e-6
    assert json.loads(answer["opened"][0]["output"])["attributions"] == found


def test_nobody_is_explained_who_did_not_ask(client, as_role, row):
    answer = asked(client, as_role("consumer"), row).json()
    assert "attributions" not in answer["annotations"]
    assert "attributions" not in answer["opened"][0]["output"]


def test_integrated_gradients_add_up(mlp, lab, as_role, row):
    with TestClient(create_app(lab.settings(explain_timeout_s=60), clock=lab.clock)) as client:
        reply = asked(client, as_role("consumer"), row, model=mlp, explain=True)
    (found,) = reply.json()["annotations"]["attributions"]
    assert found["method"] == GRADIENTS
    encoded = [2 * 51 / 120 - 1, 1.0, 1.0, 0.0]
    assert problem(found, encoded) == ""
    assert abs(float(found["gap"])) < 1e-4


def problem(found, encoded, layers=MLP, weights=MLP_WEIGHTS):
    features = [
        {"name": "age", "type": "integer"},
        {"name": "fever", "type": "boolean"},
        {"name": "ward", "type": "category", "categories": ["north", "south"]},
    ]
    return completeness_problem(
        layers,
        weights,
        features,
        found,
        encoded=encoded,
        outputs=forward(layers, weights, encoded),
        answer={"label": "ill"},
        task="binary",
        label={"classes": ["well", "ill"]},
        site=None,
        slack=AnswerTerms().slack,
    )


LIES = [
    {"total": "0.9"},
    {"base": "0.5"},
    {"gap": "0.000001"},
    {"method": GRADIENTS},
    {"output": 1},
    {"values": {"age": "0", "fever": "0"}},
    {"values": {"age": "0", "fever": "0", "ward": "zero"}},
    {"values": {"age": "1", "fever": "-1", "ward": "0"}},
    {"more": "0"},
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: next(iter(lie)))
def test_attributions_that_are_not_the_models_are_found(lie):
    encoded = [0.5, 1.0, 0.0, 1.0]
    values = linear_attributions(LAYERS, WEIGHTS, encoded, 0)
    honest = attribution_document(
        method=LINEAR,
        output=0,
        base=forward(LAYERS, WEIGHTS, [0.0] * 4)[0],
        total=forward(LAYERS, WEIGHTS, encoded)[0],
        values={"age": values[0], "fever": values[1], "ward": values[2] + values[3]},
    )
    assert problem(honest, encoded, LAYERS, WEIGHTS) == ""
    assert problem({**honest, **lie}, encoded, LAYERS, WEIGHTS)
    assert problem("none", encoded, LAYERS, WEIGHTS)


def test_attributions_that_do_not_add_up_are_found():
    encoded = [0.5, 1.0, 0.0, 1.0]
    base, total = forward(MLP, MLP_WEIGHTS, [0.0] * 4)[0], forward(MLP, MLP_WEIGHTS, encoded)[0]
    values = {"age": total - base + 0.2, "fever": 0.0, "ward": 0.0}
    found = attribution_document(method=GRADIENTS, output=0, base=base, total=total, values=values)
    assert "miss" in problem(found, encoded)


def test_a_charter_of_labels_alone_lets_no_attributions_out(lab, as_role, row):
    answers = {"decimals": 6, "label_only": 1, "cache": 0}
    lab.live(name="terse", answers=answers)
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        plain = asked(client, as_role("consumer"), row, model="terse").json()
        assert plain["answers"] == [{"label": plain["answers"][0]["label"]}]
        before = len(lab.entries("prediction"))
        reply = asked(client, as_role("consumer"), row, model="terse", explain=True)
        assert (reply.status_code, reply.json()["code"]) == (422, "explain.not_allowed")
        assert len(lab.entries("prediction")) == before


@pytest.mark.parametrize("decimals", [0, 2, 5])
def test_a_charter_that_rounds_lets_no_attributions_out(lab, as_role, row, decimals):
    lab.live(name="round", answers={"decimals": decimals, "label_only": 0, "cache": 0})
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert asked(client, as_role("consumer"), row, model="round").status_code == 200
        before = len(lab.entries("prediction"))
        for role in ("consumer", "tester"):
            reply = asked(client, as_role(role), row, model="round", explain=True)
            assert (reply.status_code, reply.json()["code"]) == (422, "explain.not_allowed")
            assert "answers.decimals" in reply.json()["detail"]
            assert "attributions" not in reply.text.replace("and attributions would tell", "")
        assert len(lab.entries("prediction")) == before


def test_a_charter_of_six_decimals_restricts_nothing(lab, as_role, row):
    lab.live(name="exact", answers={"decimals": 6, "label_only": 0, "cache": 1})
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        answer = asked(client, as_role("consumer"), row, model="exact", explain=True).json()
    assert answer["annotations"]["attributions"]


def test_too_many_rows_are_not_explained_at_once(client, as_role, row):
    body = {"purpose": "triage", "rows": [row] * 17, "explain": True}
    reply = client.post("/v1/models/toy/predict", headers=as_role("consumer"), json=body)
    assert (reply.status_code, reply.json()["fields"][0]["field"]) == (422, "explain")


def test_a_server_without_captum_says_so_and_logs_no_answer(mlp, lab, as_role, row, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        reply = asked(client, as_role("consumer"), row, model=mlp, explain=True)
        assert (reply.status_code, reply.json()["code"]) == (501, "explain.not_available")
        assert "affidavit[explain]" in reply.json()["detail"]
        assert asked(client, as_role("consumer"), row, explain=True).status_code == 200  # linear needs none
    assert [entry["body"]["model"] for entry in lab.entries("prediction")] == ["toy"]


def test_an_explanation_that_takes_too_long_is_given_up(lab, as_role, row, monkeypatch):
    given_up = threading.Event()

    def slow(*arguments):
        assert given_up.wait(60)
        return [0.0] * 4

    monkeypatch.setattr(explaining, "linear_attributions", slow)
    with TestClient(create_app(lab.settings(explain_timeout_s=0.05), clock=lab.clock)) as client:
        reply = asked(client, as_role("consumer"), row, explain=True)
        given_up.set()
    assert (reply.status_code, reply.json()["code"]) == (503, "server.busy")
    assert reply.headers["retry-after"]
    assert lab.entries("prediction") == []


def test_a_lost_sketch_is_no_answer(lab, as_role, row):
    from audit.round_bodies import RunReferenced

    lab.coordinator.append(
        RunReferenced(run="run-1", round=3, statements=(), missing=(), sketch="7" * 64), "coordinator"
    )
    lab.live(name="paid", reference={"bins": 4, "noise_multiplier": "3"})
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        reply = asked(client, as_role("consumer"), row, model="paid")
    assert (reply.status_code, reply.json()["code"]) == (503, "models.artefact_unusable")
    assert replace(AnswerTerms(), decimals=2).slack > 0
