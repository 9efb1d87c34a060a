"""The verifier on decisions with legal effect, legal basis, region, the rules' text, and testers' answers."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from typing import Any

import pytest

from audit.entries import ZERO_DIGEST, Prediction, decode_entry, signing_payload
from audit.keys import SigningKey
from audit.merkle import hash_leaf
from audit.serving_bodies import PolicyChanged, PredictionReviewed
from audit.verify import Report, Verdict, Word
from tests.audit_verify.world import World

REVIEW, DECISION = "The review by a person", "The decision to answer"
RULES = '@id("consumer-may-predict") permit (principal, action, resource);'


class Court(World):
    """A federation whose charter may ask for more, and which reviews and changes rules."""

    def __init__(self, body: dict[str, Any] | None = None, **terms: Any) -> None:
        lie = {"prediction": lambda _, given: dataclasses.replace(given, **(body or {}))}
        super().__init__(rounds=2, charter_changes=lambda document: document.update(terms), before=lie)

    def told(self, change: Any = None) -> tuple[int, list[dict[str, str]]]:
        digest = self.train()
        live = self.approve(digest, self.register(digest))
        if change is not None:
            self.append(change(self))
        return self.predict(digest, live)

    def review(self, index: int, *, key: SigningKey | None = None, **changed: Any) -> None:
        leaf = self.log.leaves[index]
        stored = decode_entry(leaf)
        prediction: Prediction = stored.body
        body = PredictionReviewed(
            decision=stored.event_id, prediction=hash_leaf(leaf).hex(), model=prediction.model,
            version=prediction.version, outcome="confirmed", reason="", principal="p-officer", role="officer",
            officer="" if key is None else key.text, signature="",
        )  # fmt: skip
        body = dataclasses.replace(body, **changed)
        self.append(body if key is None else sealed(body, key))

    def judged(self, index: int, opened: Any) -> Report:
        return self.report(self.evidence(index, opened=opened))


def sealed(body: Any, key: SigningKey) -> Any:
    return dataclasses.replace(body, signature=base64.b64encode(key.sign(*signing_payload(body))).decode())


def rules(world: Court, *, text: str = RULES, key: SigningKey | None = None, **changed: Any) -> PolicyChanged:
    officer = key or world.officer
    body = PolicyChanged(
        policy_set=hashlib.sha256(text.encode()).hexdigest(), schema_digest="ab" * 32, text=text,
        previous_change=ZERO_DIGEST, officer=officer.text, reason="", signature="",
    )  # fmt: skip
    return sealed(dataclasses.replace(body, **changed), officer)


@pytest.fixture
def court() -> Court:
    return Court(decisions="legal_effect")


def test_without_legal_effect_no_review_is_needed():
    world = Court()
    report = world.judged(*world.told())
    assert report.verdict is Verdict.VALID
    assert report.step(REVIEW).word is Word.PROVED


def test_unreviewed_decision_with_legal_effect_is_incomplete(court):
    report = court.judged(*court.told())
    step = report.step(REVIEW)
    assert (report.verdict, step.word, step.code) == (Verdict.INCOMPLETE, Word.NO_EVIDENCE, "review.none")
    assert "not final" in step.detail


def test_decision_that_an_officer_signed_is_valid_and_names_them(court):
    index, opened = court.told()
    court.review(index, key=court.officer)
    report = court.judged(index, opened)
    assert (report.verdict, report.step(REVIEW).word) == (Verdict.VALID, Word.PROVED)
    assert "Ada" in report.step(REVIEW).detail


def test_unsigned_review_is_attested_by_the_operator_alone(court):
    index, opened = court.told()
    court.review(index)
    step = court.judged(index, opened).step(REVIEW)
    assert (step.word, step.code) == (Word.ATTESTED, "review.unsigned")


LIES = {
    "overturned": ({"outcome": "overturned"}, True, "review.overturned"),
    "an outcome that is none": ({"outcome": "maybe"}, True, "review.outcome"),
    "of another model": ({"model": "other"}, True, "review.other_decision"),
    "of another decision": ({"decision": "ab" * 16}, True, "review.other_decision"),
    "by the holder of another role's key": ({"role": "consumer"}, False, "review.not_an_officer"),
    "without a signature": ({"officer": "OFFICER"}, False, "review.signature"),
}


@pytest.mark.parametrize("name", LIES)
def test_review_that_lies_fails(court, name):
    changed, is_signed, code = LIES[name]
    changed = {field: court.officer.text if value == "OFFICER" else value for field, value in changed.items()}
    index, opened = court.told()
    court.review(index, key=court.officer if is_signed else None, **changed)
    step = court.judged(index, opened).step(REVIEW)
    assert (step.word, step.code) == (Word.FAIL, code)


def test_review_under_another_version_does_not_count(court):
    index, opened = court.told()
    court.review(index, key=court.officer, version="ab" * 32)
    assert court.judged(index, opened).step(REVIEW).code == "review.none"


def test_review_by_a_stranger_fails(court):
    index, opened = court.told()
    court.review(index, key=SigningKey.generate())
    assert court.judged(index, opened).step(REVIEW).code == "review.not_an_officer"


def test_reviews_that_contradict_each_other_fail(court):
    index, opened = court.told()
    court.review(index, key=court.officer)
    court.review(index, key=court.second_officer, outcome="overturned")
    data = court.evidence(index, opened=opened)
    assert court.report(data).step(REVIEW).code == "review.contradicted"


def test_review_of_another_prediction_does_not_count(court):
    digest = court.train()
    live = court.approve(digest, court.register(digest))
    first, _ = court.predict(digest, live)
    second, opened = court.predict(digest, live)
    court.review(first, key=court.officer)
    assert court.judged(second, opened).step(REVIEW).code == "review.none"


@pytest.mark.parametrize(
    ("terms", "body", "code"),
    [
        ({"legal_basis": "required"}, {}, "prediction.legal_basis"),
        ({"legal_basis": "required"}, {"legal_basis": "because"}, "prediction.legal_basis"),
        ({}, {"legal_basis": "because"}, "prediction.legal_basis"),
        ({"regions": ["eu"]}, {}, "prediction.region"),
        ({"regions": ["eu"]}, {"region": "us"}, "prediction.region"),
    ],
)
def test_decision_against_the_charters_terms_fails(terms, body, code):
    world = Court(body, **terms)
    step = world.judged(*world.told()).step(DECISION)
    assert (step.word, step.code) == (Word.FAIL, code)


def test_decision_within_the_charters_terms_is_valid():
    world = Court(
        {"legal_basis": "public_task", "region": "eu"}, legal_basis="required", regions=["ch", "eu"]
    )
    assert world.judged(*world.told()).verdict is Verdict.VALID


DIGEST = hashlib.sha256(RULES.encode()).hexdigest()


def test_rules_that_decided_are_named_with_their_officer():
    world = Court({"policy_set": DIGEST})
    report = world.judged(*world.told(rules))
    assert report.verdict is Verdict.VALID
    assert "by the rules that Ada put in force in entry" in report.step(DECISION).detail


def test_rules_of_nobody_are_not_named():
    world = Court()
    assert "put in force" not in world.judged(*world.told(rules)).step(DECISION).detail


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (lambda world: rules(world, key=SigningKey.generate()), "rules.not_an_officer"),
        (lambda world: rules(world, text=RULES + " ", policy_set=DIGEST), "rules.text"),
        (lambda world: dataclasses.replace(rules(world), reason="x"), "rules.signature"),
    ],
    ids=["stranger", "other text", "changed afterwards"],
)
def test_rules_that_lie_fail(made, code):
    world = Court({"policy_set": DIGEST})
    step = world.judged(*world.told(made)).step(DECISION)
    assert (step.word, step.code) == (Word.FAIL, code)


def test_policy_that_the_rules_do_not_hold_fails():
    world = Court({"policy_set": DIGEST, "policies": ("everybody-may",)})
    assert world.judged(*world.told(rules)).step(DECISION).code == "rules.no_such_policy"


def test_testers_answer_by_a_candidate_is_never_valid():
    world = Court({"role": "tester", "transition": ZERO_DIGEST})
    report = world.judged(*world.told())
    assert report.verdict is Verdict.INCOMPLETE
    assert report.step("The chain of references").code == "prediction.test_only"


def test_testers_answer_by_what_was_approved_and_not_live_is_never_valid():
    world = Court({"role": "tester"})
    digest = world.train()
    approved = world.move(digest, world.register(digest), "candidate", "approved")
    report = world.judged(*world.predict(digest, approved))
    assert (report.verdict, report.step(DECISION).code) == (Verdict.INCOMPLETE, "prediction.test_only")


def test_consumers_answer_by_what_was_not_live_still_fails():
    world = Court()
    digest = world.train()
    approved = world.move(digest, world.register(digest), "candidate", "approved")
    report = world.judged(*world.predict(digest, approved))
    assert report.verdict is Verdict.INVALID


CHANGES = [
    ({"decisions": "support"}, "decisions"), ({"decisions": 1}, "decisions"), ({"regions": []}, "regions"),
    ({"legal_basis": "maybe"}, "legal_basis"), ({"regions": ["eu", "ch"]}, "regions"),
    ({"regions": ["EU"]}, "regions"), ({"regions": "eu"}, "regions"), ({"max_age_days": 0}, "max_age_days"),
    ({"max_age_days": "9"}, "max_age_days"), ({"max_age_days": True}, "max_age_days"),
]  # fmt: skip


@pytest.mark.parametrize(("terms", "field"), CHANGES, ids=str)
def test_terms_that_are_none_make_no_charter(terms, field):
    from audit.charter_view import CharterFormError

    with pytest.raises(CharterFormError, match=field):
        Court(**terms)
