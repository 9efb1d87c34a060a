"""Who can lie about rounds that were abandoned, and by which code the verifier says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from audit.entries import (
    TYPE_OF,
    RoundAbandoned,
    RunCompleted,
    SiteStatement,
    SiteUndelivered,
    decode_entry,
)
from audit.epsilon import rdp_epsilon
from audit.merkle import hash_leaf
from audit.verify import Verdict, Word
from tests.audit_verify.judging import ODOMETERS, ROUNDS, RUN, assert_caught, once, without
from tests.audit_verify.world import World, up

LOST = 2


class LossyWorld(World):
    """As `World`; round 2 is abandoned after every hospital released for it, and round 3 takes its place."""

    def __init__(self, *, spare=1, lost=(LOST,), **options):
        self.lost, self.shift = lost, 0

        def change(document):
            document["plan"]["spare_rounds"] = spare

        super().__init__(charter_changes=change, **options)

    def round(self, run, number, weights, base, previous, aggregator):
        real = number + self.shift
        if real in self.lost:
            self.shift += 1
            for hospital in self.hospitals:
                body = self.statement(hospital, run, real, base, previous, [0] * self.charter.dimension)
                reported = self.lie(SiteUndelivered(statement=body))
                if reported is not None:
                    self.append(reported)
            abandoned = RoundAbandoned(
                run=run, round=real, reason="not_enough_sites", missing=(), base_model=base,
                previous_round=previous,
            )  # fmt: skip
            abandoned = self.lie(abandoned)
            if abandoned is not None:
                previous = self.append(abandoned)[1]
            return self.round(run, number, weights, base, previous, aggregator)
        return super().round(run, real, weights, base, previous, aggregator)

    def _claim(self, hospital, run):
        claim = super()._claim(hospital, run)
        events = [self.event()] * hospital.sequence
        rdp = up(rdp_epsilon(events, float(self.charter.privacy.delta)))
        return replace(claim, events=len(events), run_epsilon=claim.lifetime_epsilon, run_epsilon_rdp=rdp)


def bodies(world, kind):
    """Each entry of a kind, with its leaf hash."""
    found = [(hash_leaf(leaf).hex(), decode_entry(leaf).body) for leaf in world.log.leaves]
    return [(name, body) for name, body in found if isinstance(body, kind)]


def forged(change, when=lambda body: True, kind=RoundAbandoned, **options):
    return LossyWorld(before={TYPE_OF[kind]: once(change, when)}, **options).judge()


def test_an_honest_run_with_a_round_lost_is_valid_and_says_so():
    report = LossyWorld().judge()
    assert report.verdict is Verdict.VALID, report.text()
    assert "round 2 (not_enough_sites)" in report.step(ROUNDS).detail
    assert report.step(ODOMETERS).word is Word.PROVED


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("base_model", "ab" * 32, "round.abandoned"),  # not what the sites released on
        ("previous_round", "ab" * 32, "round.abandoned"),
        ("round", 3, "round.chain"),
    ],
)
def test_an_abandoned_round_is_what_the_sites_signed(field, value, code):
    assert_caught(forged(lambda body: replace(body, **{field: value})), ROUNDS, code)


def test_an_abandoned_round_is_not_left_out():
    """The next round's statements name it by hash: without it they name a round that was never completed."""
    report = forged(None)
    assert report.verdict is not Verdict.VALID
    assert report.step(ROUNDS).word is Word.FAIL, report.text()


def test_more_rounds_than_the_plan_paid_for_are_found():
    report = LossyWorld(spare=1, lost=(2, 3)).judge()
    assert_caught(report, ROUNDS, "run.rounds")


def test_a_round_that_is_said_to_be_lost_twice_is_found():
    world = LossyWorld()
    index, opened = world.whole()
    ((_, lost),) = bodies(world, RoundAbandoned)
    world.append(lost)
    world.publish()
    assert_caught(world.report(world.evidence(index, opened=opened)), ROUNDS, "round.invented")


def test_a_release_for_a_lost_round_cannot_be_left_out():
    report = forged(None, lambda body: body.statement.site == "east", kind=SiteUndelivered)
    assert report.step(ODOMETERS).code == "odometer.gap", report.text()
    assert report.verdict is Verdict.INVALID


def test_a_run_may_not_end_in_a_round_that_was_lost():
    world = LossyWorld(
        before={"run.completed": lambda w, body: replace(body, last_round=bodies(w, RoundAbandoned)[0][0])}
    )
    report = world.judge()
    assert report.verdict is Verdict.INVALID
    assert any(step.code == "verify.wrong_kind" for step in report.failures), report.text()


def test_a_run_that_says_it_completed_its_spare_rounds_too_is_found():
    report = forged(lambda body: replace(body, rounds=body.rounds + 1), kind=RunCompleted)
    assert_caught(report, RUN, "run.rounds")


def test_without_the_entry_nothing_is_proved_of_the_rounds_before():
    world = LossyWorld()
    index, opened = world.whole()
    world.publish()
    data = without(world.evidence(index, opened=opened), lambda _, body: isinstance(body, RoundAbandoned))
    report = world.report(data)
    assert report.step(ROUNDS).word is Word.NO_EVIDENCE, report.text()
    assert report.step(ROUNDS).code == "verify.entry_missing"


def test_statements_of_a_lost_round_that_reached_the_log_are_accounted_for():
    """A coordinator died between the statements and the end, and the round was lost when it went on."""

    class Died(LossyWorld):
        def lie(self, body):
            body = super().lie(body)
            if isinstance(body, SiteUndelivered) and body.statement.site == "east":
                return body.statement
            return body

    world = Died()
    report = world.judge()
    assert report.step(ROUNDS).word is Word.PROVED, report.text()
    assert [body.round for _, body in bodies(world, SiteStatement) if body.site == "east"] == [1, 2, 3, 4, 5]
