"""Steps on privacy: every release of each population counted once, and epsilon recomputed from the events."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache
from typing import Any, Final

from audit.charter_view import CharterView
from audit.cost_bodies import UNBOUNDED
from audit.decimals import decimal_text, parse_decimal
from audit.entries import (
    ZERO_DIGEST,
    MechanismEvent,
    RoundAbandoned,
    RoundCompleted,
    RunAccepted,
    SiteEpsilon,
    SiteStatement,
    SiteUndelivered,
    event_hash,
)
from audit.epsilon import (
    EpsilonBound,
    EpsilonError,
    epsilon_floor,
    epsilon_text,
    epsilon_with_discretisation,
    needs_rdp,
    rdp_epsilon,
    recompute,
    whole_site_epsilon,
)
from audit.errors import AuditError
from audit.shared_noise import site_level
from audit.units import SITE, counted_for, row_level
from audit.verify.chain import Chain, FailError, GapError, Leaf, Outcome, expect, need
from audit.verify.history import LINKS
from audit.verify.lost_rounds import fewest_in_a_round
from audit.verify.members import CHARTER
from audit.verify.odometer import walk
from audit.verify.report import EpsilonLine, Word
from audit.verify.training import ROUNDS

ODOMETERS, EPSILON = "The odometers", "Epsilon"
_PLD_TOLERANCE: Final = 1e-3  # two releases of the accountant may differ by as much
_MOST_BY_PLD: Final = 100.0  # loss distributions of a larger epsilon no longer fit into memory
_MOST_KINDS: Final = 64
_MOST_ROOT_STEPS: Final = 2_000  # sum over kinds of the root of their steps, which is what it costs


def check_odometers(chain: Chain) -> Outcome:
    """Events 1 to n of every population, chained by hash, across all its runs in this log."""
    if not chain.rounds:
        need(None, ROUNDS)
    completed = need(chain.completed, LINKS)
    until = chain.registered.index if chain.registered else completed.index
    _check_populations(chain)
    for site, accepted in sorted(chain.accepted.items()):
        population = accepted.body.population
        history = walk(
            site,
            _events(chain, site, population, until),
            key_of=lambda leaf: chain.enrolment_at(leaf.body.site, leaf.index).body.statement_key,
            gap=lambda wanted, leaf: _gap(chain, wanted, leaf),
        )
        _check_start(history, accepted.body.next_sequence, accepted.body.previous_event, accepted.index)
        chain.histories[site] = history
    shown = ", ".join(f"{site} 1 to {len(history)}" for site, history in sorted(chain.histories.items()))
    detail = f"releases counted once each and chained by hash, from each population's first: {shown}"
    unknown = _unanswered(chain)
    if unknown:
        return Outcome(
            word=Word.ATTESTED,
            code="odometer.missing_site",
            detail=f"{detail}. By the log's operator: that no release was made and dropped where a site is "
            f"missing ({', '.join(unknown)})",
        )
    return Outcome(word=Word.PROVED, detail=detail)


def check_epsilon(chain: Chain) -> Outcome:
    """Recompute epsilon for run and lifetime; no claim may be lower, no run above the charter."""
    charter = need(chain.charter, CHARTER)
    if not chain.histories:
        need(None, ODOMETERS)
    registered, run = chain.registered, need(chain.started, LINKS).body.run
    claims = {claim.site: claim for claim in registered.body.costs} if registered else {}
    entry = registered.index if registered else None
    taking_part = {
        site
        for site, history in chain.histories.items()
        if any(statement.run == run for statement in history)
    }
    if registered and (len(claims) != len(registered.body.costs) or set(claims) != taking_part):
        raise FailError("epsilon.claims", "the claims do not name each site that took part once", entry)
    delta = float(charter.privacy.delta)
    lines, attested = [], False
    for site, history in sorted(chain.histories.items()):
        if site not in taking_part:
            continue
        events = [statement.event for statement in history if statement.run == run]
        lifetime = counted_for([statement.event for statement in history], charter.privacy.unit)
        _check_cost(events if lifetime is None else lifetime)
        try:
            spent = _spent(events, delta, charter)
            if lifetime is None:
                spent_ever = Spent(math.inf, "a release that bounds nothing of a whole site", True)
            elif needs_rdp(history):
                spent_ever = Spent(rdp_epsilon(lifetime, delta), "RDP upper bound", True)
            else:
                spent_ever = _spent(lifetime, delta, charter)
            rdp = rdp_epsilon(events, delta)
        except EpsilonError as error:
            raise FailError("epsilon.event", f"site {site}: {error}", entry) from error
        claim = claims.get(site)
        if claim is not None and entry is not None:
            _check_terms(claim, charter, history, len(events), entry)
            proved = _check_claim(claim, "run_epsilon", spent, entry)
            proved &= _check_claim(claim, "lifetime_epsilon", spent_ever, entry)
            _check_claim(claim, "run_epsilon_rdp", Spent(rdp, "RDP upper bound", True), entry)
            attested |= not proved
            _check_charter(parse_decimal(claim.run_epsilon), site, charter, entry)
        elif spent.is_exact:
            _check_charter(Decimal(spent.value), site, charter, entry)
        lines.append(
            EpsilonLine(
                site=site,
                run_epsilon=_up(spent.value),
                lifetime_epsilon=_up(spent_ever.value),
                events=len(history),
                delta=decimal_text(charter.privacy.delta),
                unit=charter.privacy.unit,
                relation=charter.privacy.relation,
                method=spent.method,
                claimed=claim.run_epsilon if claim else "",
            )
        )
    shared, whole = _shared(charter, chain), _whole_sites(chain, charter, run, taking_part, entry)
    rows = _rows_of_sites(chain, charter, run, taking_part)
    chain.epsilons = (*lines, *whole, *rows)
    caps = _check_site_caps(chain, run)
    most = max(
        lines,
        key=lambda line: _number(line.run_epsilon),
    )
    detail = (
        f"at most {most.run_epsilon} for the run (charter: {charter.privacy.epsilon}), one "
        f"{charter.privacy.unit}, "
        f"{charter.privacy.relation.replace('_', '/')}, delta {decimal_text(charter.privacy.delta)}, "
        f"{most.method}{shared}"
    )
    if whole:
        top = max(whole, key=lambda line: parse_decimal(line.run_epsilon))
        detail += f"; a whole site: at most {top.run_epsilon} for the run, {top.method}"
    if rows:
        part = max(rows, key=lambda line: _number(line.run_epsilon))
        detail += (
            f"; every round in full (q = 1); a row has its site's protection alone: at most "
            f"{part.run_epsilon} for the run, replace/one"
        )
    detail += caps
    if attested:
        detail += (
            "; a claim below that bound is its author's word: install affidavit[accounting] to recompute it"
        )
        return Outcome(word=Word.ATTESTED, code="epsilon.bound_only", detail=detail, entry=entry)
    return Outcome(word=Word.PROVED, detail=detail)


def _shared(charter: CharterView, chain: Chain) -> str:
    """Return under which assumption an epsilon of shared noise holds."""
    if charter.secure is None:
        return ""
    fewest = fewest_in_a_round(chain, charter.secure)
    most = charter.secure.colluders(fewest)
    return f", while at most {most} of {fewest} sites collude with the coordinator"


def _check_site_caps(chain: Chain, run: str) -> str:
    """Hold each site that set a cap for all its rows together to it, up to the run's last release.

    Raises:
        FailError: its releases until then cost more, or one of them bounds nothing of a whole site.
    """
    held = []
    for site, accepted in sorted(chain.accepted.items()):
        body = accepted.body
        if not body.whole_site_epsilon_cap:
            continue
        try:
            cap, delta = parse_decimal(body.whole_site_epsilon_cap), float(parse_decimal(body.lifetime_delta))
        except AuditError as error:
            raise FailError("run.acceptance", f"whole_site_epsilon_cap: {error}", accepted.index) from error
        history = chain.histories[site]
        last = max((place for place, event in enumerate(history, 1) if event.run == run), default=0)
        cost = whole_site_epsilon([statement.event for statement in history[:last]], delta)
        if not cost <= float(cap):
            raise FailError(
                "epsilon.over_site_cap",
                f"site {site}: all its releases cost {_up(cost)} for the site as a whole, above the cap "
                f"of {cap} that it signed",
                accepted.index,
            )
        held.append(f"{site} {_up(cost)} of {cap}")
    return f"; sites' own caps as a whole, over their lives: {', '.join(held)}" if held else ""


def _whole_sites(
    chain: Chain, charter: CharterView, run: str, taking_part: set[str], entry: int | None
) -> list[EpsilonLine]:
    """Return what the run cost each site as a whole, from the same events; q = 1: who took part is logged.

    Raises:
        FailError: it is above what the charter promises a site.
    """
    if charter.site_level is None:
        return []
    lines, delta = [], float(charter.privacy.delta)
    for site in sorted(taking_part):
        history = chain.histories[site]
        bound = recompute(
            [site_level(statement.event) for statement in history if statement.run == run], delta
        )
        if Decimal(bound.value) > charter.site_level.epsilon:
            raise FailError(
                "epsilon.over_charter",
                f"site {site} as a whole: {epsilon_text(bound.value)} is above {charter.site_level.epsilon}",
                entry,
            )
        ever = "none"
        if all(statement.event.site_sensitivity_grid for statement in history):
            ever = _up(recompute([site_level(statement.event) for statement in history], delta).value)
        lines.append(_unclaimed(charter, site, len(history), bound, ever, unit="site", relation="zero_out"))
    return lines


def _rows_of_sites(chain: Chain, charter: CharterView, run: str, taking_part: set[str]) -> list[EpsilonLine]:
    """Return what the run cost one row, where the unit is the site: its site's protection, never more."""
    if charter.privacy.unit != SITE:
        return []
    lines, delta = [], float(charter.privacy.delta)
    for site in sorted(taking_part):
        history = chain.histories[site]
        bound = recompute([row_level(item.event) for item in history if item.run == run], delta)
        try:
            ever = _up(recompute([row_level(item.event) for item in history], delta).value)
        except EpsilonError:  # earlier runs count subjects: what a row spent there nobody bounds
            ever = UNBOUNDED
        lines.append(_unclaimed(charter, site, len(history), bound, ever, unit="row", relation="replace_one"))
    return lines


def _unclaimed(
    charter: CharterView, site: str, events: int, bound: EpsilonBound, ever: str, *, unit: str, relation: str
) -> EpsilonLine:
    """A line that no entry claims: it follows from the same events, counted for another unit."""
    return EpsilonLine(
        site=site,
        run_epsilon=_up(bound.value),
        lifetime_epsilon=ever,
        events=events,
        delta=decimal_text(charter.privacy.delta),
        unit=unit,
        relation=relation,
        method=bound.method,
        claimed="",
    )


def _number(text: str) -> Decimal:
    return Decimal(10**9) if text == UNBOUNDED else parse_decimal(text)


class Spent:
    """A recomputed epsilon: how, and whether an honest claim cannot be lower."""

    def __init__(
        self, value: float, method: str, is_exact: bool, *, tolerance: float = 1e-6, floor: float = 0.0
    ) -> None:
        self.value, self.method, self.is_exact = value, method, is_exact
        self.tolerance, self.floor = tolerance, floor


def _check_populations(chain: Chain) -> None:
    """No two sites may count one population apart: its people would be told half of what was spent."""
    holders = {leaf.body.population: site for site, leaf in chain.accepted.items()}
    found: list[tuple[int, RunAccepted | SiteStatement]] = [
        (leaf.index, leaf.body) for leaf in chain.leaves(RunAccepted)
    ]
    found += [(leaf.index, leaf.body.statement) for leaf in chain.leaves(SiteUndelivered)]
    found += [(leaf.index, leaf.body) for leaf in chain.leaves(SiteStatement)]
    for index, body in found:
        holder = holders.get(body.population, body.site)
        if holder != body.site:
            raise FailError(
                "odometer.population_shared",
                f"sites {body.site} and {holder} each count releases of one population as their own",
                index,
            )


def _unanswered(chain: Chain) -> list[str]:
    """Return where a site of this run may have answered, and no release of that round is in the file."""
    asked = chain.rounds[0].statements[0].body.participants
    unknown = [f"{site} in round 1" for site in sorted(set(chain.accepted) - set(asked))]
    ended: list[RoundCompleted | RoundAbandoned] = [found.leaf.body for found in chain.rounds]
    ended += [lost.leaf.body for lost in chain.lost]
    for body in ended:
        for site in body.missing:
            history = chain.histories.get(site, ())
            if not any((event.run, event.round) == (body.run, body.round) for event in history):
                unknown.append(f"{site} in round {body.round}")
    if chain.evaluated is not None:
        unknown += [f"{site} in the evaluation" for site in chain.evaluated.body.missing]
    if chain.sketched is not None:
        unknown += [f"{site} in the sketch" for site in chain.sketched.body.missing]
    return unknown


def _events(chain: Chain, site: str, population: str, until: int) -> list[Leaf[SiteStatement]]:
    found = [leaf for leaf in chain.leaves(SiteStatement) if leaf.index < until]
    found += [
        Leaf(leaf.index, leaf.leaf_hash, leaf.body.statement)
        for leaf in chain.leaves(SiteUndelivered)
        if leaf.index < until
    ]
    return [leaf for leaf in found if (leaf.body.site, leaf.body.population) == (site, population)]


def _gap(chain: Chain, wanted: int, leaf: Leaf[SiteStatement]) -> AuditError:
    """A missing event fails when it is this run's, whose statements are all known; else the file lacks it."""
    site = leaf.body.site
    missing = f"site {site}: event {wanted} is missing, the next is {leaf.body.sequence}"
    accepted = chain.accepted[site].body
    if wanted >= accepted.next_sequence and leaf.body.run == accepted.run:
        return FailError("odometer.gap", missing, leaf.index)
    return GapError("odometer.gap", missing, leaf.index)


def _check_start(history: Sequence[SiteStatement], first: int, previous: str, entry: int) -> None:
    if not 1 <= first <= len(history) + 1:
        count = len(history)
        raise FailError("odometer.acceptance", f"next_sequence is {first} after {count} events in all", entry)
    before = event_hash(history[first - 2]) if first > 1 else ZERO_DIGEST
    expect(previous, before, code="odometer.acceptance", field="previous_event", entry=entry)


def _spent(events: Sequence[MechanismEvent], delta: float, charter: CharterView) -> Spent:
    bound = recompute(events, delta)
    if bound.exact:
        return Spent(bound.value, bound.method, True)
    value = math.inf
    if bound.value <= _MOST_BY_PLD:
        value = _pld_epsilon(tuple(events), delta, charter.privacy.relation)
    if not value < bound.value:
        return Spent(bound.value, bound.method, False, floor=epsilon_floor(events, delta))
    return Spent(value, "PLD, grid 0.0001", True, tolerance=_PLD_TOLERANCE)


def _check_cost(events: Sequence[MechanismEvent]) -> None:
    """Refuse sampled events so many and so different that one site could keep every reader waiting."""
    steps: dict[tuple[str, int, int], int] = {}
    for event in events:
        if event.sample_rate != "1":
            kind = (event.sample_rate, event.sigma_grid, event.sensitivity_grid)
            steps[kind] = steps.get(kind, 0) + max(event.steps, 0)
    if len(steps) > _MOST_KINDS or sum(map(math.isqrt, steps.values())) > _MOST_ROOT_STEPS:
        raise GapError(
            "epsilon.too_costly",
            f"{len(steps)} kinds of sampled releases, {sum(steps.values())} steps: more than is recomputed",
        )


@lru_cache(maxsize=64)
def _pld_epsilon(events: tuple[MechanismEvent, ...], delta: float, relation: str) -> float:
    """Return epsilon by privacy loss distributions; infinite where dp-accounting is not installed."""
    try:
        dp: Any = importlib.import_module("dp_accounting")
        pld: Any = importlib.import_module("dp_accounting.pld.pld_privacy_accountant")
    except ImportError:
        return math.inf
    if any(event.relation != relation for event in events):
        return math.inf
    neighbours = {
        "add_remove": dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
        "zero_out": dp.NeighboringRelation.REPLACE_SPECIAL,
        "replace_one": dp.NeighboringRelation.REPLACE_ONE,
    }[relation]
    accountant = pld.PLDAccountant(neighbours, 1e-4)
    gradients = 2 if relation == "replace_one" else 1
    counts: dict[tuple[float, float], int] = {}
    for event in events:
        kind = (float(event.sample_rate), gradients * event.sigma_grid / event.sensitivity_grid)
        counts[kind] = counts.get(kind, 0) + event.steps
    for (rate, multiplier), steps in sorted(counts.items()):
        single = dp.GaussianDpEvent(multiplier)
        accountant.compose(dp.PoissonSampledDpEvent(rate, single) if rate < 1 else single, steps)
    return epsilon_with_discretisation(events, delta, accountant.get_epsilon)


def _check_terms(
    claim: SiteEpsilon, charter: CharterView, history: Sequence[SiteStatement], events: int, entry: int
) -> None:
    wanted: dict[str, str | int] = {
        "events": events,
        "population": history[0].population,
        "delta": decimal_text(charter.privacy.delta),
        "relation": charter.privacy.relation,
        "unit": charter.privacy.unit,
    }
    for field, value in wanted.items():
        expect(
            getattr(claim, field),
            value,
            code="epsilon.terms",
            field=f"epsilons.{claim.site}.{field}",
            entry=entry,
        )


def _check_claim(claim: SiteEpsilon, field: str, spent: Spent, entry: int) -> bool:
    """Return whether the claim is proved; it fails where it is lower than what was spent."""
    if getattr(claim, field) == UNBOUNDED and field == "lifetime_epsilon":
        return True  # claims nothing, and so nothing that is too low
    try:
        claimed = float(parse_decimal(getattr(claim, field)))
    except AuditError as error:
        raise FailError("epsilon.claims", f"epsilons.{claim.site}.{field}: {error}", entry) from error
    if claimed >= spent.value - spent.tolerance * max(1.0, spent.value):
        return True
    least = spent.value if spent.is_exact else spent.floor
    if claimed < least - spent.tolerance:
        method = spent.method if spent.is_exact else "an attack by adding the releases up"
        raise FailError(
            "epsilon.claimed_lower",
            f"epsilons.{claim.site}.{field} claims {getattr(claim, field)}; the events cost at least "
            f"{_up(least)} ({method})",
            entry,
        )
    return False


def _check_charter(value: Decimal, site: str, charter: CharterView, entry: int | None) -> None:
    if value > charter.privacy.epsilon:
        raise FailError(
            "epsilon.over_charter",
            f"site {site}: {value} is above the charter's {charter.privacy.epsilon}",
            entry,
        )


def _up(value: float) -> str:
    if not math.isfinite(value):
        return UNBOUNDED
    return decimal_text(Decimal(value).quantize(Decimal("0.0001"), rounding=ROUND_CEILING))
