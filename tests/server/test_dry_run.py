"""Other rules, asked about the decisions that the log holds, each question as it stood when decided."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from audit.entries import PredictionDenied
from server.access import CedarAuthorizer, shipped_policies, with_shipped_schema
from server.app import create_app
from server.dry_run import dry_run
from tests.server.test_rules import STRICTER, alarm, ask


@pytest.fixture
def decided(lab, as_role, row):
    """A log with decisions of every kind; return the parts that a dry run takes."""
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        for _ in range(3):
            ask(client, as_role("consumer"), row)
        ask(client, as_role("consumer"), row, purpose="marketing")
        ask(client, as_role("consumer"), row, subject="MRN-1")
        ask(client, as_role("tester"), row)
        ask(client, as_role("scientist"), row)
        client.get("/v1/keys", headers=as_role("consumer"))
        client.get("/v1/audit/entries/3", headers=as_role("consumer"))
        context = client.app.state.context

        def run(text: str, last: int = 1_000):
            new, old = CedarAuthorizer(with_shipped_schema(text)), CedarAuthorizer(shipped_policies())
            return dry_run(context.coordinator.ledger, context.keys, context.vault, new, old, last=last)

        yield run, client


def test_same_rules_change_nothing_and_every_question_is_rebuilt(decided):
    found = decided[0](shipped_policies().policies + "\n// the same\n")
    assert (found.asked, found.same, found.inexact, found.skipped, found.changed) == (8, 8, 0, 1, ())


def test_stricter_rules_show_what_they_would_refuse(decided, lab):
    found = decided[0](STRICTER)
    assert found.reversed == 5
    assert {row.before for row in found.changed if row.is_reversed} == {
        "allow by consumers-may-predict", "allow by testers-may-try-versions",
    }  # fmt: skip
    named = [row.after for row in found.changed if not row.is_reversed]
    assert named == ["deny by nobody-on-sundays, purpose-outside-charter", "deny by nobody-on-sundays"]
    places = [row.leaf_index for row in found.changed]
    assert places == sorted(places)


def test_wider_rules_show_what_they_would_allow(decided):
    wider = shipped_policies().policies + (
        '@id("scientists-too") permit (principal in Affidavit::Role::"scientist",'
        ' action == Affidavit::Action::"predict", resource);'
        '@id("keys-for-all") permit (principal, action == Affidavit::Action::"keys.list", resource);'
    )
    found = decided[0](wider)
    assert [(row.role, row.action, row.after) for row in found.changed] == [
        ("scientist", "predict", "allow by scientists-too"),
        ("consumer", "keys.list", "allow by keys-for-all"),
    ]


def test_last_decisions_alone_are_asked(decided):
    assert decided[0](STRICTER, last=2).asked + decided[0](STRICTER, last=2).skipped == 2


def test_sealed_purpose_is_opened_from_the_vault_and_an_erased_one_is_skipped(decided, as_role):
    run, client = decided
    text = shipped_policies().policies + (
        '@id("no-triage") forbid (principal, action == Affidavit::Action::"predict", resource)'
        ' when { context.purpose == "triage" };'
    )
    before = run(text)
    assert before.reversed == 5, "the one about a person too"
    client.post("/v1/subjects/erase", headers=as_role("officer"), json={"subject": "MRN-1"})
    after = run(text)
    assert (after.reversed, after.skipped) == (4, before.skipped + 1)


def test_question_stands_as_it_stood_though_the_model_was_retired_since(decided, lab):
    lab.move(lab.version, lab.charter, "live", "retired")
    lab.coordinator.append(alarm(1), "api")
    found = decided[0](STRICTER)
    assert (found.asked, found.inexact, found.reversed) == (8, 0, 5)


def test_decision_by_other_rules_is_counted_apart_not_as_a_change(decided, lab):
    lab.coordinator.append(
        PredictionDenied(
            request_id="ab" * 16, model="toy", purpose="triage", principal="p-x", role="consumer",
            reason="policy", policies=("a-rule-of-long-ago",), policy_set="ab" * 32, version=lab.version,
        ),
        "api",
    )  # fmt: skip
    found = decided[0](shipped_policies().policies)
    assert (found.asked, found.inexact, found.changed) == (9, 1, ())
