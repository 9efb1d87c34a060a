"""Rounds that give no model, and the spare ones that a charter declares for them."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from audit.charter_parts import CharterFormError
from audit.charter_view import read_charter
from audit.entries import (
    RoundAbandoned,
    RoundCompleted,
    RunCompleted,
    RunFailed,
    SiteStatement,
    SiteUndelivered,
    event_hash,
)
from federation import registry
from federation.abandoning import late_releases
from federation.accounting import noise_for, plan_cost, plan_report
from federation.charter import Charter
from federation.errors import CharterError, RunFailedError, StatementError
from federation.exchange import Answer
from federation.mechanism import planned_events
from federation.resume import RunPast, undelivered
from federation.runs import find_run
from federation.statements import OdometerHead
from tests.federation.dying import ALL, crash, go, judged, make_strict, prepared

SPARE = "minimum_sites: 3, spare_rounds: {}"


def spare(charter_text, count):
    text = charter_text.replace("round_timeout_s: 4", "round_timeout_s: 1").replace(
        "epsilon: 3", "epsilon: 9"
    )
    return Charter.parse(text.replace("minimum_sites: 2", SPARE.format(count)))


def silent(*rounds, site="west", replies=False):
    """West's messages of these rounds are lost, on their way there or, with `replies`, on their way back."""

    def fault(name, message):
        of_round = name == site and message.metadata.group_id in map(str, rounds)
        return None if of_round and (not replies or message.metadata.reply_to_message_id) else 0.0

    return fault


def numbers(federation):
    return [body.round for body in federation.bodies(RoundCompleted)]


# what a charter says


def test_a_charter_without_spare_rounds_keeps_its_digest(charter_text):
    plain = Charter.parse(charter_text)
    assert "spare_rounds" not in plain.document["plan"]
    assert (
        Charter.parse(charter_text.replace("minimum_sites: 2", "minimum_sites: 2, spare_rounds: 0")) == plain
    )


def test_spare_rounds_are_paid_for_by_the_plan_and_said_when_it_is_checked(charter_text):
    plain, more = spare(charter_text, 0), spare(charter_text, 2)
    assert len(planned_events(more)) == len(planned_events(plain)) + 2
    assert plan_cost(more).sites[0].spent.pld > plan_cost(plain).sites[0].spent.pld
    assert plan_cost(more).sites[0].rounds == 5
    assert "and 2 spare rounds" in plan_report(more)
    assert "spare" not in plan_report(plain)
    view = read_charter(more.canonical())
    assert (view.rounds, view.most_rounds, view.releases) == (3, 5, 5)
    assert Charter.from_canonical(more.canonical().decode()).digest == more.digest
    assert Charter.parse(more.to_yaml()).digest == more.digest


@pytest.mark.parametrize("text", ["-1", "1.5", "true", "1001"])
def test_spare_rounds_are_a_count(charter_text, text):
    with pytest.raises(CharterError, match="spare_rounds"):
        spare(charter_text, text)


@pytest.mark.parametrize("forged", [b"0", b"-1", b'"2"', b"true"])
def test_a_verifier_reads_no_other_spare_rounds(charter_text, forged):
    canonical = spare(charter_text, 2).canonical()
    with pytest.raises(CharterFormError, match="spare_rounds"):
        read_charter(canonical.replace(b'"spare_rounds":2', b'"spare_rounds":' + forged))


# a plain run


def test_a_round_with_too_few_sites_is_followed_by_another_with_debits_of_its_own(federation, charter_text):
    seen = []
    outcome = federation.train(
        charter=spare(charter_text, 1), fault=silent(2, replies=True), on_event=seen.append
    )
    assert numbers(federation) == [1, 3, 4]
    (lost,) = federation.bodies(RoundAbandoned)
    assert (lost.round, lost.reason, lost.missing) == (2, "not_enough_sites", ("west",))
    first = federation.bodies(RoundCompleted)[0]
    assert lost.base_model == first.output_model == federation.bodies(RoundCompleted)[1].base_model
    # west's release of round 2 was lost on its way: it says so itself, and takes part again
    assert sorted(body.statement.site for body in federation.bodies(SiteUndelivered)) == list(ALL)
    again = [body for body in federation.bodies(SiteStatement) if body.round == 3]
    assert [(body.site, body.sequence) for body in again] == [(name, 3) for name in ALL]
    (ended,) = federation.bodies(RunCompleted)
    assert ended.rounds == 3
    view = find_run(federation.coordinator.ledger, outcome.run)
    assert (view.state, view.round, view.abandoned) == ("completed", 3, {2: "not_enough_sites"})
    assert view.undelivered == dict.fromkeys(ALL, 1)
    (told,) = [event.epsilon for event in seen if event.kind == "completed"]
    assert told == pytest.approx(max(view.epsilon.values()))  # of all four rounds
    assert [event.detail for event in seen if event.kind == "abandoned"] == ["not_enough_sites"]
    report = judged(federation)
    assert "abandoned, and counted in every odometer" in report.step("The rounds and their statements").detail
    assert report.step("The odometers").detail.count("1 to 4") == 3
    assert not report.failures, report.text()
    assert not [step for step in report.steps if step.code == "odometer.missing_site"]


def test_the_first_round_may_be_the_one_that_is_lost(federation, charter_text):
    federation.train(charter=spare(charter_text, 1), fault=silent(1))
    assert numbers(federation) == [2, 3, 4]
    assert {body.sequence for body in federation.bodies(SiteStatement) if body.site == "west"} == {1, 2, 3}
    report = judged(federation)
    assert not report.failures, report.text()
    odometers = report.step("The odometers")
    assert odometers.code == "odometer.missing_site"  # nobody can tell whether west released for it
    assert "west in round 1" in odometers.detail


def test_with_no_spare_round_left_the_run_fails_as_it_did(federation, charter_text):
    with pytest.raises(RunFailedError) as caught:
        federation.train(charter=spare(charter_text, 1), fault=silent(1, 2))
    assert (caught.value.round, caught.value.reason) == (2, "not_enough_sites")
    assert [body.round for body in federation.bodies(RoundAbandoned)] == [1, 2]
    assert [body.reason for body in federation.bodies(RunFailed)] == ["not_enough_sites"]
    assert {body.statement.sequence for body in federation.bodies(SiteUndelivered)} == {1, 2}


def test_a_spare_round_that_too_few_could_hold_is_not_opened(federation, charter_text):
    def gone(site, message):
        kind = message.content["header"]["kind"] if message.has_content() else ""
        return None if site == "west" and (message.metadata.group_id == "2" or "undel" in kind) else 0.0

    with pytest.raises(RunFailedError, match="then 2 sites were there"):
        federation.train(charter=spare(charter_text, 5), fault=gone)
    assert [body.round for body in federation.bodies(RoundAbandoned)] == [2]
    assert {body.statement.sequence for body in federation.bodies(SiteUndelivered)} == {2}


@pytest.mark.parametrize("left", ["before the entry", "after the entry", "in the round after it"])
def test_a_coordinator_that_dies_around_an_abandoned_round_goes_on(federation, charter_text, left):
    strict = make_strict(federation)
    run = prepared(strict, spare(charter_text, 1))
    until = {
        "before the entry": lambda past: len(past.written_off) == 2,
        "after the entry": lambda past: bool(past.abandoned),
        "in the round after it": lambda past: bool(past.abandoned) and (3, "north") in past.statements,
    }[left]
    crash(strict, run, until=until, fault=silent(2))
    past = RunPast.read(strict.coordinator.ledger, run)
    assert past.next_round == (2 if left == "before the entry" else 3)
    go(strict, run)
    assert numbers(strict) == [1, 3, 4]
    assert [body.round for body in strict.bodies(RoundAbandoned)] == [2]
    assert {site.sequence for site in strict.sites.values()} <= {3, 4}  # west may never have heard of it
    report = judged(strict)
    assert not report.failures, report.text()
    lost = undelivered(strict.coordinator.ledger, run)
    assert {said.round for said in lost} == {2}
    assert {"north", "south"} <= {said.site for said in lost}


def test_a_release_that_was_logged_before_its_round_was_lost_counts_once(federation, charter_text):
    """The coordinator died after it entered north's statement; when it went on, west was gone."""
    strict = make_strict(federation)
    run = prepared(strict, spare(charter_text, 1))
    crash(strict, run, until=lambda past: (2, "north") in past.statements)
    go(strict, run, fault=silent(2))
    assert numbers(strict) == [1, 3, 4]
    of_north = [body for body in registry.statements(strict.coordinator.ledger) if body.site == "north"]
    assert [body.sequence for body in of_north] == [1, 2, 3, 4]
    assert [body.statement.site for body in strict.bodies(SiteUndelivered)].count("north") == 1
    assert "north" in {said.site for said in undelivered(strict.coordinator.ledger, run)}
    assert find_run(strict.coordinator.ledger, run).undelivered["north"] == 1
    report = judged(strict)
    assert not report.failures, report.text()


# what a site says late


class Late:
    def __init__(self, federation):
        self.site = federation.sites["west"]
        federation.train()
        self.statements = [body for body in federation.bodies(SiteStatement) if body.site == "west"]
        self.run = self.statements[0].run

    def read(self, statements, *, before=4, head=None):
        from audit.entries import body_document

        answer = Answer(site="west", header={"undelivered": [body_document(body) for body in statements]})
        return late_releases(self.run, before, self.site.enrolment(), head or OdometerHead(), answer)


@pytest.fixture
def late(federation):
    return Late(federation)


def test_late_releases_are_taken_in_order_and_once(late):
    first = late.statements[0]
    assert late.read(reversed(late.statements)) == tuple(late.statements)
    head = OdometerHead(sequence=1, event_hash=event_hash(first))
    assert late.read(late.statements, head=head) == tuple(late.statements[1:])
    assert late.read(late.statements, before=3) == tuple(late.statements[:2])  # round 3 may still arrive


@pytest.mark.parametrize(
    "forge",
    [
        lambda late: late.statements[1:],  # one is missing
        lambda late: [replace(late.statements[0], round=2)],  # not what it signed
        lambda late: [replace(late.statements[0], site="north")],
    ],
)
def test_late_releases_that_do_not_hold_are_refused(late, forge):
    with pytest.raises(StatementError):
        late.read(forge(late))


def test_a_site_that_says_nothing_late_is_not_there(late):
    for answer in (Answer(site="west", failure="timeout"), Answer(site="west", header={"undelivered": "x"})):
        with pytest.raises(StatementError, match="undelivered"):
            late_releases(late.run, 4, late.site.enrolment(), OdometerHead(), answer)


def test_the_noise_that_spare_rounds_need_makes_the_plan_fit(charter_text):
    more = spare(charter_text, 10)
    text = more.to_yaml().replace(
        f"noise_multiplier: {more.privacy.noise_multiplier}", f"noise_multiplier: {noise_for(more)}"
    )
    fitted = Charter.parse(text)
    assert plan_cost(fitted).fits
    assert Decimal(plan_cost(fitted).sites[0].spent.pld_text) <= fitted.privacy.epsilon
