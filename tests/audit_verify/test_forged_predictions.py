"""Who can lie about an answer, its opened rows or its receipt, and which step says so."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest

from audit.canonical import canonical_bytes
from audit.evidence import read_evidence, write_evidence
from audit.models import model_file
from audit.verify import Verdict
from tests.audit_verify.judging import (
    ANSWER,
    APPROVALS,
    DECISION,
    LINKS,
    RECEIPT,
    assert_caught,
)


def test_an_answer_by_another_model_fails(make_world):
    world = make_world()
    digest = world.train()
    better = world.put(model_file(world.charter.layers, [0.4, -1.0, 2.0, 0.1, 0.0, 0.0, 0.0]))
    index, opened = world.predict(digest, world.approve(digest, world.register(digest)), answer_by=better)
    assert_caught(world.report(world.evidence(index, opened=opened)), ANSWER, "answer.other_model")


def test_an_answer_by_a_version_that_is_only_approved_fails(make_world):
    world = make_world()
    digest = world.train()
    approved = world.move(digest, world.register(digest), "candidate", "approved")
    index, opened = world.predict(digest, approved)
    assert_caught(
        world.report(world.evidence(index, opened=opened)), APPROVALS, "prediction.version_not_live"
    )


def test_an_answer_by_a_version_retired_since_fails(make_world):
    world = make_world()
    digest = world.train()
    registration = world.register(digest)
    live = world.approve(digest, registration)
    world.move(digest, registration, "live", "retired")
    index, opened = world.predict(digest, live)
    assert_caught(world.report(world.evidence(index, opened=opened)), DECISION, "prediction.version_not_live")


@pytest.mark.parametrize(
    ("change", "title", "code"),
    [
        ({"purpose": "marketing"}, DECISION, "prediction.purpose"),
        ({"policies": ()}, DECISION, "prediction.policies"),
        ({"site": "south"}, DECISION, "prediction.site"),
        ({"version": "ab" * 32}, LINKS, "prediction.other_version"),
        ({"model": "other"}, LINKS, "prediction.other_version"),
        ({"charter": "ab" * 32}, LINKS, "prediction.other_version"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_a_prediction_outside_its_charter_fails(make_world, change, title, code):
    world = make_world(before={"prediction": lambda w, body: replace(body, **change)})
    assert_caught(world.judge(), title, code)


def test_a_prediction_by_a_transition_that_is_not_in_the_log_is_incomplete(make_world):
    world = make_world()
    index, opened = world.whole()
    evidence = read_evidence(world.evidence(index, opened=opened))
    gone = world.find("version.transition", 1)
    kept = {i: data for i, data in evidence.entries.items() if i != gone}
    proofs = {i: proof for i, proof in evidence.proofs.items() if i != gone}
    report = world.report(write_evidence(replace(evidence, entries=kept, proofs=proofs)))
    assert_caught(report, LINKS, "verify.entry_missing", Verdict.INCOMPLETE)


@pytest.mark.parametrize("field", ["input", "output", "input_salt", "output_salt"])
def test_opened_rows_that_are_not_those_committed_to_fail(honest, field):
    wrong = {"input": '{"alpha":"1","beta":"1","gamma":"1"}', "output": '{"label":"no","probability":"0"}'}
    first = {**honest.opened[0], field: wrong.get(field, "00" * 32)}
    data = honest.world.evidence(honest.index, opened=[first, *honest.opened[1:]])
    assert_caught(honest.world.report(data), ANSWER, "answer.commitment")


def test_opened_rows_may_not_be_fewer(honest):
    data = honest.world.evidence(honest.index, opened=honest.opened[:1])
    assert_caught(honest.world.report(data), ANSWER, "answer.rows")


@pytest.mark.parametrize("field", ["leaf_index", "leaf_hash", "time", "signature"])
def test_a_receipt_that_the_log_did_not_sign_fails(honest, field):
    receipt = honest.world.receipt(honest.index)
    fake = {
        "leaf_index": receipt["leaf_index"] - 1,
        "leaf_hash": "ab" * 32,
        "time": "2026-11-23T10:00:00Z",
        "signature": base64.b64encode(bytes(64)).decode(),
    }
    receipt[field] = fake[field]
    assert_caught(
        honest.world.report(honest.data, receipt=canonical_bytes(receipt)), RECEIPT, "receipt.invalid"
    )


def test_a_receipt_for_another_entry_fails(honest):
    receipt = canonical_bytes(honest.world.receipt(honest.index - 1))
    assert_caught(honest.world.report(honest.data, receipt=receipt), RECEIPT, "receipt.other_entry")
