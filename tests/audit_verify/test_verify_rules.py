"""The verifier on the access rules that a decision names, on how old a version may be, and on testers."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import pytest

from audit.entries import ZERO_DIGEST
from audit.keys import SigningKey
from audit.verify import Report, Step, Verdict, Word
from audit.verify.rules import policies_of
from tests.audit_verify.court import RULES, Court, rules

TITLE, DECISION = "The rules that allowed it", "The decision to answer"
OTHER = '@id("others-may") permit (principal, action, resource);'
ALLOWS = '@id("anything-goes") permit (principal, action, resource);'
FORBIDS = '@id("anything-goes") forbid (principal, action, resource);'


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


DIGEST = digest_of(RULES)


def put_in_force(world: Court, text: str, after: str = ZERO_DIGEST, **changed: Any) -> str:
    """Log a change at the world's time; return its leaf hash."""
    _, leaf_hash = world.append(rules(world, text=text, previous_change=after, **changed))
    return leaf_hash


def decided(world: Court, *texts: str, at: str = "2026-11-23T12:00:00Z") -> Report:
    """The rules follow each other; the decision comes an hour later, or at `at`."""
    digest = world.train()
    live = world.approve(digest, world.register(digest))
    last = ZERO_DIGEST
    for text in texts:
        last = put_in_force(world, text, last)
    world.time = at
    return world.judged(*world.predict(digest, live))


def step(report: Report) -> Step:
    return report.step(TITLE)


def _judged_after(world: Court, made: Any) -> Report:
    return world.judged(*world.told(made))


def test_rules_that_decided_are_named_with_their_officer_and_are_the_operators_word():
    report = decided(Court({"policy_set": DIGEST}), RULES)
    assert report.verdict is Verdict.VALID
    assert (step(report).word, step(report).code) == (Word.ATTESTED, "ok")
    assert "of the rules that Ada put in force in entry" in step(report).detail
    assert "Cedar" not in report.step(DECISION).detail


def test_rules_of_nobody_are_the_operators_word():
    report = decided(Court())
    assert (report.verdict, step(report).word) == (Verdict.VALID, Word.ATTESTED)
    assert "no entry before it holds" in step(report).detail


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
    found = step(_judged_after(Court({"policy_set": DIGEST}), made))
    assert (found.word, found.code) == (Word.FAIL, code)


def test_a_lie_that_is_logged_beside_the_rules_takes_nothing_from_them():
    world = Court({"policy_set": DIGEST})
    digest = world.train()
    live = world.approve(digest, world.register(digest))
    first = put_in_force(world, RULES)
    stranger = SigningKey.generate()
    world.append(rules(world, key=stranger, previous_change=first))
    world.append(rules(world, text=OTHER, key=stranger, previous_change=first))
    world.append(dataclasses.replace(rules(world, text=OTHER, previous_change=first), reason="x"))
    world.append(rules(world, text=OTHER, previous_change="ab" * 32))
    world.time = "2026-11-23T12:00:00Z"
    assert world.judged(*world.predict(digest, live)).verdict is Verdict.VALID


def test_rules_that_were_superseded_fail():
    found = step(decided(Court({"policy_set": DIGEST}), RULES, OTHER))
    assert (found.word, found.code) == (Word.FAIL, "rules.not_in_force")
    assert "had put others in force" in found.detail


def test_rules_that_came_back_are_in_force():
    assert decided(Court({"policy_set": DIGEST}), RULES, OTHER, RULES).verdict is Verdict.VALID


def test_a_worker_may_take_a_minute_to_follow():
    for at, verdict in (("2026-11-23T11:01:00Z", Verdict.VALID), ("2026-11-23T11:01:01Z", Verdict.INVALID)):
        assert decided(Court({"policy_set": DIGEST}), RULES, OTHER, at=at).verdict is verdict
        assert decided(Court(), RULES, at=at).verdict is verdict, "the rules that the server was started with"


def test_rules_that_were_never_in_force_fail_once_others_were():
    found = step(decided(Court({"policies": ("anything-goes",)}), RULES))
    assert (found.word, found.code) == (Word.FAIL, "rules.not_in_force")


@pytest.mark.parametrize(
    "text",
    [
        RULES,
        f"// {ALLOWS}\n{RULES}",
        FORBIDS,
        f"// {ALLOWS}\n{FORBIDS}",
        f'@note("{chr(92)}"{ALLOWS[3:]}") {RULES}',
    ],
    ids=["missing", "a comment", "a forbid", "a comment and a forbid", "a note's text"],
)
def test_a_policy_that_does_not_permit_fails(text):
    world = Court({"policy_set": digest_of(text), "policies": ("anything-goes",)})
    assert step(decided(world, text)).code == "rules.no_such_policy"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        (ALLOWS + FORBIDS, [("anything-goes", "permit"), ("anything-goes", "forbid")]),
        ('@note("x") @id ( "a" ) @b permit(principal,action,resource)when{resource.permit=="forbid;"};',
         [("a", "permit")]),
        ('permit (principal, action, resource);@id("b")forbid(principal, action, resource);',
         [("b", "forbid")]),
        ('@id("a // b") permit (principal, action, resource); // @id("c") permit', [("a // b", "permit")]),
        ('@id("a\\"b") permit (principal, action, resource);', [('a"b', "permit")]),
        ('@id("a', []),
        ("@id(", []),
        ("@", []),
        ('@id("a") resource.permit;', []),
    ],
)  # fmt: skip
def test_policies_are_read_as_cedar_reads_them(text, found):
    assert list(policies_of(text)) == found


def test_shipped_policies_are_read_as_cedar_reads_them():
    import json

    cedarpy = pytest.importorskip("cedarpy")
    from server.access import shipped_policies

    text = shipped_policies().policies
    document = json.loads(cedarpy.policies_to_json_str(text))["staticPolicies"].values()
    wanted = sorted((policy["annotations"]["id"], policy["effect"]) for policy in document)
    assert sorted(policies_of(text)) == wanted


@pytest.mark.parametrize(
    ("at", "code"),
    [
        ("2026-11-26T10:59:59Z", "ok"),
        ("2026-11-26T11:00:59Z", "ok"),  # decided before, written after
        ("2026-11-26T11:01:00Z", "prediction.version_too_old"),
        ("2027-11-26T11:00:00Z", "prediction.version_too_old"),
        ("2026-11-20T11:00:00Z", "ok"),
    ],
)
def test_a_version_answers_for_the_days_of_its_charter_alone(at, code):
    report = decided(Court(max_age_days=2), at=at)
    assert report.step(DECISION).code == code
    assert report.verdict is (Verdict.VALID if code == "ok" else Verdict.INVALID)


def test_testers_answer_by_the_live_version_is_never_valid_either():
    report = decided(Court({"role": "tester"}))
    assert (report.verdict, report.step(DECISION).code) == (Verdict.INCOMPLETE, "prediction.test_only")


def test_each_opened_row_is_told_apart():
    rows = [{"alpha": 6.1, "beta": 5.0, "gamma": 7}, {"alpha": 3, "beta": 2.5, "gamma": 4}]
    world = Court()
    digest = world.train()
    live = world.approve(digest, world.register(digest))
    index, opened = world.predict(digest, live, rows=rows, tree=True)
    one, other = (world.judged(index, [row]).step("The answer") for row in opened)
    assert (one.word, other.word) == (Word.PROVED, Word.PROVED)
    assert "1 of 2 rows opened (row 1: " in one.detail
    assert "1 of 2 rows opened (row 2: " in other.detail
    both = world.judged(index, opened).step("The answer").detail
    assert "row 1: " in both
    assert "; row 2: " in both
    many, opened = world.predict(digest, live, rows=rows * 4)
    world.publish()
    assert "and 5 more)" in world.judged(many, opened).step("The answer").detail
