"""Releases that an operator, alone or with one site, hides, renumbers or makes look cheaper than they were.

Where the lie cannot be seen from inside one file, the test shows that the report claims no more
than it knows.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from audit.entries import (
    ZERO_DIGEST,
)
from audit.verify import Verdict, Word
from tests.audit_verify.judging import (
    EPSILON,
    ODOMETERS,
    ROUNDS,
    fails,
    says,
    without,
)

# releases that nobody shows


def test_releases_of_a_later_run_are_not_said_to_be_counted(make_world):
    """Another run spends more of the same population before this version is registered; the file hides it."""
    world = make_world()
    digest = world.train("run-1")
    world.train("run-2")
    for hospital in world.hospitals:
        hospital.sequence -= world.charter.rounds  # the claim that hides run-2
    registration = world.register(digest, "run-1")
    index, opened = world.predict(digest, world.approve(digest, registration))
    data = world.evidence(index, opened=opened)
    fails(world.report(data), EPSILON, "epsilon.claimed_lower")
    report = world.report(without(data, lambda i, body: getattr(body, "run", "") == "run-2"))
    text = " ".join(report.text().split())
    assert "first 4 releases of its population" in text
    assert "every release counted once" not in text


def test_a_release_of_a_site_that_a_round_calls_missing_is_only_the_operator_s_word(make_world):
    """West answered round 4, its release was debited; the operator drops the answer and says "missing"."""

    class Dropping(make_world):
        def round(self, run, number, weights, base, previous, aggregator):
            if number < 4:
                return super().round(run, number, weights, base, previous, aggregator)
            west = self.hospital("west")
            self.statement(west, run, number, base, previous, self._update(west, weights))
            everyone, self.hospitals = self.hospitals, self.hospitals[:2]
            self.before["round.completed"] = lambda world, body: replace(body, missing=("west",))
            try:
                return super().round(run, number, weights, base, previous, aggregator)
            finally:
                self.hospitals = everyone

        def _claim(self, hospital, run):
            claim = super()._claim(hospital, run)
            if hospital.name != "west":
                return claim
            low = self.understated()
            return replace(claim, events=3, run_epsilon=low, lifetime_epsilon=low)

        def understated(self):
            from audit.decimals import decimal_text
            from audit.epsilon import recompute

            value = recompute([self.event()] * 3, float(self.charter.privacy.delta)).value
            return decimal_text(round(value + 0.0001, 4))

    report = Dropping().judge()
    step = says(report, ODOMETERS, Word.ATTESTED, "odometer.missing_site")
    assert "west" in step.detail
    assert "round 4" in step.detail


def test_a_site_that_accepted_and_is_not_even_called_missing_is_only_the_operator_s_word(make_world):
    """West was asked for round 1 and answered; the others were told that west takes no part."""

    class Alone(make_world):
        def round(self, run, number, weights, base, previous, aggregator):
            if number == 1:
                west = self.hospitals.pop()
                self.statement(west, run, number, base, previous, self._update(west, weights))
                self.west, self.before["site.statement"] = west, lambda w, b: replace(b, participants=others)
            return super().round(run, number, weights, base, previous, aggregator)

    others = ("east", "north")
    world = Alone()
    index, opened = world.whole()
    world.hospitals.append(world.west)  # still a member, a witness and in the policy
    report = world.report(world.evidence(index, opened=opened))
    assert "west" in says(report, ODOMETERS, Word.ATTESTED, "odometer.missing_site").detail
    assert {line.site for line in report.epsilons} == {"east", "north"}


def test_an_undelivered_release_before_the_run_may_not_be_left_out(make_world):
    world = make_world()
    world.lose_release(world.hospital("west"), "run-0", 1)
    index, opened = world.whole()
    data = world.evidence(index, opened=opened)
    report = world.report(without(data, lambda i, body: type(body).__name__ == "SiteUndelivered"))
    assert report.verdict is not Verdict.VALID
    assert report.step(ODOMETERS).code == "odometer.gap"


def test_interleaved_runs_are_counted_together_or_show_a_gap(make_world):
    """Run-0 and run-1 share each population's odometer, event by event; showing one alone leaves gaps."""

    class Interleaved(make_world):
        other = False

        def round(self, run, number, weights, base, previous, aggregator):
            if run == "run-1" and not self.other:
                for hospital in self.hospitals:
                    body = self.statement(hospital, "run-0", number, "ab" * 32, ZERO_DIGEST, [0] * 7)
                    self.append(body)
            return super().round(run, number, weights, base, previous, aggregator)

    world = Interleaved()
    index, opened = world.whole()
    data = world.evidence(index, opened=opened)
    assert {line.events for line in world.report(data).epsilons} == {8}
    hidden = world.report(without(data, lambda i, body: getattr(body, "run", "") == "run-0"))
    fails(hidden, ODOMETERS, "odometer.gap")


def test_a_population_that_starts_again_within_a_file_is_seen(make_world):
    """A site and the operator reset the odometer: the second run is numbered from 1 once more."""
    world = make_world()
    world.train("run-0")
    west = world.hospital("west")
    west.sequence, west.head = 0, ZERO_DIGEST
    digest = world.train("run-1")
    index, opened = world.predict(digest, world.approve(digest, world.register(digest)))
    fails(world.report(world.evidence(index, opened=opened)), ODOMETERS, "odometer.sequence")


def test_two_sites_may_not_count_one_population_apart(make_world):
    class Shared(make_world):
        def _enrolment(self, hospital):
            hospital.population = "ab" * 16 if hospital.name != "north" else hospital.population
            return super()._enrolment(hospital)

    fails(Shared().judge(), ODOMETERS, "odometer.population_shared")


def test_a_population_renamed_during_its_run_fails(make_world):
    def rename(world, body):
        return replace(body, population="cd" * 16) if body.site == "west" and body.round > 2 else body

    fails(make_world(before={"site.statement": rename}).judge(), ROUNDS, "statement.field")


# what an event is worth


def test_an_earlier_run_under_another_relation_costs_what_it_costs_under_this_one(make_world):
    """Replacing a row moves an add/remove release by two gradients: it weighs twice in the lifetime."""
    world = make_world(charter_changes=lambda c: (c["privacy"].update(relation="replace_one", epsilon="8"),))
    run_0 = replace(world.event(), relation="add_remove")
    run_0 = replace(run_0, sensitivity_grid=run_0.sensitivity_grid // 2, sigma_grid=run_0.sigma_grid // 2)
    for hospital in world.hospitals:
        for number in (1, 2, 3):
            body = world.statement(hospital, "run-0", number, "ab" * 32, ZERO_DIGEST, [0] * 7)
            hospital.sequence, hospital.head = body.sequence - 1, body.previous_event
            world.before["site.statement"] = lambda w, b: replace(b, event=run_0)
            world.append(world.statement(hospital, "run-0", number, "ab" * 32, ZERO_DIGEST, [0] * 7))
            world.before.pop("site.statement")
    digest = world.train("run-1")
    from audit.decimals import decimal_text
    from audit.epsilon import recompute

    plain = [replace(run_0, relation="replace_one")] * 3 + [world.event()] * 4
    low = decimal_text(round(recompute(plain, 1e-5).value + 0.0001, 4))

    def understate(world, body):
        return replace(body, epsilons=tuple(replace(e, lifetime_epsilon=low) for e in body.epsilons))

    world.before["version.registered"] = understate
    index, opened = world.predict(digest, world.approve(digest, world.register(digest)))
    step = fails(world.report(world.evidence(index, opened=opened)), EPSILON, "epsilon.claimed_lower")
    assert "lifetime_epsilon" in step.detail


def test_rows_and_subjects_do_not_add_up(make_world):
    """Run-0 protected rows; nobody knows how many a subject had, so no lifetime holds for a subject."""
    world = make_world(
        charter_changes=lambda c: c["privacy"].update(unit="subject", subject_id="id", max_rows_per_subject=3)
    )
    world.before["site.statement"] = lambda w, b: replace(b, event=replace(b.event, unit="row"))
    for hospital in world.hospitals:
        world.append(world.statement(hospital, "run-0", 1, "ab" * 32, ZERO_DIGEST, [0] * 7))
    world.before.clear()
    index, opened = world.whole()
    fails(world.report(world.evidence(index, opened=opened)), EPSILON, "epsilon.event")


def test_a_sensitivity_that_forgets_the_rounding_of_the_grid_fails(make_world):
    """On a coarse grid, rounding seven coordinates moves a sum by up to three units more."""

    def coarse(charter):
        charter["privacy"]["grid_bits"] = 4

    def smaller(world, body):
        return replace(body, event=replace(body.event, sensitivity_grid=16, sigma_grid=32))

    world = make_world(charter_changes=coarse, before={"site.statement": smaller})
    fails(world.judge(), ROUNDS, "statement.event")


@pytest.mark.parametrize(
    "change",
    [
        {"sigma_grid": 0},
        {"sigma_grid": -(2**53) + 1},
        {"sensitivity_grid": 0},
        {"sensitivity_grid": -1, "sigma_grid": -2},
        {"sensitivity_grid": 2**53 - 1},
        {"steps": 0},
        {"steps": -4},
        {"dimension": 0},
        {"sample_rate": "0.99999999999999999999", "sampling": "full"},
        {"sample_rate": "1.0"},
    ],
    ids=lambda change: ",".join(f"{k}={v}" for k, v in change.items()),
)
def test_extremes_in_an_event_fail(make_world, change):
    def extreme(world, body):
        late = body.round == 4 and body.site == "east"
        return replace(body, event=replace(body.event, **change)) if late else body

    fails(make_world(before={"site.statement": extreme}).judge(), ROUNDS, "statement.event")


def test_a_negative_event_of_an_earlier_run_cannot_lower_the_lifetime(make_world):
    world = make_world()
    west = world.hospital("west")
    world.before["site.statement"] = lambda w, b: replace(b, event=replace(b.event, steps=-3))
    world.append(world.statement(west, "run-0", 1, "ab" * 32, ZERO_DIGEST, [0] * 7))
    world.before.clear()
    index, opened = world.whole()
    fails(world.report(world.evidence(index, opened=opened)), EPSILON, "epsilon.event")
