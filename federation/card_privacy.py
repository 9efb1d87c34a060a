"""What a card says of privacy: what a version's run cost each site, and what its population has spent in all.

A version's entry claims both as they were at its registration. A card counts them again, and the population's
whole life over the releases that the log holds by now: an odometer goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from audit.cost_bodies import UNBOUNDED
from audit.entries import SiteEpsilon, SiteStatement
from audit.epsilon import EpsilonError, epsilon_text, recompute
from audit.ledger import Ledger
from audit.units import counted_for
from federation import registry
from federation.accounting import plan_cost
from federation.card import NO_EVIDENCE, Block, Paragraph, Table, told
from federation.charter import Charter
from federation.errors import AccountingError
from federation.gates import lifetime_epsilon
from federation.registry import Version

_TOLERANCE: Final = Decimal("0.001")  # two releases of the accountant may differ by as much
_RELATIONS: Final = {
    "add_remove": "one added or removed",
    "zero_out": "one replaced by nothing",
    "replace_one": "one replaced by another",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """What a population had spent in this log when the version was registered, and has spent by now."""

    claimed: str  # or UNBOUNDED
    releases_then: int
    now: str  # or UNBOUNDED, or NO_EVIDENCE where the releases cannot be counted together
    releases_now: int
    is_recounted: bool  # by the accounting of a registration, which needs PLD
    is_understated: bool  # the entry claims less than the run, or the releases before it, cost


def lifetimes(ledger: Ledger, version: Version, delta: Decimal) -> tuple[Lifetime, ...]:
    """Return each cost's lifetime at the charter's delta, in the order of `version.registered.costs`."""
    then = _by_population(registry.statements(ledger, before=version.leaf_index))
    now = _by_population(registry.statements(ledger))
    return tuple(
        _lifetime(cost, delta, version.registered.run, then.get(_key(cost), []), now.get(_key(cost), []))
        for cost in version.registered.costs
    )


def privacy_blocks(ledger: Ledger, version: Version, charter: Charter) -> Iterator[Block]:
    """Yield what the card's section on privacy holds."""
    privacy, costs = charter.privacy, version.registered.costs
    spent = lifetimes(ledger, version, privacy.delta)
    yield Paragraph(
        told(
            "Epsilon for one **{}**, relation {} ({}), delta {}; the charter allows {} for a run. The "
            "figures follow from events that the sites signed: that noise was drawn, and how much, is "
            "ATTESTED.",
            privacy.unit,
            privacy.relation,
            _RELATIONS[privacy.relation],
            privacy.delta,
            privacy.epsilon,
        )
    )
    yield Table(
        (
            "site",
            "releases of this run",
            "epsilon of this run (PLD)",
            "the same by RDP, a looser bound",
            "epsilon of all releases in this log, at registration",
            "epsilon of all releases in this log, now",
        ),
        tuple(
            (
                cost.site,
                str(cost.events),
                cost.run_epsilon,
                cost.run_epsilon_rdp,
                f"{_shown(life.claimed)} (first {life.releases_then} releases)",
                f"{_shown(life.now)} (first {life.releases_now} releases)",
            )
            for cost, life in zip(costs, spent, strict=True)
        ),
    )
    yield Paragraph(
        "The last two figures count every release of the site's population that this log holds, whichever "
        "run or charter it was for; releases into another log are not seen from here. Over several runs, "
        "where rows were sampled, they are by RDP, which holds although later runs followed earlier results."
    )
    if all(life.is_recounted for life in spent):
        yield Paragraph(
            "Run and registration are what the version's entry claims, counted again for this card."
        )
    else:
        yield Paragraph(
            told(
                "Run and registration are what the version's entry claims; NO EVIDENCE from where this card "
                "was made, which lacks the accountant to count them again."
            )
        )
    other = [cost.site for cost in costs if Decimal(cost.delta) != privacy.delta]
    if other:
        yield Paragraph(told("**Claimed at another delta than the charter's: {}.**", ", ".join(other)))
    low = [cost.site for cost, life in zip(costs, spent, strict=True) if life.is_understated]
    if low:
        yield Paragraph(told("**The entry claims less than the releases cost: {}.**", ", ".join(low)))
    yield from _other_units(charter)
    over = [cost.site for cost in costs if Decimal(cost.run_epsilon) > privacy.epsilon]
    if over:
        yield Paragraph(told("**Above the charter's epsilon: {}.**", ", ".join(over)))


def _other_units(charter: Charter) -> Iterator[Block]:
    privacy = charter.privacy
    if privacy.by_site:
        neighbour = "any others" if privacy.relation == "replace_one" else "nothing"
        yield Paragraph(
            told(
                "The unit is a whole site, all its rows replaced by {}; every round counts in full, since "
                "the log shows who took part. Nothing is clipped or noised for a row: **a row has its site's "
                "protection and none of its own**, epsilon {} for a run, relation replace_one.",
                neighbour,
                epsilon_text(plan_cost(charter).row or 0),
            )
        )
    secure = charter.secure
    if secure is not None:
        yield Paragraph(
            f"Updates were masked, and the sites shared the noise: it is whole while {secure.sharers} of "
            f"those in a round are honest. Of {secure.sites} sites {secure.tolerated} may drop out or "
            f"collude; a round ends with {secure.least} or more."
        )
    if charter.site_level is not None:
        whole = plan_cost(charter).whole_site
        yield Paragraph(
            f"A whole site, all its rows replaced by nothing: epsilon {epsilon_text(whole or 0)} "
            f"for a run, delta {privacy.delta}; the charter allows {charter.site_level.epsilon}."
        )


def _lifetime(
    cost: SiteEpsilon,
    delta: Decimal,
    run: str,
    then: Sequence[SiteStatement],
    now: Sequence[SiteStatement],
) -> Lifetime:
    in_run = [statement for statement in now if statement.run == run]
    once, ever = _as_registered(in_run, cost.unit, delta), _as_registered(now, cost.unit, delta)
    before = ever if len(then) == len(now) else _as_registered(then, cost.unit, delta)
    return Lifetime(
        claimed=cost.lifetime_epsilon,
        releases_then=len(then),
        now=_higher(cost.lifetime_epsilon, ever or _bound(now, cost.unit, delta)),
        releases_now=len(now),
        is_recounted=once is not None and before is not None,
        is_understated=_is_below(cost.run_epsilon, once) or _is_below(cost.lifetime_epsilon, before),
    )


def _as_registered(statements: Sequence[SiteStatement], unit: str, delta: Decimal) -> str | None:
    """Return what the releases cost by the accounting of a registration; None where that gives no figure,
    as in an installation without PLD.
    """
    try:
        return lifetime_epsilon(statements, unit, delta)
    except (AccountingError, EpsilonError):
        return None


def _bound(statements: Sequence[SiteStatement], unit: str, delta: Decimal) -> str:
    """Return an exact or upper bound by `audit.epsilon`; NO_EVIDENCE for releases that do not compose."""
    events = counted_for([statement.event for statement in statements], unit) or []
    if {event.unit for event in events} != {unit}:
        return NO_EVIDENCE
    try:
        shown = epsilon_text(recompute(events, float(delta)).value)
    except EpsilonError:
        return NO_EVIDENCE
    return UNBOUNDED if shown == "inf" else shown


def _higher(claimed: str, counted: str) -> str:
    """Return the larger of two figures: what is spent is not unspent."""
    if UNBOUNDED in (claimed, counted):
        return UNBOUNDED
    return counted if counted == NO_EVIDENCE else max(claimed, counted, key=Decimal)


def _is_below(claimed: str, counted: str | None) -> bool:
    if counted is None or claimed == UNBOUNDED:
        return False
    return counted == UNBOUNDED or Decimal(claimed) < Decimal(counted) - _TOLERANCE * max(
        Decimal(1), Decimal(counted)
    )


def _shown(epsilon: str) -> str:
    return "no bound" if epsilon == UNBOUNDED else epsilon


def _key(item: SiteEpsilon | SiteStatement) -> tuple[str, str]:
    return item.site, item.population


def _by_population(statements: Sequence[SiteStatement]) -> dict[tuple[str, str], list[SiteStatement]]:
    found: dict[tuple[str, str], list[SiteStatement]] = {}
    for statement in statements:
        found.setdefault(_key(statement), []).append(statement)
    return found
