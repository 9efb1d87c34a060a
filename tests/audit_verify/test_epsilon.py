from __future__ import annotations

import dataclasses
import math

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from audit.decimals import decimal_text
from audit.entries import MechanismEvent
from audit.epsilon import (
    EpsilonError,
    discretisation_slack,
    epsilon_floor,
    gaussian_epsilon,
    rdp_epsilon,
    recompute,
)

SENSITIVITY = 1 << 30
RELATIONS = {
    "add_remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": NeighboringRelation.REPLACE_ONE,
}


def event(q: float, noise_multiplier: float, steps: int, relation: str = "add_remove") -> MechanismEvent:
    return MechanismEvent(
        mechanism="discrete_gaussian",
        sampling="full" if q == 1 else "poisson",
        sample_rate=decimal_text(q),
        steps=steps,
        sigma_grid=round(noise_multiplier * SENSITIVITY),
        sensitivity_grid=SENSITIVITY,
        dimension=62,
        grid_bits=30,
        relation=relation,
        unit="row",
    )


@pytest.mark.parametrize(
    ("noise_multiplier", "steps", "published"),
    [(5, 100, 9.997), (20, 100, 1.993), (200, 10, 0.0452)],
)
def test_full_batches_give_the_published_epsilon(noise_multiplier, steps, published):
    assert gaussian_epsilon([event(1, noise_multiplier, steps)], 1e-5) == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize(
    ("q", "noise_multiplier", "steps", "published"),
    [(0.01, 1, 1000, 2.101), (0.01, 1, 10000, 6.713), (0.05, 1, 1000, 11.98), (0.25, 5, 1000, 8.24),
     (1, 5, 100, 10.73), (1, 20, 100, 2.166), (0.25, 2, 100, 7.03), (0.25, 20, 100, 0.482)],
)  # fmt: skip
def test_sampled_batches_stay_near_the_published_rdp(q, noise_multiplier, steps, published):
    ours = rdp_epsilon([event(q, noise_multiplier, steps)], 1e-5)
    assert published * 0.995 <= ours <= published * 1.06


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-10])
@pytest.mark.parametrize("noise_multiplier", [3.0, 21.5, 400.0])
def test_the_exact_composition_equals_an_accountant_of_privacy_losses(noise_multiplier, delta):
    ours = gaussian_epsilon([event(1, noise_multiplier, 10), event(1, 2 * noise_multiplier, 20)], delta)
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(GaussianDpEvent(noise_multiplier), 10).compose(
        GaussianDpEvent(2 * noise_multiplier), 20
    )
    assert ours == pytest.approx(accountant.get_epsilon(delta), abs=2e-3, rel=1e-4)


def test_the_exact_composition_solves_its_equation_to_a_millionth():
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 50
    for noise_multiplier, steps, delta in ((5.3, 30, 1e-5), (1.0, 3, 1e-6), (100.0, 30, 1e-6)):
        mu = mpmath.mpf(steps) ** 0.5 / (mpmath.mpf(round(noise_multiplier * SENSITIVITY)) / SENSITIVITY)
        epsilon = gaussian_epsilon([event(1, noise_multiplier, steps)], delta)
        for shift, sign in ((1e-6, -1), (-1e-6, 1)):
            e = mpmath.mpf(epsilon + shift * max(epsilon, 1.0))
            value = mpmath.ncdf(mu / 2 - e / mu) - mpmath.exp(e) * mpmath.ncdf(-mu / 2 - e / mu)
            assert sign * (value - delta) > 0


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
@pytest.mark.parametrize(
    ("q", "noise_multiplier", "steps"), [(0.05, 1, 200), (0.25, 4, 200), (0.01, 0.8, 500)]
)
def test_the_rdp_bound_is_never_below_the_privacy_loss_distribution(q, noise_multiplier, steps, relation):
    # Under replace-one an event states the doubled sensitivity.
    factor = 0.5 if relation == "replace_one" else 1.0
    ours = rdp_epsilon([event(q, factor * noise_multiplier, steps, relation)], 1e-5)
    theirs = PLDAccountant(
        NeighboringRelation.REPLACE_ONE
        if relation == "replace_one"
        else NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=1e-3,
    )
    theirs.compose(PoissonSampledDpEvent(q, GaussianDpEvent(noise_multiplier)), steps)
    pld = theirs.get_epsilon(1e-5)
    assert pld <= ours <= (3 if relation == "replace_one" else 1.35) * pld


@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
@pytest.mark.parametrize(
    ("q", "noise_multiplier", "steps"), [(0.05, 1, 200), (0.25, 4, 200), (0.5, 3, 4), (1, 5, 30)]
)
def test_the_floor_is_just_below_the_privacy_loss_distribution(q, noise_multiplier, steps, relation):
    factor = 0.5 if relation == "replace_one" else 1.0
    ours = epsilon_floor([event(q, factor * noise_multiplier, steps, relation)], 1e-5)
    theirs = PLDAccountant(RELATIONS[relation], value_discretization_interval=1e-3)
    inner = GaussianDpEvent(noise_multiplier)
    theirs.compose(inner if q == 1 else PoissonSampledDpEvent(q, inner), steps)
    pld = theirs.get_epsilon(1e-5)
    assert 0.7 * pld <= ours <= pld


def test_the_floor_of_several_kinds_of_events_is_the_worst_one_s():
    assert epsilon_floor([], 1e-5) == 0
    one, two = event(0.5, 3, 4), event(1, 30, 2)
    assert epsilon_floor([one, two], 1e-5) == pytest.approx(epsilon_floor([one], 1e-5), rel=1e-6)
    with pytest.raises(EpsilonError):
        epsilon_floor([one], 2.0)


def test_integer_orders_agree_with_another_implementation():
    orders = list(range(2, 257))
    accountant = RdpAccountant(orders).compose(
        SelfComposedDpEvent(PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0)), 300)
    )
    assert rdp_epsilon([event(0.1, 2.0, 300)], 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)


def test_epsilon_composes_events_and_never_adds_epsilons():
    parts = [event(1, 20, 25), event(1, 20, 75)]
    whole = gaussian_epsilon([event(1, 20, 100)], 1e-5)
    assert gaussian_epsilon(parts, 1e-5) == pytest.approx(whole, rel=1e-12)
    assert whole < 0.8 * sum(gaussian_epsilon([part], 1e-5) for part in parts)
    assert gaussian_epsilon([], 1e-5) == rdp_epsilon([], 1e-5) == 0


def test_no_event_is_free_and_less_noise_costs_more():
    costs = [gaussian_epsilon([event(1, noise, 30)], 1e-5) for noise in (50, 20, 5, 1, 0.2)]
    assert costs == sorted(costs)
    assert costs[0] > 0
    assert all(rdp_epsilon([event(1, noise, 30)], 1e-5) > gaussian_epsilon([event(1, noise, 30)], 1e-5)
               for noise in (50, 20, 5, 1))  # fmt: skip


def test_a_large_epsilon_is_bounded_by_zcdp_and_says_so():
    bound = recompute([event(1, 0.7, 10)], 1e-5)
    accountant = PLDAccountant(value_discretization_interval=1e-2)
    accountant.compose(GaussianDpEvent(0.7), 10)
    exact = accountant.get_epsilon(1e-5)
    assert (bound.exact, bound.method) == (False, "zCDP upper bound")
    assert exact < bound.value < 1.1 * exact


@pytest.mark.parametrize("q", [1, 0.3])
def test_the_divergence_of_the_discrete_gaussian_is_the_continuous_one_s(q):
    sigma, shift, order = 9.0, 14, 3
    weight = {k: math.exp(-k * k / (2 * sigma**2)) for k in range(-300, 301)}
    total = math.fsum(weight.values())
    moment = math.fsum(
        w / total * ((1 - q) + q * math.exp((2 * k * shift - shift**2) / (2 * sigma**2))) ** order
        for k, w in weight.items()
    )
    continuous = math.fsum(
        math.comb(order, k)
        * (1 - q) ** (order - k)
        * q**k
        * math.exp(k * (k - 1) * shift**2 / (2 * sigma**2))
        for k in range(order + 1)
    )
    assert moment == pytest.approx(continuous, rel=1e-12)


def test_recompute_says_which_method_it_used():
    assert recompute([event(1, 5, 30)], 1e-5).exact
    mixed = recompute([event(1, 5, 30), event(0.1, 5, 30)], 1e-5)
    assert not mixed.exact
    assert "RDP" in mixed.method
    assert mixed.value > recompute([event(1, 5, 30)], 1e-5).value * 0.9


def test_a_grid_too_coarse_for_the_exact_composition_is_bounded_by_zcdp():
    fine = event(1, 20, 30)
    coarse = dataclasses.replace(fine, sigma_grid=2000, sensitivity_grid=100)
    assert recompute([fine], 1e-5).exact
    bound = recompute([coarse], 1e-5)
    assert not bound.exact
    assert gaussian_epsilon([fine], 1e-5) < bound.value < 1.3 * gaussian_epsilon([fine], 1e-5)
    assert discretisation_slack([fine], 2.0) < 1e-12
    assert discretisation_slack([fine], 1000.0) == math.inf


@pytest.mark.parametrize("sigma", [8.0, 20.0, 300.0])
def test_the_discrete_gaussian_is_as_near_the_rounded_one_as_claimed(sigma):
    reach = int(12 * sigma)
    weights = {k: math.exp(-k * k / (2 * sigma**2)) for k in range(-reach, reach + 1)}
    total = math.fsum(weights.values())
    root = sigma * math.sqrt(2)
    distance = math.fsum(
        abs(weight / total - (math.erf((k + 0.5) / root) - math.erf((k - 0.5) / root)) / 2)
        for k, weight in weights.items()
    )
    assert 0 < distance / 2 <= 1 / (16 * sigma**2)


@pytest.mark.parametrize(
    "change",
    [
        {"mechanism": "laplace"},
        {"sampling": "poisson"},
        {"sampling": "full", "sample_rate": "0.5"},
        {"sample_rate": "1.0"},
        {"sampling": "poisson", "sample_rate": "0"},
        {"sampling": "poisson", "sample_rate": "2"},
        {"sampling": "poisson", "sample_rate": "-0.5"},
        {"sigma_grid": 0},
        {"sigma_grid": -(1 << 30)},
        {"sigma_grid": 7},
        {"sensitivity_grid": 0},
        {"steps": 0},
        {"dimension": 0},
        {"relation": "none"},
        {"unit": "hospital"},
    ],
)
def test_an_event_that_nobody_can_account_for_is_refused(change):
    with pytest.raises(EpsilonError, match="event"):
        recompute([dataclasses.replace(event(1, 5, 30), **change)], 1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_outside_zero_and_one_is_refused(delta):
    with pytest.raises(EpsilonError, match="delta"):
        gaussian_epsilon([event(1, 5, 30)], delta)


def test_events_of_different_relations_count_under_the_strictest():
    mixed = [event(1, 5, 10), event(1, 5, 20, "replace_one")]
    alone = gaussian_epsilon([event(1, 5, 20, "replace_one")], 1e-5)
    doubled = gaussian_epsilon([event(1, 2.5, 10, "replace_one"), event(1, 5, 20, "replace_one")], 1e-5)
    assert gaussian_epsilon(mixed, 1e-5) == pytest.approx(doubled)
    assert doubled > alone
    assert rdp_epsilon(mixed, 1e-5) > gaussian_epsilon(mixed, 1e-5) > epsilon_floor(mixed, 1e-5) * 0.99


def test_rows_and_subjects_do_not_compose():
    mixed = [event(1, 5, 10), dataclasses.replace(event(1, 5, 10), unit="subject")]
    for account in (gaussian_epsilon, rdp_epsilon, epsilon_floor, recompute):
        with pytest.raises(EpsilonError, match="unit"):
            account(mixed, 1e-5)
