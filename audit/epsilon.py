"""Epsilon, recomputed from mechanism events with the standard library alone.

For full batches (q = 1) the composition of Gaussian releases is itself Gaussian and epsilon is exact; for
Poisson sampling (q < 1) integer-order RDP gives an upper bound. `recompute` chooses and says which.

What runs is a discrete Gaussian on the grid. Its Rényi divergences between whole-number shifts equal the
continuous one's (at the orders used here), so RDP needs no correction. The exact composition does: the
discrete Gaussian lies within total variation 1/(16 sigma**2) a coordinate, sigma in grid units, of a
rounded continuous one (sigma >= 8), and rounding is post-processing. So a guarantee of the continuous one
at (epsilon, delta - slack) is one of ours at (epsilon, delta), with slack = (1 + exp(epsilon)) *
sum(steps * dimension) / (16 sigma**2). Where the slack would consume delta (epsilon above about 20), the
RDP bound stands alone. Where sites share the noise, `sigma_grid` is what enough of their shares make
together, and their sum counts as one draw (`audit.shared_noise`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache
from typing import Final

from audit.decimals import DecimalError, parse_decimal
from audit.entries import MechanismEvent, SiteStatement
from audit.errors import AuditError
from audit.shared_noise import SharedNoiseError, check_shares, site_level

MIN_SIGMA_GRID: Final = 8
MAX_ORDER: Final = 256
RELATIONS: Final = ("add_remove", "zero_out", "replace_one")
_UP: Final = 1e-9


class EpsilonError(AuditError):
    """An event is not one this release can account for."""

    code = "audit.epsilon"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpsilonBound:
    """Epsilon at a delta: `value` never understates; infinite when the events give no guarantee."""

    value: float
    method: str
    exact: bool


def epsilon_text(value: float, places: int = 4) -> str:
    """Return epsilon as people read it, rounded up: what is shown is never less than what was spent.

    >>> epsilon_text(5.33871), epsilon_text(0.0), epsilon_text(math.inf)
    ('5.3388', '0.0000', 'inf')
    """
    if not math.isfinite(value):
        return "inf"
    return format(Decimal(value).quantize(Decimal(1).scaleb(-places), rounding=ROUND_CEILING), "f")


def check_event(event: MechanismEvent) -> float:
    """Return the event's sample rate after checking every field.

    Raises:
        EpsilonError: names the field.
    """
    try:
        rate = float(parse_decimal(event.sample_rate))
    except DecimalError as error:
        raise EpsilonError(f"event.sample_rate: {error}") from error
    if event.mechanism != "discrete_gaussian":
        raise EpsilonError(f"event.mechanism: {event.mechanism!r} is not one this release accounts for")
    if event.sampling not in ("full", "poisson") or (event.sampling == "full") != (rate == 1):
        raise EpsilonError(f"event.sampling: {event.sampling!r} at sample rate {event.sample_rate}")
    if not 0 < rate <= 1:
        raise EpsilonError(f"event.sample_rate: {event.sample_rate} is not in (0, 1]")
    if event.relation not in RELATIONS:
        raise EpsilonError(f"event.relation: {event.relation!r} is none of {RELATIONS}")
    if event.unit not in ("row", "subject", "site"):
        raise EpsilonError(f"event.unit: {event.unit!r} is neither row, subject nor site")
    if event.steps < 1 or event.dimension < 1 or event.sensitivity_grid < 1:
        raise EpsilonError("event: steps, dimension and sensitivity_grid are at least 1")
    if event.sigma_grid < MIN_SIGMA_GRID:
        raise EpsilonError(
            f"event.sigma_grid: {event.sigma_grid} is below {MIN_SIGMA_GRID}; use a finer grid"
        )
    try:
        check_shares(event)
    except SharedNoiseError as error:
        raise EpsilonError(str(error)) from error
    return rate


def on_one_footing(events: Sequence[MechanismEvent]) -> list[MechanismEvent]:
    """Return the events under one neighbouring relation, the strictest of theirs.

    Beside a replace-one event, a release stated for one row added or removed counts with two rows'
    sensitivity.

    Raises:
        EpsilonError: rows and subjects are mixed; a guarantee for the one is none for the other.
    """
    if len({event.unit for event in events}) > 1:
        raise EpsilonError("event.unit: events of unit row and of unit subject do not compose")
    if len({event.relation == "replace_one" for event in events}) < 2:
        return list(events)
    return [
        event
        if event.relation == "replace_one"
        else replace(event, relation="replace_one", sensitivity_grid=2 * event.sensitivity_grid)
        for event in events
    ]


def discretisation_slack(events: Iterable[MechanismEvent], epsilon_cap: float) -> float:
    """Return how much delta the step from continuous to discrete noise costs, at epsilon `epsilon_cap`."""
    if epsilon_cap > 700:
        return math.inf
    per_unit = math.fsum(
        event.steps * event.dimension / (16.0 * float(event.sigma_grid) ** 2) for event in events
    )
    return (1.0 + math.exp(epsilon_cap)) * per_unit


def epsilon_with_discretisation(
    events: Sequence[MechanismEvent], delta: float, epsilon_at: Callable[[float], float]
) -> float:
    """Return the discrete mechanism's epsilon, given the continuous one's as a function of delta.

    Iterates epsilon -> epsilon_at(delta - slack(epsilon)) upwards from slack 0 to its least fixed point,
    with one part in 10**9 added; infinite when the slack consumes delta.
    """
    epsilon = epsilon_at(delta)
    for _ in range(200):
        left = delta - discretisation_slack(events, epsilon)
        if left <= 0:
            return math.inf
        following = epsilon_at(left)
        if following <= epsilon * (1 + 1e-12) + 1e-12:
            return max(epsilon, following) * (1 + _UP)
        epsilon = following + 1e-10
    return math.inf


def gaussian_epsilon(events: Sequence[MechanismEvent], delta: float) -> float:
    """Return epsilon of full-batch events, exact but for rounding up by 1e-9 and the discretisation.

    Raises:
        EpsilonError: an event samples (q < 1), or delta is not in (0, 1).

    Source: Balle and Wang 2018, theorem 8; mu composes as the root of the sum of squares (Dong et al. 2019).
    """
    return _full_batch(events, delta)[0]


def _full_batch(events: Sequence[MechanismEvent], delta: float) -> tuple[float, bool]:
    _check_delta(delta)
    if any(check_event(event) != 1 for event in events):
        raise EpsilonError("the exact Gaussian composition is for full batches (q = 1) only")
    if not events:
        return 0.0, True
    events = on_one_footing(events)
    mu = math.sqrt(
        math.fsum(event.steps * (event.sensitivity_grid / event.sigma_grid) ** 2 for event in events)
    )
    exact = epsilon_with_discretisation(events, delta, lambda left: _invert_gaussian(mu, left))
    if math.isfinite(exact):
        return exact, True
    return _zcdp_epsilon(mu * mu / 2, delta), False


def _zcdp_epsilon(rho: float, delta: float) -> float:
    """Return epsilon of a rho-zCDP mechanism (Canonne et al. 2020, proposition 12, over 400 orders)."""
    return max(0.0, min(_from_rdp(rho * a, a, delta) for a in (1.0 + 10 ** (j / 50 - 4) for j in range(400))))


def _from_rdp(rdp: float, order: float, delta: float) -> float:
    return rdp + math.log1p(-1.0 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def rdp_epsilon(events: Sequence[MechanismEvent], delta: float) -> float:
    """Return an upper bound on epsilon for any mix of full-batch and Poisson-sampled events.

    Raises:
        EpsilonError: an event is not accountable, or delta is not in (0, 1).

    Source: Mironov et al. 2019, section 3.3 (integer orders); conversion: Canonne et al. 2020,
    proposition 12.
    """
    _check_delta(delta)
    if not events:
        return 0.0
    kinds: dict[tuple[float, float, bool], int] = {}
    for event in on_one_footing(events):
        key = (check_event(event), event.sigma_grid / event.sensitivity_grid, event.relation == "replace_one")
        kinds[key] = kinds.get(key, 0) + event.steps
    curves = [(steps, _rdp_curve(*key)) for key, steps in kinds.items()]
    total = [
        math.fsum(steps * curve[order - 2] for steps, curve in curves) for order in range(2, MAX_ORDER + 1)
    ]

    best = min(_from_rdp(rdp, order, delta) for order, rdp in enumerate(total, start=2))
    return max(best, 0.0) * (1 + _UP)


def recompute(events: Sequence[MechanismEvent], delta: float) -> EpsilonBound:
    """Return the best epsilon this module can prove for the events, and how."""
    if any(check_event(event) != 1 for event in events):
        return EpsilonBound(value=rdp_epsilon(events, delta), method="RDP upper bound", exact=False)
    value, exact = _full_batch(events, delta)
    method = "exact Gaussian composition" if exact else "zCDP upper bound"
    return EpsilonBound(value=value, method=method, exact=exact)


def needs_rdp(statements: Sequence[SiteStatement]) -> bool:
    """Whether a population's lifetime may only be counted by RDP: sampled releases over several runs.

    Whoever plans a run has seen the results of those before. Rényi divergences add up for plans that follow
    results, as does the Gaussian composition of full batches; a privacy loss distribution of all runs
    together would take the plan as fixed beforehand.
    """
    several = len({statement.run for statement in statements}) > 1
    return several and any(statement.event.sample_rate != "1" for statement in statements)


def epsilon_floor(events: Sequence[MechanismEvent], delta: float) -> float:
    """Return a value that the true epsilon is not below: an attack that anybody could mount on the releases.

    The attacker adds up the releases along the changed row's direction and compares with a threshold t.
    With P(sum > t) and Q(sum > t) on neighbouring data, epsilon is at least log((P - delta) / Q); the
    best of many t counts. Releases of other sampling rates or noise are ignored, which can only lower the
    value.

    Raises:
        EpsilonError: an event is not accountable, or delta is not in (0, 1).
    """
    _check_delta(delta)
    groups: dict[tuple[float, float, bool], int] = {}
    for event in on_one_footing(events):
        key = (check_event(event), event.sigma_grid / event.sensitivity_grid, event.relation == "replace_one")
        groups[key] = groups.get(key, 0) + event.steps
    distance = discretisation_slack(events, 0.0) / 2
    return max(
        (
            _attack(rate, noise, replaced, steps, delta, distance)
            for (rate, noise, replaced), steps in groups.items()
        ),
        default=0.0,
    )


def _attack(
    rate: float, noise_multiplier: float, replaced: bool, steps: int, delta: float, distance: float
) -> float:
    spread = math.sqrt(steps) * noise_multiplier * (2.0 if replaced else 1.0)
    counts = _binomial(steps, rate)
    mean = steps * rate
    reach = math.sqrt(steps * rate * (1 - rate) + spread**2)
    best = 0.0
    for position in range(241):
        threshold = mean + (position / 20 - 4) * reach
        there = math.fsum(p * math.exp(_log_normal_cdf((k - threshold) / spread)) for k, p in counts)
        if replaced:
            here = math.fsum(p * math.exp(_log_normal_cdf((-k - threshold) / spread)) for k, p in counts)
        else:
            here = math.exp(_log_normal_cdf(-threshold / spread))
        gain = there - delta - distance
        if gain > 0:
            best = max(best, math.log(gain / (here + distance + 1e-30)))
    return best * (1 - _UP)


def _binomial(steps: int, rate: float) -> list[tuple[int, float]]:
    """Return (k, probability) of a binomial, without tails of less than one part in 10**30."""
    if rate == 1:
        return [(steps, 1.0)]
    middle, reach = steps * rate, 12 * math.sqrt(steps * rate * (1 - rate)) + 12
    first, last = max(0, math.floor(middle - reach)), min(steps, math.ceil(middle + reach))
    return [
        (
            k,
            math.exp(
                math.lgamma(steps + 1)
                - math.lgamma(k + 1)
                - math.lgamma(steps - k + 1)
                + k * math.log(rate)
                + (steps - k) * math.log1p(-rate)
            ),
        )
        for k in range(first, last + 1)
    ]


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise EpsilonError(f"delta: {delta!r} is not in (0, 1)")


def _log_normal_cdf(x: float) -> float:
    if x > -20:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2.0)))
    # The asymptotic series 1 - 1/x^2 + 3/x^4 - 15/x^6 is an upper bound of the next smaller term's error.
    square = x * x
    series = 1.0 - 1.0 / square + 3.0 / square**2 - 15.0 / square**3 + 105.0 / square**4
    return -0.5 * square - math.log(-x) - 0.5 * math.log(2.0 * math.pi) + math.log(series)


def _gaussian_delta(mu: float, epsilon: float) -> float:
    first = math.exp(_log_normal_cdf(mu / 2 - epsilon / mu))
    second = math.exp(epsilon + _log_normal_cdf(-mu / 2 - epsilon / mu))
    return first - second


def _invert_gaussian(mu: float, delta: float) -> float:
    """Return the least epsilon with delta(epsilon) <= delta, rounded up."""
    if _gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2.0 * math.log(1.0 / delta)) + 1e-6
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if _gaussian_delta(mu, middle) <= delta:
            high = middle
        else:
            low = middle
    return high + _UP


@lru_cache(maxsize=256)
def _rdp_curve(rate: float, noise_multiplier: float, replace_one: bool) -> tuple[float, ...]:
    """Return the RDP of one release at the orders 2 … MAX_ORDER.

    Under replace-one a sampled release is bounded in two ways, and the smaller one counts: through joint
    convexity by an unsampled change of the whole row, and through the data set without the row by the
    weak triangle inequality (Mironov 2017, proposition 11, with p = q = 2). The noise multiplier is over
    the doubled sensitivity.
    """
    if rate == 1:
        return tuple(order / (2.0 * noise_multiplier**2) for order in range(2, MAX_ORDER + 1))
    if not replace_one:
        return tuple(_sampled(rate, noise_multiplier, order) for order in range(2, MAX_ORDER + 1))
    single = 2.0 * noise_multiplier
    curve = []
    for order in range(2, MAX_ORDER + 1):
        exponent = order * (order - 1) / (2.0 * noise_multiplier**2)
        whole = _log_add(math.log1p(-rate), math.log(rate) + exponent) / (order - 1)
        there = _sampled(rate, single, 2 * order)
        back = _sampled(rate, single, 2 * order - 1)
        curve.append(min(whole, (order - 0.5) / (order - 1) * there + back))
    return tuple(curve)


@lru_cache(maxsize=4096)
def _sampled(rate: float, noise_multiplier: float, order: int) -> float:
    """Return the RDP of the Poisson-sampled Gaussian at an integer order."""
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + k * log_rate
        + (order - k) * log_rest
        + k * (k - 1) / (2.0 * noise_multiplier**2)
        for k in range(order + 1)
    ]
    top = max(terms)
    return max((top + math.log(math.fsum(math.exp(term - top) for term in terms))) / (order - 1), 0.0)


def _log_add(a: float, b: float) -> float:
    top = max(a, b)
    return top + math.log(math.exp(a - top) + math.exp(b - top))


def whole_site_epsilon(events: Sequence[MechanismEvent], delta: float) -> float:
    """Return what releases cost a site as a whole; infinite where one of them bounds nothing of a site."""
    if any(event.unit != "site" and event.site_sensitivity_grid < 1 for event in events):
        return math.inf
    return recompute([site_level(event) for event in events], delta).value if events else 0.0
