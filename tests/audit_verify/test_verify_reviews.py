"""The verifier on decisions with legal effect, legal basis, region, the rules' text, and testers' answers."""

from __future__ import annotations

import pytest

from audit.entries import ZERO_DIGEST
from audit.keys import SigningKey
from audit.verify import Verdict, Word
from tests.audit_verify.court import Court

REVIEW, DECISION = "The review by a person", "The decision to answer"


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
