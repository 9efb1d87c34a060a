"""Decisions with legal effect: not final until an officer says so, once, by their own key or not."""

from __future__ import annotations

import base64
import threading
from dataclasses import asdict, replace

import pytest
from starlette.testclient import TestClient

from audit.entries import signing_payload
from audit.keys import SigningKey
from audit.serving_bodies import PredictionReviewed
from server.app import create_app

NAME = "verdicts"


@pytest.fixture
def court(lab):
    """A server whose second model decides with legal effect."""
    lab.version, lab.charter = lab.live(name=NAME, decisions="legal_effect")
    with TestClient(create_app(lab.settings(), clock=lab.clock), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def decided(court, as_role, row):
    return ask(court, as_role("consumer"), row).json()


def ask(client, headers, row, model=NAME, **more):
    body = {"purpose": "triage", "rows": [row], **more}
    return client.post(f"/v1/models/{model}/predict", headers=headers, json=body)


def record(client, headers, decision, **more):
    return client.post(f"/v1/reviews/{decision}", headers=headers, json={"outcome": "confirmed", **more})


def signed(client, as_role, named, key, outcome="confirmed", **changed) -> dict[str, str]:
    found = client.get(f"/v1/reviews/{named}", headers=as_role("officer")).json()
    body = PredictionReviewed(
        decision=named, prediction=found["entry"]["leaf_hash"], model=found["model"],
        version=found["version"], outcome=outcome, reason="", principal=found["reviewer"]["principal"],
        role="officer", officer=key.text, signature="",
    )  # fmt: skip
    signature = key.sign(*signing_payload(replace(body, **changed)))
    return {"outcome": outcome, "officer": key.text, "signature": base64.b64encode(signature).decode()}


def test_answer_says_that_it_needs_a_review_and_is_not_final(court, lab, as_role, decided):
    assert decided["review_required"] is True
    assert decided["review"]["final"] is False
    assert decided["decision"]["policies"] == ["consumers-may-predict", "legal-effect-needs-a-review"]
    shown = court.get(decided["review"]["url"], headers=as_role("consumer")).json()
    assert (shown["review_required"], shown["final"], shown["review"]) == (True, False, None)
    assert shown["entry"] == {name: decided["entry"][name] for name in ("leaf_index", "leaf_hash")}
    assert decided["review"]["id"] == shown["decision"]


def test_officer_confirms_and_it_is_final_for_whoever_asked(court, lab, as_role, decided):
    decision = decided["review"]["id"]
    done = record(court, as_role("officer"), decision, reason="file 12")
    assert (done.status_code, done.json()["final"]) == (201, True)
    shown = court.get(decided["review"]["url"], headers=as_role("consumer")).json()
    assert (shown["final"], shown["review"]["outcome"]) == (True, "confirmed")
    (entry,) = lab.entries("prediction.reviewed")
    assert entry["leaf_index"] == shown["review"]["leaf_index"]
    assert entry["body"]["prediction"] == decided["entry"]["leaf_hash"]
    assert (entry["body"]["officer"], entry["body"]["signature"]) == ("", "")


def test_overturned_decision_is_never_final(court, as_role, decided):
    done = record(court, as_role("officer"), decided["review"]["id"], outcome="overturned").json()
    assert (done["final"], done["review"]["outcome"]) == (False, "overturned")


def test_officers_own_signature_is_checked_and_kept(court, lab, as_role, decided):
    decision = decided["review"]["id"]
    done = record(court, as_role("officer"), decision, **signed(court, as_role, decision, lab.officer))
    assert done.status_code == 201
    assert lab.entries("prediction.reviewed")[0]["body"]["officer"] == lab.officer.text


def test_review_is_said_once(court, lab, as_role, decided):
    decision = decided["review"]["id"]
    assert record(court, as_role("officer"), decision).status_code == 201
    again = record(court, as_role("officer"), decision, outcome="overturned")
    assert (again.status_code, again.json()["code"]) == (409, "reviews.done")
    assert len(lab.entries("prediction.reviewed")) == 1


def test_officers_who_disagree_at_once_leave_one_word(court, lab, as_role, decided):
    codes = []

    def say(outcome: str) -> None:
        codes.append(record(court, as_role("officer"), decided["review"]["id"], outcome=outcome).status_code)

    threads = [threading.Thread(target=say, args=(word,)) for word in ("confirmed", "overturned") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [201, 409, 409, 409, 409, 409]
    assert len(lab.entries("prediction.reviewed")) == 1


@pytest.mark.parametrize("role", ["consumer", "node", "scientist", "operator", "tester"])
def test_nobody_but_an_officer_reviews(court, lab, as_role, decided, role):
    assert record(court, as_role(role), decided["review"]["id"]).status_code == 403
    assert lab.entries("prediction.reviewed") == []


def test_stranger_does_not_see_whether_a_decision_is_final(court, lab, decided):
    stranger = {"Authorization": f"Bearer {lab.key('consumer')}"}
    assert court.get(decided["review"]["url"], headers=stranger).status_code == 403


def hostile_signatures(court, lab, as_role, decision):
    good = signed(court, as_role, decision, lab.officer)
    yield "of a stranger", signed(court, as_role, decision, SigningKey.generate())
    yield "over another outcome", {**good, "outcome": "overturned"}
    yield "over another decision", signed(court, as_role, decision, lab.officer, decision="ab" * 16)
    yield "over another entry", signed(court, as_role, decision, lab.officer, prediction="ab" * 32)
    yield "over another person", signed(court, as_role, decision, lab.officer, principal="p-other")
    yield "over another reason", {**good, "reason": "changed"}
    yield "none at all", {**good, "signature": ""}
    yield "no base64", {**good, "signature": "!!"}
    yield "without saying whose", {**good, "officer": ""}
    yield "no key", {**good, "officer": "ed25519:x"}


def test_signature_that_is_not_an_officers_over_this_is_no_review(court, lab, as_role, decided):
    decision = decided["review"]["id"]
    for name, told in hostile_signatures(court, lab, as_role, decision):
        reply = record(court, as_role("officer"), decision, **told)
        assert (reply.status_code, reply.json()["code"]) == (422, "reviews.signature"), name
    assert lab.entries("prediction.reviewed") == []


@pytest.mark.parametrize(
    "body", [{"outcome": "maybe"}, {}, {"outcome": "confirmed", "extra": 1}, []], ids=str
)
def test_body_that_is_no_review_is_422(court, as_role, decided, body):
    reply = court.post(decided["review"]["url"], headers=as_role("officer"), json=body)
    assert reply.status_code == 422


def test_decision_that_there_is_not(court, lab, as_role):
    for decision in ("ab" * 16, lab.coordinator.ledger.stored_entry(0).event_id):
        reply = record(court, as_role("officer"), decision)
        assert (reply.status_code, reply.json()["code"]) == (404, "reviews.not_found")


def test_decision_without_legal_effect_has_nothing_to_review(court, lab, as_role, row):
    answer = ask(court, as_role("consumer"), row, model="toy").json()
    assert (answer["review_required"], answer["review"]) == (False, None)
    event = lab.coordinator.ledger.stored_entry(answer["entry"]["leaf_index"]).event_id
    assert court.get(f"/v1/reviews/{event}", headers=as_role("officer")).json()["final"] is True
    reply = record(court, as_role("officer"), event)
    assert (reply.status_code, reply.json()["code"]) == (409, "reviews.not_needed")


TESTERS_WORD = "a tester's answer: nothing may rest on it"


@pytest.mark.parametrize("model", [NAME, "toy"])
def test_testers_answer_is_never_final_and_says_why(court, lab, as_role, row, model):
    answer = ask(court, as_role("tester"), row, model=model).json()
    decision = lab.coordinator.ledger.stored_entry(answer["entry"]["leaf_index"]).event_id
    if model == NAME:
        assert answer["review_required"] is True
        assert (answer["review"]["final"], answer["review"]["reason"]) == (False, TESTERS_WORD)
    for role in ("tester", "officer"):
        shown = court.get(f"/v1/reviews/{decision}", headers=as_role(role)).json()
        assert (shown["final"], shown["reason"]) == (False, TESTERS_WORD)
        assert shown["review_required"] is answer["review_required"]
    for outcome in ("confirmed", "overturned"):
        reply = record(court, as_role("officer"), decision, outcome=outcome)
        assert (reply.status_code, reply.json()["code"]) == (409, "reviews.not_needed")
        assert TESTERS_WORD in reply.json()["detail"]
        assert "no legal effect" not in reply.text
    assert lab.entries("prediction.reviewed") == []


def test_candidates_answer_to_a_tester_is_never_final(court, lab, as_role, row):
    candidate = lab.register(lab.charter, model=NAME, weights=[0.5] * 7)
    answer = ask(court, as_role("tester"), row, version=candidate).json()
    shown = court.get(answer["review"]["url"], headers=as_role("officer")).json()
    assert (shown["final"], shown["reason"]) == (False, TESTERS_WORD)


def test_an_answer_that_a_review_can_make_final_says_no_reason(court, as_role, decided):
    assert decided["review"]["reason"] == ""
    assert court.get(decided["review"]["url"], headers=as_role("officer")).json()["reason"] == ""


def test_decision_about_a_named_person_is_reviewed_without_naming_them(court, lab, as_role, row):
    answer = ask(court, as_role("consumer"), row, subject="MRN-1").json()
    assert record(court, as_role("officer"), answer["review"]["id"]).status_code == 201
    (entry,) = lab.entries("prediction.reviewed")
    assert "MRN-1" not in str(lab.entries())
    assert "subject" not in entry["body"]


def test_commands_sign_and_show_a_review_at_the_home_and_at_the_server(lab, as_role, row, tmp_path):
    """The same use case through the command: an officer's key file signs, the entry bears the signature."""
    from affidavit import main

    lab.version, lab.charter = lab.live(name=NAME, decisions="legal_effect")
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        decision = ask(client, as_role("consumer"), row).json()["review"]["id"]
    lab.coordinator.close()
    key = tmp_path / "key.pem"
    lab.officer.save(key, None)
    home = ["--home", str(lab.folder), "--json"]
    assert main(["review", "show", decision, *home]) == 0
    told = ["--outcome", "confirmed", "--officer", str(key)]
    assert main(["review", "record", decision, *told, *home]) == 0
    assert main(["review", "record", decision, *told, *home]) == 1, "it is the last word"
    from federation.coordinator import Coordinator

    with Coordinator.open(lab.folder / "coordinator", lab.folder / "signer") as coordinator:
        (found,) = [body for _, body in coordinator.bodies(PredictionReviewed)]
    assert asdict(found)["officer"] == lab.officer.text
    assert found.role == "officer"
