"""Epsilon as a pure function of events: published values, exact values, relations, and what composes with
what.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

import pytest

from audit.epsilon import EpsilonError, gaussian_epsilon
from federation.accounting import (
    LifetimeFilter,
    calibrate_noise,
    ceil_text,
    check_fits,
    plan_cost,
    plan_report,
    pld_epsilon,
    spent,
)
from federation.charter import Charter
from federation.errors import AccountingError, PlanDoesNotFitError
from federation.mechanism import planned_event, release_event, sensitivity_grid

FINE = 30  # grid bits: rounding then adds nothing to these values


def event(noise, rate=1, steps=1, *, relation="add_remove", unit="row", bits=FINE):
    return release_event(
        noise_multiplier=Decimal(str(noise)),
        sample_rate=Decimal(str(rate)),
        local_steps=steps,
        dimension=10,
        grid_bits=bits,
        relation=relation,
        unit=unit,
    )


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "epsilon"),
    [  # dp-accounting PLD at delta 1e-5, as published with the anchor measurements
        (0.01, 1, 1000, 1.829),
        (0.05, 1, 1000, 10.99),
        (0.25, 2, 100, 6.449),
        (0.25, 4, 200, 3.9493),
        (0.25, 5, 1000, 7.648),
        (1, 5, 100, 9.997),
        (1, 20, 100, 1.993),
    ],
)
def test_pld_gives_the_published_value(rate, noise, steps, epsilon):
    assert pld_epsilon([event(noise, rate, steps)], 1e-5, grid=1e-3) == pytest.approx(epsilon, rel=2e-3)


@pytest.mark.parametrize(
    ("rate", "noise", "steps"), [(0.25, 4, 200), (0.05, 1, 1000), (1, 20, 100), (0.01, 1, 100)]
)
def test_rdp_stays_above_pld(rate, noise, steps):
    cost = spent([event(noise, rate, steps)], 1e-5, grid=1e-3)
    assert cost.pld < cost.rdp < 2 * cost.pld + 0.2


@pytest.mark.parametrize("noise", [2, 3, 20, 200])
def test_full_batch_pld_is_the_exact_gaussian_and_never_below_it(noise):
    events = [event(noise)] * 10
    exact = gaussian_epsilon(events, 1e-5)
    assert exact <= pld_epsilon(events, 1e-5) <= exact * 1.001 + 1e-4


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "replaced"), [(0.05, 1, 1000, 18.74), (0.25, 4, 200, 8.54), (1, 20, 100, 4.38)]
)
def test_relations_stand_as_published(rate, noise, steps, replaced):
    """Replace-one's multiplier is over twice the sensitivity, so the same noise is half the multiplier
    there.
    """
    add = pld_epsilon([event(noise, rate, steps)], 1e-5, grid=1e-3)
    zero = pld_epsilon([event(noise, rate, steps, relation="zero_out")], 1e-5, grid=1e-3)
    one = pld_epsilon([event(noise / 2, rate, steps, relation="replace_one")], 1e-5, grid=1e-3)
    assert zero == pytest.approx(add, rel=1e-9)
    assert one == pytest.approx(replaced, rel=3e-3)


def test_heterogeneous_rounds_compose_events_and_never_add_epsilons():
    events = [event(3 + i % 2, 0.05 + 0.1 * (i % 3), 2) for i in range(24)]
    together = pld_epsilon(events, 1e-5, grid=1e-3)
    alone = {single: pld_epsilon([single], 1e-5, grid=1e-3) for single in set(events)}
    assert max(alone.values()) < together < 0.5 * math.fsum(alone[single] for single in events)


def test_order_of_events_does_not_matter():
    events = [event(3, 0.1, 5), event(6, 1, 2), event(4, 0.3, 1)]
    assert pld_epsilon(events, 1e-5, grid=1e-3) == pld_epsilon(events[::-1], 1e-5, grid=1e-3)


def test_a_mixed_lifetime_counts_under_the_stronger_relation():
    mixed = spent([event(20), event(20, relation="replace_one")], 1e-5, grid=1e-3)
    assert mixed.relation == "replace_one"
    # 20 over one gradient is 10 over two: both events together as replace-one
    twice = spent([event(10, relation="replace_one"), event(20, relation="replace_one")], 1e-5, grid=1e-3)
    assert mixed.pld == pytest.approx(twice.pld, rel=1e-5)


def test_row_and_subject_guarantees_do_not_compose():
    with pytest.raises(AccountingError, match="account them apart"):
        spent([event(3), event(3, unit="subject")], 1e-5)


def test_no_events_cost_nothing():
    assert spent([], 1e-5).pld == 0


def test_a_coarse_grid_is_charged_for_its_discrete_noise():
    fine, coarse = (pld_epsilon([event(1.5, bits=bits)] * 3, 1e-5, grid=1e-3) for bits in (30, 9))
    assert coarse > fine * 1.005


def test_noise_that_the_grid_cannot_carry_is_no_guarantee():
    with pytest.raises(EpsilonError, match="sigma_grid"):
        pld_epsilon([event("0.001", bits=8)], 1e-5)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_no_guarantee_has_no_number(value):
    with pytest.raises(AccountingError):
        ceil_text(value)


@pytest.mark.parametrize(
    ("value", "text"), [(2.99941, "2.9995"), (3.0, "3"), (0.00001, "0.0001"), (0, "0"), (12.5, "12.5")]
)
def test_claims_are_rounded_up(value, text):
    assert ceil_text(value) == text


@pytest.mark.parametrize(
    "terms",
    [
        {"epsilon": 3, "rounds": 30},
        {"epsilon": "0.5", "rounds": 5, "relation": "replace_one"},
        {"epsilon": 8, "rounds": 2, "local_steps": 4, "sample_rate": Decimal("0.5")},
    ],
)
def test_calibrated_noise_meets_epsilon_and_a_little_less_does_not(terms):
    epsilon = Decimal(str(terms.pop("epsilon")))
    noise = calibrate_noise(epsilon=epsilon, delta=1e-5, dimension=10, **terms)

    def cost(multiplier):
        one = event(
            multiplier,
            terms.get("sample_rate", 1),
            terms.get("local_steps", 1),
            relation=terms.get("relation", "add_remove"),
            bits=20,
        )
        return pld_epsilon([one] * terms["rounds"], 1e-5, grid=1e-3)

    assert cost(noise) <= epsilon < cost(noise * Decimal("0.995"))


def test_plan_and_events_give_the_same_epsilon(charter):
    plan = plan_cost(charter)
    released = [planned_event(charter)] * charter.plan.rounds
    assert [site.spent.pld_text for site in plan.sites] == [spent(released, 1e-5).pld_text] * 3


def test_a_plan_that_does_not_fit_says_what_would(charter_text):
    charter = Charter.parse(charter_text.replace("epsilon: 3", "epsilon: 1"))
    cost = plan_cost(charter)
    assert not cost.fits
    wanted = cost.suggested_noise_multiplier
    assert plan_cost(
        Charter.parse(charter.to_yaml().replace("noise_multiplier: 3", f"noise_multiplier: {wanted}"))
    ).fits
    report = plan_report(charter)
    assert f"noise_multiplier: {wanted}" in report
    assert report.count(" NO\n") == 3


def test_report_names_every_site_and_the_unit(charter):
    report = plan_report(charter)
    for words in ("north", "south", "west", "unit row", "add_remove", "delta 0.00001", "yes", "one row"):
        assert words in report


def test_lifetime_filter_stops_at_the_cap_whatever_was_seen_before():
    lifetime = LifetimeFilter(epsilon=Decimal(3), delta=Decimal("0.00001"))
    run = [event(8)] * 5
    spent_so_far: list[object] = []
    runs = 0
    while lifetime.admits(spent_so_far, run):
        spent_so_far = [*spent_so_far, *run]
        runs += 1
    assert runs >= 2
    assert lifetime.spent(spent_so_far) <= 3 < lifetime.spent([*spent_so_far, *run])


def test_lifetime_filter_refuses_another_unit():
    lifetime = LifetimeFilter(epsilon=Decimal(3), delta=Decimal("0.00001"))
    with pytest.raises(AccountingError):
        lifetime.admits([event(8)], [event(8, unit="subject")])


@pytest.mark.parametrize("relation", ["add_remove", "zero_out", "replace_one"])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_planned_sensitivity_is_the_sites_own(relation, precision):
    grid = pytest.importorskip("clients.dp.grid")
    for bits, dimension in ((8, 1), (20, 31), (24, 38_282), (33, 1_000_000)):
        terms = {"grid_bits": bits, "dimension": dimension, "relation": relation, "precision": precision}
        assert sensitivity_grid(**terms) == grid.sensitivity_grid(**terms)


# where the step to whole numbers uses up delta


@pytest.fixture
def coarse(charter_text):
    """300 rounds whose epsilon is so large that a grid of 18 bits uses up delta 10^-6: PLD has no number."""

    def make(epsilon=15, bits=18, noise=8):
        text = charter_text.replace("rounds: 3", "rounds: 300").replace("epsilon: 3", f"epsilon: {epsilon}")
        text = text.replace("noise_multiplier: 3", f"noise_multiplier: {noise}")
        return Charter.parse(text.replace("delta: 1e-5", f"delta: 1e-6\n  grid_bits: {bits}"))

    return make


def test_plan_that_the_charters_accountant_cannot_bound_is_refused_and_says_why(coarse):
    """RDP's 12.98 is a bound below the charter's 15, and counts for nothing: the sites agreed on PLD."""
    with pytest.raises(PlanDoesNotFitError) as caught:
        check_fits(coarse())
    said = str(caught.value)
    assert caught.value.code == "federation.plan_does_not_fit"
    assert "the charter's accountant (pld) cannot bound" in said
    assert "at grid_bits 18, uses up delta" in said
    assert "RDP gives 12.98" in said
    assert "does not count" in said
    assert re.search(r"noise_multiplier: [\d.]+, or grid_bits: (19|20)$", said)


def test_what_is_suggested_instead_fits(coarse):
    charter = coarse()
    cost = plan_cost(charter)
    assert math.isinf(cost.sites[0].spent.pld)
    finer = coarse(bits=cost.suggested_grid_bits)
    check_fits(finer)
    assert math.isinf(plan_cost(coarse(bits=cost.suggested_grid_bits - 1)).sites[0].spent.pld)
    check_fits(coarse(noise=cost.suggested_noise_multiplier))
    assert cost.suggested_noise_multiplier > 8
    report = plan_report(charter)
    assert f"grid_bits: {cost.suggested_grid_bits}" in report
    assert "cannot bound" in report


def test_no_grid_is_suggested_that_would_not_help(coarse):
    """Whatever the grid, these rounds cost more than 12."""
    cost = plan_cost(coarse(epsilon=12))
    assert cost.suggested_grid_bits is None
    assert not cost.fits
    with pytest.raises(PlanDoesNotFitError, match=r"RDP gives 12\.98") as caught:
        check_fits(coarse(epsilon=12))
    assert "grid_bits:" not in str(caught.value)


@pytest.mark.parametrize("rate", [1, "0.25"])
def test_noise_is_found_where_less_of_it_has_no_number(rate):
    """The search passes through noise for which PLD knows no bound, and never returns such."""
    found = calibrate_noise(epsilon=13, delta=1e-7, rounds=200, sample_rate=Decimal(rate), grid_bits=14)
    one = release_event(
        noise_multiplier=found, sample_rate=Decimal(rate), local_steps=1, dimension=1000, grid_bits=14,
        relation="add_remove", unit="row",
    )  # fmt: skip
    assert pld_epsilon([one] * 200, 1e-7) <= 13
