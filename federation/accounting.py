"""The accountant: epsilon as a pure function of mechanism events, never a sum of epsilons.

PLD composition by dp-accounting gives the number that counts (grid 1e-3 while planning, 1e-4 for a
certificate), RDP stands beside it as an upper check, and full-batch events are also composed exactly. The
step from continuous to discrete noise is charged to delta, by `audit.epsilon`, in all three.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from audit.entries import MechanismEvent
from audit.epsilon import check_event, epsilon_with_discretisation, gaussian_epsilon, rdp_epsilon, recompute
from audit.shared_noise import alone, site_level
from audit.units import row_level, runs_of_people
from federation.errors import AccountingError, PlanDoesNotFitError
from federation.mechanism import planned_event, planned_events, release_event

if TYPE_CHECKING:
    from federation.charter import Charter

PLANNING_GRID: Final = 1e-3
CERTIFICATE_GRID: Final = 1e-4
_COARSE_BEYOND: Final = 50.0  # past this epsilon a fine grid costs seconds and shows nothing
_MOST_NOISE: Final = 1e5
_MOST_EPSILON: Final = 100.0
_LEAST_NOISE: Final = 0.05
_MOST_GRID_BITS: Final = 36
_CLOSE: Final = 1.0005
_STEPS: Final = 40
_ANSWERS: Final = 1024  # deltas that a loss distribution remembers: every site asks the same

Kind = tuple[float, float, int]  # sample rate, noise multiplier for one gradient's sensitivity, steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What events cost at `delta`: `pld` counts, `rdp` is the check beside it."""

    pld: float
    rdp: float
    delta: float
    relation: str
    unit: str
    events: int

    @property
    def pld_text(self) -> str:
        """`pld` rounded up to four decimals, as claimed in the log."""
        return ceil_text(self.pld)

    @property
    def rdp_text(self) -> str:
        return ceil_text(self.rdp)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteCost:
    """What the plan costs one site's population, and whether that is within the charter's epsilon."""

    site: str
    rounds: int
    spent: Spent
    epsilon: Decimal
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCost:
    """The whole plan, before any training."""

    charter: str
    event: MechanismEvent
    sites: tuple[SiteCost, ...]
    warnings: tuple[str, ...]
    suggested_noise_multiplier: Decimal | None  # when the plan does not fit
    suggested_grid_bits: int | None = None  # when it would with a finer grid and the noise that it has
    whole_site: float | None = None  # what the plan costs a site as a whole, where the charter bounds that
    whole_site_fits: bool = True
    alone: float | None = None  # what it costs where all others collude, where sites share the noise
    row: float | None = None  # what it costs one row as a part of its site, where the unit is the site

    @property
    def fits(self) -> bool:
        return self.whole_site_fits and all(site.fits for site in self.sites)


def ceil_text(value: float, places: int = 4) -> str:
    """Return `value` rounded up to `places` decimals, as canonical decimal text; "inf" has none.

    Raises:
        AccountingError: the events give no guarantee at this delta.
    """
    if not math.isfinite(value):
        raise AccountingError("the events give no guarantee at this delta; raise the noise or the delta")
    rounded = Decimal(value).quantize(Decimal(1).scaleb(-places), rounding=ROUND_CEILING)
    text = format(rounded, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def spent(events: Sequence[MechanismEvent], delta: float, *, grid: float = CERTIFICATE_GRID) -> Spent:
    """Return what the events cost together.

    Raises:
        AccountingError: the events are of different units.
        audit.epsilon.EpsilonError: an event cannot be accounted.
    """
    relation, unit = relation_of(events), unit_of(events)
    if not events:
        return Spent(pld=0.0, rdp=0.0, delta=delta, relation=relation, unit=unit, events=0)
    return Spent(
        pld=pld_epsilon(events, delta, grid=grid),
        rdp=rdp_epsilon(events, delta),
        delta=delta,
        relation=relation,
        unit=unit,
        events=len(events),
    )


def relation_of(events: Iterable[MechanismEvent]) -> str:
    """Return the relation under which the events compose: replace_one as soon as one of them uses it."""
    relations = {event.relation for event in events}
    if not relations:
        return "add_remove"
    return "replace_one" if "replace_one" in relations else max(relations)


def unit_of(events: Iterable[MechanismEvent]) -> str:
    """Return the one unit of the events; a row guarantee and a subject guarantee do not compose."""
    units = {event.unit for event in events}
    if len(units) > 1:
        raise AccountingError("events of unit row and of unit subject do not compose; account them apart")
    return units.pop() if units else "row"


def pld_epsilon(events: Sequence[MechanismEvent], delta: float, *, grid: float = CERTIFICATE_GRID) -> float:
    """Return epsilon by privacy loss distributions, never below the exact value where that is known."""
    if not events:
        return 0.0
    for event in events:
        check_event(event)
    relation = relation_of(events)
    if grid < PLANNING_GRID and rdp_epsilon(events, delta) > _COARSE_BEYOND:
        grid = PLANNING_GRID
    loss = _loss(_kinds(events), relation, grid)
    epsilon = epsilon_with_discretisation(events, delta, loss.get_epsilon_for_delta)
    if all(event.sampling == "full" for event in events):
        epsilon = max(epsilon, gaussian_epsilon(events, delta))
    return epsilon


def _kinds(events: Iterable[MechanismEvent]) -> tuple[Kind, ...]:
    counts: Counter[tuple[float, float]] = Counter()
    for event in events:
        gradients = 2 if event.relation == "replace_one" else 1
        multiplier = event.sigma_grid / (event.sensitivity_grid / gradients)
        counts[(float(event.sample_rate), multiplier)] += event.steps
    return tuple(sorted((rate, multiplier, steps) for (rate, multiplier), steps in counts.items()))


@lru_cache(maxsize=64)
def _loss(kinds: tuple[Kind, ...], relation: str, grid: float) -> _Loss:
    try:
        import dp_accounting
        from dp_accounting.pld import pld_privacy_accountant
    except ImportError as error:
        raise AccountingError("PLD needs dp-accounting; install affidavit[accounting]") from error
    neighbours = {
        "add_remove": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        "zero_out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
        "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
    }[relation]
    accountant = pld_privacy_accountant.PLDAccountant(neighbours, grid)
    for rate, multiplier, steps in kinds:
        event = dp_accounting.GaussianDpEvent(multiplier)
        if rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(rate, event)
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, steps))
    return _Loss(accountant)


class _Loss:
    """A composed loss distribution that only answers questions, each of them once."""

    def __init__(self, accountant: object) -> None:
        self._accountant = accountant
        self._answers: dict[float, float] = {}

    def get_epsilon_for_delta(self, delta: float) -> float:
        if delta not in self._answers:
            if len(self._answers) >= _ANSWERS:
                self._answers.clear()
            self._answers[delta] = float(self._accountant.get_epsilon(delta))  # type: ignore[attr-defined]
        return self._answers[delta]


def plan_cost(charter: Charter) -> PlanCost:
    """Return what the plan will cost each site, from the charter alone."""
    from federation._charter_checks import warnings_of

    event, privacy = planned_event(charter), charter.privacy
    events, delta = planned_events(charter), float(privacy.delta)
    total = spent(events, delta)
    whole = None
    if charter.site_level is not None:
        whole = recompute(list(map(site_level, events)), delta).value
    fits = _meets(total.pld, privacy.epsilon)
    suggestion = None if fits else noise_for(charter)
    finer = None if math.isfinite(total.pld) else _finer_grid(charter)
    return PlanCost(
        charter=charter.digest,
        event=event,
        sites=tuple(
            SiteCost(site=name, rounds=charter.most_rounds, spent=total, epsilon=privacy.epsilon, fits=fits)
            for name in charter.site_names
        ),
        warnings=tuple(warnings_of(charter)),
        suggested_noise_multiplier=suggestion,
        suggested_grid_bits=finer,
        whole_site=whole,
        whole_site_fits=whole is None or whole <= float(_promised(charter)),
        alone=None if charter.secure is None else recompute(list(map(alone, events)), delta).value,
        row=recompute(list(map(row_level, events)), delta).value if privacy.by_site else None,
    )


def _promised(charter: Charter) -> Decimal:
    return Decimal(0) if charter.site_level is None else charter.site_level.epsilon


def check_fits(charter: Charter) -> None:
    """Refuse a plan that costs more than its charter promises.

    Raises:
        PlanDoesNotFitError: says by how much, and what noise it needs.
    """
    cost = plan_cost(charter)
    if not cost.whole_site_fits:
        raise PlanDoesNotFitError(
            planned=f"{_shown(cost.whole_site)} for a whole site",
            allowed=str(_promised(charter)),
            noise="(a larger one), or a smaller site_level.max_update_norm",
        )
    if not cost.fits:
        total, bits = cost.sites[0].spent, cost.suggested_grid_bits
        raise PlanDoesNotFitError(
            planned=total.pld_text if math.isfinite(total.pld) else _unbounded(charter, total),
            allowed=str(charter.privacy.epsilon),
            noise=f"{cost.suggested_noise_multiplier}" + ("" if bits is None else f", or grid_bits: {bits}"),
        )


def _unbounded(charter: Charter, total: Spent) -> str:
    """Say why there is no number: RDP's is a bound too, but not of the accountant that the sites agree on."""
    rdp = f"; RDP gives {total.rdp_text}, and does not count" if math.isfinite(total.rdp) else ""
    return (
        f"that the charter's accountant ({charter.privacy.accountant}) cannot bound: the step to noise in "
        f"whole numbers, at grid_bits {charter.privacy.grid_bits}, uses up delta {charter.privacy.delta}{rdp}"
    )


def _finer_grid(charter: Charter) -> int | None:
    """Return the least grid_bits with which the plan fits with the noise that it has, if any does."""
    privacy = charter.privacy
    if charter.secure is not None:  # masked sums have no room for it
        return None
    from federation._charter_checks import check_charter

    for bits in range(privacy.grid_bits + 1, _MOST_GRID_BITS + 1):
        finer = charter.model_copy(update={"privacy": privacy.model_copy(update={"grid_bits": bits})})
        if any(problem.path == "privacy.grid_bits" for problem in check_charter(finer)):
            return None
        events = planned_events(finer)
        if pld_epsilon(events, float(privacy.delta), grid=PLANNING_GRID) <= float(privacy.epsilon):
            return bits if _meets(pld_epsilon(events, float(privacy.delta)), privacy.epsilon) else None
    return None


def _meets(epsilon: float, allowed: Decimal | float) -> bool:
    """Whether the epsilon, rounded up as a certificate states it, is within what is allowed."""
    return math.isfinite(epsilon) and Decimal(ceil_text(epsilon)) <= Decimal(str(allowed))


def noise_for(charter: Charter) -> Decimal:
    """Return the least noise multiplier under which the charter's plan meets its own epsilon."""
    privacy = charter.privacy
    return calibrate_noise(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        rounds=charter.most_rounds,
        local_steps=charter.noised_steps,
        sample_rate=privacy.sample_rate,
        relation=privacy.relation,
        dimension=charter.dimension,
        grid_bits=privacy.grid_bits,
        precision=privacy.precision,
        besides=planned_events(charter)[charter.most_rounds :],
    )


def calibrate_noise(
    *,
    epsilon: Decimal | float,
    delta: Decimal | float,
    rounds: int,
    local_steps: int = 1,
    sample_rate: Decimal | float = 1,
    relation: str = "add_remove",
    dimension: int = 1000,
    grid_bits: int = 20,
    precision: str = "float64",
    besides: Sequence[MechanismEvent] = (),
) -> Decimal:
    """Return the least noise multiplier, to four significant digits upwards, whose certificate meets
    `epsilon`, with the events `besides` in the same run.

    Raises:
        AccountingError: no noise multiplier up to 10^5 does.
    """
    target = float(epsilon)
    if not 0 < target <= _MOST_EPSILON:
        raise AccountingError(f"epsilon {epsilon} is not above 0 and at most {_MOST_EPSILON:g}")

    def cost(multiplier: Decimal, grid: float) -> float:
        event = release_event(
            noise_multiplier=multiplier,
            sample_rate=sample_rate,
            local_steps=local_steps,
            dimension=dimension,
            grid_bits=grid_bits,
            relation=relation,
            unit=besides[0].unit if besides else "row",
            precision=precision,
        )
        events = [*([event] * rounds), *besides]
        if sample_rate == 1 and grid == PLANNING_GRID:
            bound = recompute(events, float(delta))
            return bound.value if bound.exact else math.inf  # a certificate would not bear the other bound
        return pld_epsilon(events, float(delta), grid=grid)

    low, high, above, below = 0.0, 1.0, math.inf, 0.0
    while (below := cost(Decimal(high), PLANNING_GRID)) > target:
        low, high, above = high, high * 2, below
        if high > _MOST_NOISE:
            raise AccountingError(f"no noise multiplier up to {_MOST_NOISE:g} gives epsilon {epsilon}")
    while low == 0.0 and high > _LEAST_NOISE:
        if (found := cost(Decimal(high / 2), PLANNING_GRID)) > target:
            low, above = high / 2, found
        else:
            high, below = high / 2, found
    for _ in range(
        _STEPS
    ):  # epsilon falls almost like a power of the noise: aim between the ends, then a hair above
        if low == 0.0 or high <= low * _CLOSE:
            break
        share = 0.5 if math.isinf(above) else math.log(above / target) / math.log(above / below)
        aim = low * (high / low) ** share
        for guess in (aim * _CLOSE**0.5, aim / _CLOSE**0.5):
            middle = min(max(guess, low * _CLOSE**0.4), high / _CLOSE**0.4)
            found = cost(Decimal(middle), PLANNING_GRID)
            low, above, high, below = (
                (middle, found, high, below) if found > target else (low, above, middle, found)
            )
    chosen = _four_digits(Decimal(high))
    while not _meets(cost(chosen, CERTIFICATE_GRID), epsilon):
        chosen = _four_digits(chosen * Decimal("1.0002"))
    return chosen


def _four_digits(value: Decimal) -> Decimal:
    step = Decimal(1).scaleb(value.adjusted() - 3)
    return value.quantize(step, rounding=ROUND_CEILING)


@dataclass(frozen=True, slots=True, kw_only=True)
class LifetimeFilter:
    """The hard stop over a population's whole life, at one delta that never changes.

    Later runs are chosen after seeing earlier results, so a PLD of the whole would not be valid. A Gaussian
    (GDP) filter is, for full batches, and an RDP filter for any mix: both admit a release exactly while the
    guarantee of all events so far, recomputed with it, stays within the cap (Smith and Thakurta 2022;
    Lécuyer 2021).

    The cap is that of one row's or subject's part: a release whose unit is the site counts with what it
    costs a row in it.
    """

    epsilon: Decimal
    delta: Decimal

    def spent(self, events: Sequence[MechanismEvent]) -> float:
        """Return the filter's own epsilon of the events."""
        return _composed(runs_of_people(events), float(self.delta)) if events else 0.0

    def admits(self, events: Sequence[MechanismEvent], planned: Sequence[MechanismEvent]) -> bool:
        """Whether the whole plan may run on top of the events already debited."""
        people = runs_of_people([*events, *planned])
        unit_of([event for event, _ in people])
        return (_composed(people, float(self.delta)) if people else 0.0) <= float(self.epsilon)


@lru_cache(maxsize=64)
def _composed(runs: tuple[tuple[MechanismEvent, int], ...], delta: float) -> float:
    """Return the epsilon of events: the same for every site of a simulation, so it is worked out once."""
    events = [event for event, count in runs for _ in range(count)]
    return recompute(events, delta).value


def _trust_lines(charter: Charter, cost: PlanCost) -> list[str]:
    """Whom these numbers count on, where sites share the noise, and what a whole site pays."""
    secure, lines = charter.secure, list[str]()
    if secure is not None:
        sharers, least, most = secure.sharers, secure.least, secure.sites
        few, many = secure.colluders(least), secure.colluders(most)
        lines.append("")
        lines.append(f"masked: the coordinator reads a round's sum alone, of {least} or more of {most} sites")
        lines.append(f"shared noise: a site draws 1/sqrt({sharers}) of it; {sharers} honest sites make it")
        lines.append(f"  with {least} in a round at most {few} may collude, with all {most} at most {many}")
        lines.append(f"  a site whose partners all collude: epsilon {_shown(cost.alone)}")
    if charter.privacy.by_site:
        lines += _site_unit_lines(charter, cost)
    if charter.site_level is not None:
        fits = "yes" if cost.whole_site_fits else "NO"
        allowed = charter.site_level.epsilon
        lines.append(f"a whole site: epsilon {_shown(cost.whole_site)}, allowed {allowed}, fits: {fits}")
        lines.append("  zeroed out, every round counted in full: who took part is in the log")
    return lines


def _site_unit_lines(charter: Charter, cost: PlanCost) -> list[str]:
    """What a unit of one site says, and does not say, of the rows in it."""
    privacy = charter.privacy
    neighbour = "replaced by any others" if privacy.relation == "replace_one" else "replaced by nothing"
    return [
        f"the unit is a whole site, all its rows {neighbour}",
        "  every round counts in full (q = 1): who took part is in the log",
        f"  no step clips a row; an update is clipped to {privacy.max_update_norm}; every site counts once",
        f"  a row has its site's protection and none of its own: epsilon {_shown(cost.row)}, replace one",
    ]


def _spare_lines(charter: Charter) -> list[str]:
    """Say what spare rounds cost: the epsilon below is that of a run that needs them all."""
    spare = charter.plan.spare_rounds
    if not spare:
        return []
    many = f"{spare} spare round{'s' if spare > 1 else ''}"
    return [f"  and {many}, opened only for rounds that are abandoned; all epsilons count them as opened"]


def _shown(value: float | None) -> str:
    return ceil_text(value) if value is not None and math.isfinite(value) else "none"


def plan_report(charter: Charter) -> str:
    """Return the plain text that `affidavit charter check` prints."""
    cost, privacy = plan_cost(charter), charter.privacy
    event = cost.event
    sampling = "every row, every round" if event.sampling == "full" else f"Poisson, q = {event.sample_rate}"
    steps = f"{charter.plan.local_steps if privacy.by_site else event.steps} step(s)"
    noise = event.sigma_grid / event.sensitivity_grid
    lines = [
        f"charter {charter.name}  {cost.charter}",
        f"model {charter.model.family}, {charter.dimension} parameters, {len(charter.sites)} sites",
        f"plan {charter.plan.strategy}, {charter.plan.rounds} rounds of {steps}; {sampling}",
        *_spare_lines(charter),
        f"noise {noise:.4g} x sensitivity, unit {event.unit}, {event.relation}, delta {privacy.delta}",
        "",
        f"{'site':<20} {'epsilon (PLD)':>14} {'epsilon (RDP)':>14} {'allowed':>8}  fits",
    ]
    for site in cost.sites:
        pld = site.spent.pld_text if math.isfinite(site.spent.pld) else "none"
        rdp = site.spent.rdp_text if math.isfinite(site.spent.rdp) else "none"
        lines.append(
            f"{site.site:<20} {pld:>14} {rdp:>14} {site.epsilon!s:>8}  {'yes' if site.fits else 'NO'}"
        )
    lines += _trust_lines(charter, cost)
    if cost.suggested_noise_multiplier is not None:
        lines += [
            "",
            f"does not fit: write noise_multiplier: {cost.suggested_noise_multiplier}, or fewer rounds",
        ]
        total = cost.sites[0].spent
        if not math.isfinite(total.pld):
            lines.append(f"  the plan costs an epsilon {_unbounded(charter, total)}")
    if cost.suggested_grid_bits is not None:
        lines.append(f"  or keep the noise, and write grid_bits: {cost.suggested_grid_bits}")
    lines += ["", *[f"warning: {text}" for text in cost.warnings]] if cost.warnings else []
    return "\n".join(lines) + "\n"
