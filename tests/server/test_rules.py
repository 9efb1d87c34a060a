"""Rules in force: tested beside the text, tried on what was decided, changed by officers alone, followed by
all.
"""

from __future__ import annotations

import base64
import dataclasses
from contextlib import ExitStack

import pytest
from starlette.testclient import TestClient

from audit.entries import ZERO_DIGEST, signing_payload
from audit.keys import SigningKey
from audit.principal import Principal, Question
from audit.serving_bodies import AlarmClosed, AlarmRaised, PolicyChanged
from server.access import CedarAuthorizer, PolicyText, shipped_policies, with_shipped_schema
from server.app import create_app
from server.errors import PolicyLoadError
from server.facts import age_days
from server.policy_service import signed_change
from server.policy_tests import parse_cases, run_cases, shipped_cases
from server.rules import RulesInForce
from tests.waiting import wait_until

PREDICT = "/v1/models/toy/predict"
STRICTER = shipped_policies().policies + (
    '\n@id("nobody-on-sundays") forbid (principal, action == Affidavit::Action::"predict", resource);\n'
)
NO_TESTERS = shipped_policies().policies.replace(
    'in Affidavit::Role::"tester"', 'in Affidavit::Role::"officer"'
)


def ask(client, headers, row, **more):
    return client.post(PREDICT, headers=headers, json={"purpose": "triage", "rows": [row], **more})


def change(lab, text, *, key=None, previous=ZERO_DIGEST, **changed) -> PolicyChanged:
    body = signed_change(text, previous, key or lab.officer, "reviewed")
    return dataclasses.replace(body, **changed)


def document(body: PolicyChanged) -> dict:
    return dataclasses.asdict(body)


# tests beside the rules


def test_shipped_rules_pass_their_tests_and_every_policy_has_one():
    report = run_cases(CedarAuthorizer(shipped_policies()), shipped_cases())
    assert (report.failed, report.untested) == ((), ())
    assert report.cases > 60


@pytest.mark.parametrize("name", sorted(CedarAuthorizer(shipped_policies()).names))
def test_rules_without_one_of_the_policies_fail_their_tests(name):
    """So that no case passes whatever the rules say."""
    text = shipped_policies().policies
    begin = text.index(f'@id("{name}")')
    end = text.index(";", begin) + 1
    if name == "legal-effect-needs-a-review":
        end = text.index(";", begin) + 1
    report = run_cases(CedarAuthorizer(with_shipped_schema(text[:begin] + text[end:])), shipped_cases())
    assert report.failed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- {name: a", "is not YAML"),
        ("[]", "1 to"),
        ("{}", "1 to"),
        ("- 5", "case 1"),
        ("- {name: a, principal: {role: officer}, action: fly, expect: allow}", "action"),
        ("- {name: a, principal: {role: officer}, action: predict, expect: maybe}", "expect"),
        ("- {name: a, principal: {role: officer, king: 1}, action: predict, expect: deny}", "king"),
        ("- {name: a, principal: {role: x}, action: predict, expect: deny, model: {age: 1.5}}", "age"),
    ],
)  # fmt: skip
def test_case_that_is_none_is_refused_with_its_place(text, said):
    with pytest.raises(PolicyLoadError, match=said):
        parse_cases(text, "x.tests.yaml")


# the memory of decisions

NUMBERS = Question(
    action="predict",
    resource="m",
    attributes={
        "name": "m", "purposes": ("triage",), "state": "live", "epsilon_micro": 1, "epsilon_limit_micro": 2,
        "regions": (), "age_days": 0, "max_age_days": 0, "drift_alarms": 0, "legal_basis_required": False,
        "legal_effect": False,
    },
    context={"purpose": "triage", "legal_basis": "", "consent": False, "over_quota": False},
)  # fmt: skip
CONSUMER = Principal(id="p-1", role="consumer")


def with_attribute(**changed) -> Question:
    return dataclasses.replace(NUMBERS, attributes={**NUMBERS.attributes, **changed})


def test_remembered_decision_is_the_one_that_cedar_makes():
    remembering = CedarAuthorizer(shipped_policies())
    questions = [NUMBERS, with_attribute(state="candidate"), with_attribute(drift_alarms=1), NUMBERS]
    people = [CONSUMER, Principal(id="p-1", role="tester"), dataclasses.replace(CONSUMER, models=("other",))]
    for principal in people * 2:
        for question in questions:
            fresh = CedarAuthorizer(shipped_policies()).decide(principal, question)
            assert remembering.decide(principal, question) == fresh


def test_values_equal_in_python_and_not_in_cedar_are_not_mistaken():
    authorizer = CedarAuthorizer(shipped_policies())
    assert authorizer.decide(CONSUMER, with_attribute(epsilon_micro=1)).allowed
    decision = authorizer.decide(CONSUMER, with_attribute(epsilon_micro=True))
    assert decision.policies == ("policy-evaluation-error",)
    assert authorizer.decide(CONSUMER, with_attribute(legal_effect=0)).policies == (
        "policy-evaluation-error",
    )


def test_memory_is_bounded_and_dropped_with_the_rules(monkeypatch):
    import server.access as access

    monkeypatch.setattr(access, "_REMEMBERED", 10)
    authorizer = CedarAuthorizer(shipped_policies())
    for number in range(50):
        context = {**NUMBERS.context, "purpose": f"p{number}"}
        authorizer.decide(CONSUMER, dataclasses.replace(NUMBERS, context=context))
    assert len(authorizer._rules.remembered) <= 10
    assert authorizer.decide(CONSUMER, NUMBERS).allowed
    authorizer.replace(PolicyText(policies=STRICTER, schema=shipped_policies().schema))
    assert authorizer.decide(CONSUMER, NUMBERS).policies == ("nobody-on-sundays",)


def test_unhashable_attribute_is_an_error_of_evaluation_not_of_ours():
    decision = CedarAuthorizer(shipped_policies()).decide(
        CONSUMER, with_attribute(purposes=["triage"], name={"a": 1})
    )
    assert decision.policies == ("policy-evaluation-error",)


# changes


def test_change_by_an_officer_decides_in_every_server_and_after_a_restart(lab, as_role, row):
    settings = lab.settings(rules_follow_s=0.05)
    with ExitStack() as stack:
        here, there = (
            stack.enter_context(TestClient(create_app(settings, clock=lab.clock))) for _ in range(2)
        )
        assert ask(there, as_role("consumer"), row).status_code == 200
        before = here.get("/v1/policy", headers=as_role("operator")).json()
        assert before["change"] is None
        body = document(change(lab, STRICTER, previous=before["previous_change"]))
        reply = here.post("/v1/policy", headers=as_role("officer"), json=body)
        assert reply.status_code == 201
        assert ask(here, as_role("consumer"), row).json()["policies"] == ["nobody-on-sundays"]
        wait_until(lambda: ask(there, as_role("consumer"), row).status_code != 200)
        shown = there.get("/v1/policy", headers=as_role("scientist")).json()
        assert shown["text"] == STRICTER
        assert shown["change"]["officer"] == lab.officer.text
    with TestClient(create_app(settings, clock=lab.clock)) as client:
        assert ask(client, as_role("consumer"), row).json()["policies"] == ["nobody-on-sundays"]
    (entry,) = lab.entries("policy.changed")
    assert entry["body"]["text"] == STRICTER
    applied = [found["body"]["policy_set"] for found in lab.entries("policy.applied")]
    assert applied.count(body["policy_set"]) == 1, "said once a change, whoever follows"
    assert applied[-1] == body["policy_set"], "a restart does not say that the file's rules decide"


def hostile_changes(lab):
    stranger, text = SigningKey.generate(), STRICTER
    good = change(lab, text)
    yield "by a stranger", change(lab, text, key=stranger), "no officer"
    yield "by whoever drew up the charter", change(lab, text, key=lab.stranger), "no officer"
    yield (
        "in the officer's name",
        dataclasses.replace(change(lab, text, key=stranger), officer=lab.officer.text),
        "sig",
    )
    yield "without a signature", dataclasses.replace(good, signature=""), "base64"
    yield "other text under the signature", dataclasses.replace(good, text=text + " "), "digest"
    yield "reason changed", dataclasses.replace(good, reason="other"), "sig"
    yield "of another chain", change(lab, text, previous="ab" * 32), "chain"
    yield "digest of another text", dataclasses.replace(good, policy_set="ab" * 32), "digest"


def test_change_that_does_not_count_changes_nothing_and_is_no_entry(client, lab, as_role, row):
    for name, body, said in hostile_changes(lab):
        reply = client.post("/v1/policy", headers=as_role("officer"), json=document(body))
        assert (reply.status_code, reply.json()["code"]) == (409, "access.policy_refused"), name
        assert said in reply.json()["detail"], name
    assert lab.entries("policy.changed") == []
    assert ask(client, as_role("consumer"), row).status_code == 200


def test_rules_that_lock_officers_out_are_refused_unless_asked_for(client, lab, as_role):
    nobody = '@id("nobody") forbid (principal, action, resource);'
    body = document(change(lab, nobody))
    for asked in (body, {**body, "lock_out": False}):
        reply = client.post("/v1/policy", headers=as_role("officer"), json=asked)
        assert (reply.status_code, reply.json()["code"]) == (409, "access.policy_lock_out")
        assert "policy.read and policy.change" in reply.json()["detail"]
    assert lab.entries("policy.changed") == []
    assert client.get("/v1/policy", headers=as_role("officer")).status_code == 200
    for odd in ("true", 1, None):
        reply = client.post("/v1/policy", headers=as_role("officer"), json={**body, "lock_out": odd})
        assert reply.status_code == 422
    reply = client.post("/v1/policy", headers=as_role("officer"), json={**body, "lock_out": True})
    assert reply.status_code == 201
    assert client.get("/v1/policy", headers=as_role("officer")).status_code == 403


def test_rows_that_somebody_wrote_into_the_log_change_nothing(lab, as_role, row):
    for _, body, _ in hostile_changes(lab):
        lab.coordinator.append(body, "api")
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert ask(client, as_role("consumer"), row).status_code == 200
        assert client.get("/v1/policy", headers=as_role("operator")).json()["change"] is None


def signed(lab, body: PolicyChanged) -> PolicyChanged:
    signature = lab.officer.sign(*signing_payload(body))
    return dataclasses.replace(body, signature=base64.b64encode(signature).decode())


BROKEN = ['@id("x") permit (principal, action, resource) when { resource.stat == 1 };', "permit (", "é{"]


@pytest.mark.parametrize("text", BROKEN)
def test_bad_set_never_replaces_a_good_one(lab, as_role, row, text):
    import hashlib

    good = change(lab, STRICTER)
    place = lab.coordinator.append(good, "officer")
    bad = dataclasses.replace(good, text=text, policy_set=hashlib.sha256(text.encode()).hexdigest(),
                              previous_change=place.leaf_hash.hex())  # fmt: skip
    lab.coordinator.append(signed(lab, bad), "officer")
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert ask(client, as_role("consumer"), row).json()["policies"] == ["nobody-on-sundays"]


def test_set_of_another_release_that_does_not_fit_refuses_everybody(lab, as_role, row):
    import hashlib

    text = BROKEN[0]
    body = dataclasses.replace(
        change(lab, STRICTER),
        text=text,
        policy_set=hashlib.sha256(text.encode()).hexdigest(),
        schema_digest="ab" * 32,
    )
    lab.coordinator.append(signed(lab, body), "officer")
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert ask(client, as_role("consumer"), row).json()["policies"] == ["default-deny"]


def test_old_signature_cannot_be_logged_a_second_time(lab):
    first = change(lab, STRICTER)
    place = lab.coordinator.append(first, "officer")
    second = change(lab, NO_TESTERS, previous=place.leaf_hash.hex())
    lab.coordinator.append(second, "officer")
    lab.coordinator.append(first, "operator")
    rules = RulesInForce(lab.coordinator.ledger)
    rules.refresh()
    assert rules.change.body == second


def test_officer_of_one_charter_does_not_change_the_rules_of_another(lab):
    others = SigningKey.generate()
    lab.live(
        name="second", officers=[{"name": "x", "key": lab.officer.text}, {"name": "y", "key": others.text}]
    )
    rules = RulesInForce(lab.coordinator.ledger)
    rules.refresh()
    assert "no officer of charter toy" in rules.fault(change(lab, STRICTER, key=others))
    assert "no officer of charter second" in rules.fault(change(lab, STRICTER, key=lab.other_officer))
    assert rules.fault(change(lab, STRICTER)) == ""


def test_charter_that_nobody_uses_gives_its_officers_no_say(lab):
    mine = SigningKey.generate()
    lab.publish_charter(name="mine", officers=[{"name": "me", "key": mine.text}])
    rules = RulesInForce(lab.coordinator.ledger)
    rules.refresh()
    assert "no officer of charter toy" in rules.fault(change(lab, STRICTER, key=mine))
    assert rules.fault(change(lab, STRICTER)) == ""


@pytest.mark.parametrize("body", [{}, {"text": "x"}, [], {"policy_set": 5}], ids=str)
def test_body_that_is_no_change_is_422(client, as_role, body):
    assert client.post("/v1/policy", headers=as_role("officer"), json=body).status_code == 422


# alarms


def alarm(number: int, kind: str = "drift", model: str = "toy") -> AlarmRaised:
    return AlarmRaised(
        alarm=f"{number:032x}", kind=kind, model=model, measure="psi", value="0.31", threshold="0.2",
        window_s=3600,
    )  # fmt: skip


def test_open_drift_alarm_keeps_the_model_from_answering_until_an_officer_closes_it(lab, as_role, row):
    lab.coordinator.append(alarm(1), "api")
    with TestClient(create_app(lab.settings(rules_follow_s=0.01), clock=lab.clock)) as client:
        assert ask(client, as_role("consumer"), row).json()["policies"] == ["drift-alarm-open"]
        assert ask(client, as_role("tester"), row).status_code == 200
        (shown,) = client.get("/v1/alarms", headers=as_role("operator")).json()["alarms"]
        assert (shown["kind"], shown["value"]) == ("drift", "0.31")
        path = f"/v1/alarms/{shown['alarm']}/close"
        assert client.post(path, headers=as_role("operator"), json={"reason": "x"}).status_code == 403
        done = client.post(path, headers=as_role("officer"), json={"reason": "retrained"})
        assert done.status_code == 200
        assert ask(client, as_role("consumer"), row).status_code == 200
        again = client.post(path, headers=as_role("officer"), json={"reason": "again"})
        assert (again.status_code, again.json()["code"]) == (404, "alarms.not_found")
    (entry,) = lab.entries("alarm.closed")
    assert (entry["leaf_index"], entry["body"]["role"]) == (done.json()["entry"], "officer")


DRIFT = {"model": "toy", "measure": "psi_age", "value": "0.31", "threshold": "0.2", "window_s": 3600}


def test_drift_job_raises_an_alarm_and_the_model_answers_no_more(lab, as_role, row):
    with TestClient(create_app(lab.settings(rules_follow_s=0.01), clock=lab.clock)) as client:
        done = client.post("/v1/alarms", headers=as_role("scientist"), json=DRIFT)
        assert done.status_code == 201
        denied = wait_until(lambda: ask(client, as_role("consumer"), row).json().get("policies"))
        assert denied == ["drift-alarm-open"]
        (shown,) = client.get("/v1/alarms", headers=as_role("officer")).json()["alarms"]
        assert (shown["alarm"], shown["measure"]) == (done.json()["alarm"], "psi_age")


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"model": "none"}, 404), ({"kind": "extraction"}, 422), ({"value": "high"}, 422),
        ({"value": "1e9"}, 422), ({"measure": "PSI; DROP"}, 422), ({"window_s": -1}, 422),
        ({"principal": "p-1"}, 422),
    ],
    ids=str,
)  # fmt: skip
def test_alarm_that_is_none_is_no_entry(client, lab, as_role, changed, status):
    reply = client.post("/v1/alarms", headers=as_role("operator"), json={**DRIFT, **changed})
    assert reply.status_code == status
    assert lab.entries("alarm.raised") == []


@pytest.mark.parametrize(("kind", "model"), [("extraction", "toy"), ("drift", "other")])
def test_alarm_of_another_kind_or_model_stops_nothing(lab, as_role, row, kind, model):
    lab.coordinator.append(alarm(1, kind, model), "api")
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert ask(client, as_role("consumer"), row).status_code == 200


def test_alarm_raised_while_a_server_runs_counts_within_seconds(lab, as_role, row):
    with TestClient(create_app(lab.settings(rules_follow_s=0.05), clock=lab.clock)) as client:
        assert ask(client, as_role("consumer"), row).status_code == 200
        lab.coordinator.append(alarm(1), "api")
        wait_until(lambda: ask(client, as_role("consumer"), row).status_code != 200)


# the charter's terms


def live_client(lab, **changed):
    lab.version, lab.charter = lab.live(name="second", **changed)
    return TestClient(create_app(lab.settings(), clock=lab.clock), raise_server_exceptions=False)


def second(client, headers, row, **more):
    return client.post(
        "/v1/models/second/predict", headers=headers, json={"purpose": "triage", "rows": [row], **more}
    )


def test_version_is_too_old_the_day_after_its_last(lab, as_role, row):
    with live_client(lab, max_age_days=30) as client:
        lab.clock.forward(days=30, hours=23)
        assert second(client, as_role("consumer"), row).status_code == 200
        lab.clock.forward(hours=2)
        assert second(client, as_role("consumer"), row).json()["policies"] == ["version-too-old"]


def test_clock_that_is_set_back_makes_no_version_younger_than_new():
    from datetime import UTC, datetime

    assert age_days("2026-11-29T12:00:00Z", datetime(2026, 11, 1, tzinfo=UTC)) == 0


def test_region_of_the_key_must_be_the_charters(lab, as_role, row):
    europe = {"Authorization": f"Bearer {lab.key('consumer', region='eu')}"}
    with live_client(lab, regions=["ch", "eu"]) as client:
        assert second(client, as_role("consumer"), row).json()["policies"] == ["region-outside-charter"]
        assert second(client, europe, row).status_code == 200
    assert lab.entries("prediction")[-1]["body"]["region"] == "eu"


def test_legal_basis_is_asked_for_and_recorded(lab, as_role, row):
    with live_client(lab, legal_basis="required") as client:
        refused = second(client, as_role("consumer"), row)
        assert refused.json()["policies"] == ["legal-basis-missing"]
        assert second(client, as_role("consumer"), row, legal_basis="public_task").status_code == 200
        assert lab.entries("prediction")[-1]["body"]["legal_basis"] == "public_task"
        for basis in ("because", "Consent", ""):
            assert second(client, as_role("consumer"), row, legal_basis=basis).status_code == 422


def test_consent_names_itself_and_goes_to_the_vault_alone(lab, as_role, row):
    with live_client(lab, legal_basis="required") as client:
        unnamed = second(client, as_role("consumer"), row, legal_basis="consent", subject="MRN-1")
        assert unnamed.json()["policies"] == ["consent-not-named"]
        nobody = second(client, as_role("consumer"), row, legal_basis="consent", consent="form-77")
        assert nobody.status_code == 422
        assert "subject" in nobody.json()["detail"]
        given = second(
            client, as_role("consumer"), row, legal_basis="consent", consent="form-77", subject="MRN-1"
        )
        assert given.status_code == 200
        entry = lab.entries("prediction")[-1]
        assert "form-77" not in str(lab.entries())
        assert "legal_basis" not in entry["body"]
        opened = client.get(f"/v1/audit/entries/{entry['leaf_index']}/opened", headers=as_role("officer"))
        assert "form-77" in opened.text
        assert '"consent"' in opened.text


def test_tester_tries_a_candidate_and_nobody_else_does(lab, as_role, row):
    digest = lab.publish_charter(name="second")
    version = lab.register(digest, model="second", weights=[1.0] * 7)
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert second(client, as_role("consumer"), row).json()["policies"] == ["version-not-live"]
        tried = second(client, as_role("tester"), row, version=version)
        assert tried.json()["decision"]["policies"] == ["testers-may-try-versions"]
        body = lab.entries("prediction")[-1]["body"]
        assert (body["role"], body["transition"]) == ("tester", ZERO_DIGEST)


def test_flood_of_alarms_is_bounded_and_hides_no_drift(lab, monkeypatch):
    import server.rules as rules_module

    monkeypatch.setattr(rules_module, "MAX_OPEN_ALARMS", 3)
    for number in range(6):
        lab.coordinator.append(alarm(number, "extraction"), "api")
    lab.coordinator.append(alarm(9), "api")
    rules = RulesInForce(lab.coordinator.ledger)
    rules.refresh()
    assert [found.kind for found in rules.open_alarms()] == ["extraction"] * 3 + ["drift"]
    assert rules.drift_alarms("toy") == 1


def test_alarm_closed_twice_or_never_raised_is_nothing(lab):
    rules = RulesInForce(lab.coordinator.ledger)
    closing = AlarmClosed(
        alarm="ab" * 16, kind="drift", model="toy", principal="p", role="officer", reason=""
    )
    lab.coordinator.append(closing, "api")
    rules.refresh()
    assert rules.open_alarms() == ()
