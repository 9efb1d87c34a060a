"""Who can lie about a run whose unit is the site, and by which code the verifier says so."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from audit.charter_parts import CharterFormError
from audit.cost_bodies import UNBOUNDED
from audit.entries import RoundCompleted
from audit.epsilon import recompute
from audit.shared_noise import share_grid
from audit.units import row_level
from audit.update_bounds import longest_sum
from audit.verify import Verdict, Word
from tests.audit_verify.judging import (
    EPSILON,
    LINKS,
    ODOMETERS,
    REPLAY,
    ROUNDS,
    assert_caught,
    in_round,
    once,
    says,
    without,
)
from tests.audit_verify.masked_world import MaskedWorld

NOISE = "The noise and the data"


def by_site(relation="replace_one", **changes):
    def change(document):
        privacy = document["privacy"]
        privacy.pop("max_grad_norm")
        privacy |= {"unit": "site", "relation": relation, "max_update_norm": "1", "epsilon": "9", **changes}
        document["plan"] |= {"local_steps": 4, "learning_rate": "1"}
        document["gates"][0]["margin_over_baseline"] = "-1"  # three sites and this noise learn nothing
        for site in document["sites"]:
            site |= {"nominal_rows": 1, "weight": "1"}

    return change


class SiteWorld(MaskedWorld):
    """Every hospital sends what its steps made of the model, as a whole; `longer` times too much."""

    def __init__(self, *, longer=1, relation="replace_one", terms=None, **options):
        self.longer = longer
        super().__init__(charter_changes=by_site(relation, **(terms or {})), **options)

    def event(self):
        return replace(super().event(), steps=1, unit="site")

    def _update(self, hospital, weights):
        values = super()._update(hospital, weights)
        return [self.longer * value for value in values] if hospital.name == "east" else values


@pytest.fixture(scope="module")
def honest():
    world = SiteWorld()
    index, opened = world.whole()
    world.publish()
    return world, world.evidence(index, opened=opened)


def test_an_honest_run_is_valid_and_counts_both_levels(honest):
    world, data = honest
    report = world.report(data)
    assert report.verdict is Verdict.VALID, report.text()
    exact = {n: recompute([world.event()] * n, 1e-5).value for n in (1, world.charter.rounds)}
    lines = {(line.unit, line.site): line for line in report.epsilons}
    assert {unit for unit, _ in lines} == {"site", "row"}
    for (unit, _), line in lines.items():
        assert float(line.run_epsilon) == pytest.approx(exact[line.events], abs=2e-4), unit
        assert line.relation == "replace_one"
    assert report.step(NOISE).word is Word.ATTESTED
    assert "whole update was clipped" in report.step(NOISE).detail


def test_a_row_of_a_zeroed_out_site_costs_twice_the_length():
    world = SiteWorld(relation="zero_out", terms={"epsilon": "20"})
    report = world.judge()
    assert report.verdict is Verdict.VALID, report.text()
    events = [row_level(world.event())] * world.charter.rounds
    spent = {line.unit: float(line.run_epsilon) for line in report.epsilons if line.site == "east"}
    assert spent["row"] == pytest.approx(recompute(events, 1e-5).value, abs=2e-4)
    assert spent["row"] > 1.5 * spent["site"]


def lie(**changes):
    """A statement of round 1 whose event is not the charter's."""

    def change(body):
        found = {k: v(body.event) if callable(v) else v for k, v in changes.items()}
        return replace(body, event=replace(body.event, **found))

    return {"before": {"site.statement": once(change, in_round(1, "east"))}}


@pytest.mark.parametrize(
    "changes",
    [
        {"sigma_grid": lambda e: e.sigma_grid - 1},
        {"sigma_grid": lambda e: e.sigma_grid // 2, "share_grid": lambda e: e.share_grid // 2},
        {"share_grid": lambda e: e.share_grid - 1},
        {"sharers": 3, "share_grid": lambda e: share_grid(e.sigma_grid, 3)},
        {"sharers": 0, "share_grid": 0},
        {"sensitivity_grid": lambda e: e.sensitivity_grid // 2},  # half the bound, or another relation's
        {"sensitivity_grid": lambda e: e.sensitivity_grid - 9},
        {"relation": "zero_out"},
        {"relation": "add_remove"},
        {"unit": "row"},
        {"unit": "subject"},
        {"steps": 4},
        {"sampling": "poisson", "sample_rate": "0.5"},
        {"grid_bits": 21},
        {"site_sensitivity_grid": 1},
        {"dimension": 1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_an_event_that_is_not_the_charter_s_is_found(changes):
    assert_caught(SiteWorld(**lie(**changes)).judge(), ROUNDS, "statement.event")


def test_every_statement_with_less_noise_is_found():
    less = lambda world, body: replace(  # noqa: E731
        body, event=replace(body.event, sigma_grid=body.event.sigma_grid - 5)
    )
    assert_caught(SiteWorld(before={"site.statement": less}).judge(), ROUNDS, "statement.event")


def test_a_round_left_out_of_the_file_is_missed(honest):
    world, data = honest
    data = without(data, lambda _, body: isinstance(body, RoundCompleted) and body.round == 1)
    report = world.report(data)
    assert report.verdict is Verdict.INCOMPLETE
    assert report.step(ROUNDS).word is not Word.PROVED
    assert report.step(EPSILON).word is not Word.PROVED, report.text()
    assert report.step(LINKS).word is not Word.FAIL


def test_a_release_left_out_of_the_odometer_is_missed():
    def skip(body):
        return replace(body, sequence=body.sequence + 1)

    report = SiteWorld(before={"site.statement": once(skip, in_round(2, "east"))}).judge()
    assert report.verdict is not Verdict.VALID
    assert report.step(ODOMETERS).word is not Word.PROVED


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"run_epsilon": "1"}, "epsilon.claimed_lower"),
        ({"lifetime_epsilon": "1"}, "epsilon.claimed_lower"),
        ({"run_epsilon": UNBOUNDED}, "epsilon.claims"),
        ({"unit": "row"}, "epsilon.terms"),
        ({"relation": "zero_out"}, "epsilon.terms"),
        ({"delta": "0.1"}, "epsilon.terms"),
        ({"events": 1}, "epsilon.terms"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_a_claim_that_says_less_is_found(changes, code):
    def change(body):
        first, *others = body.epsilons
        return replace(body, epsilons=(replace(first, **changes), *others))

    report = SiteWorld(before={"version.registered": once(change)}).judge()
    assert_caught(report, EPSILON, code)


def test_a_claim_of_no_bound_at_all_claims_nothing_too_low():
    def change(body):
        first, *others = body.epsilons
        return replace(body, epsilons=(replace(first, lifetime_epsilon=UNBOUNDED), *others))

    says(SiteWorld(before={"version.registered": once(change)}).judge(), EPSILON, Word.PROVED)


def test_a_run_above_the_charter_s_epsilon_is_found():
    report = SiteWorld(terms={"epsilon": "1"}).judge()
    assert_caught(report, EPSILON, "epsilon.over_charter")


def test_a_sum_that_no_clipped_updates_make_is_found():
    """Which site sent it nobody can tell; that somebody did is in the sum itself."""
    step = assert_caught(SiteWorld(longer=20).judge(), REPLAY, "secure.sum_too_long")
    assert "nobody can tell which" in step.detail


def test_the_longest_sum_grows_with_sites_and_with_the_noise_they_say_they_drew():
    terms = {"grid_bits": 20, "precision": "float64", "dimension": 30}
    one = longest_sum(**terms, shares=[1000])
    assert one > 2**20
    assert longest_sum(**terms, shares=[1000, 1000]) > 1.9 * 2**20
    assert longest_sum(**terms, shares=[10**7]) > 10**7 * math.sqrt(30)
    assert longest_sum(**terms | {"precision": "float32"}, shares=[1000]) > one


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("secure_aggregation"),
        lambda d: d["privacy"].update(relation="add_remove"),
        lambda d: d["privacy"].update(sample_rate="0.5"),
        lambda d: d["privacy"].update(max_grad_norm="1"),
        lambda d: d["sites"][0].update(nominal_rows=40, weight="40"),
        lambda d: d["sites"][0].update(weight="2"),
        lambda d: d.update(site_level={"max_update_norm": "5", "epsilon": "9"}),
        lambda d: d["secure_aggregation"].update(tolerated=2),
        lambda d: d["plan"].update(minimum_sites=1),
        lambda d: d.update(sites=d["sites"][:2]),
    ],
)
def test_a_charter_that_makes_it_untrue_is_refused(change):
    def both(document):
        by_site()(document)
        change(document)

    with pytest.raises(CharterFormError):
        MaskedWorld(charter_changes=both)
