"""Facts before the decision, annotations and observations after the answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.errors import RowContractError
from server.hooks import Annotation, Facts, Hooks

ASK = {"purpose": "triage"}


class Recorder:
    """A provider, an annotator and an observer in one."""

    def __init__(self, *, facts=None, annotation=None, fails="") -> None:
        self.seen, self.observed = [], []
        self._facts, self._annotation, self._fails = facts or Facts(), annotation or Annotation(), fails

    def facts(self, principal, asked, served):
        self.seen.append((principal.role, asked.purpose, served.state))
        return self._facts

    async def annotate(self, answering):
        await asyncio.sleep(0)
        if self._fails == "annotate":
            raise RowContractError("row 0: too far out")
        return self._annotation

    def observe(self, answering, answered):
        self.observed.append((len(answering.encoded[0]), answered.leaf_index))
        if self._fails == "observe":
            raise RuntimeError("observer")


@pytest.fixture
def hooked(lab, as_role, row):
    """Return a function that predicts once under hooks."""

    def ask(recorder):
        with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
            context = client.app.state.context
            hooks = Hooks(
                facts=(*context.predicting.hooks.facts, recorder),
                annotators=(recorder,),
                observers=(recorder,),
            )
            predicting = replace(context.predicting, hooks=hooks)
            client.app.state.context = replace(context, predicting=predicting)
            body = {**ASK, "rows": [row]}
            return client.post("/v1/models/toy/predict", headers=as_role("consumer"), json=body)

    return ask


def test_annotations_are_shown_and_enter_the_entry(hooked, lab):
    recorder = Recorder(annotation=Annotation(shown={"score": "0.25"}))
    reply = hooked(recorder)
    assert reply.json()["annotations"] == {"score": "0.25"}
    assert recorder.seen == [("consumer", "triage", "live")]
    assert recorder.observed == [(4, reply.json()["entry"]["leaf_index"])]


def test_annotator_sets_fields_of_the_entry(hooked, lab):
    assert hooked(Recorder(annotation=Annotation(body={"site": "alpha"}))).status_code == 200
    assert lab.entries("prediction")[0]["body"]["site"] == "alpha"


def test_fact_outside_the_schema_is_a_refusal_and_an_entry(hooked, lab):
    reply = hooked(Recorder(facts=Facts(resource={"no_such_attribute": 1})))
    assert reply.status_code == 403
    assert reply.json()["policies"] == ["policy-evaluation-error"]
    assert len(lab.entries("prediction.denied")) == 1


def test_annotator_that_refuses_leaves_no_entry(hooked, lab):
    assert hooked(Recorder(fails="annotate")).status_code == 422
    assert lab.entries("prediction") == []


def test_observer_that_fails_keeps_no_answer_back(hooked, lab):
    assert hooked(Recorder(fails="observe")).status_code == 200
    assert len(lab.entries("prediction")) == 1
