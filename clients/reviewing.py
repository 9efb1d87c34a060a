"""Use cases of a site's people: look at what is proposed, say yes or no, approve the relay's bundles.

Called on the machine that holds the site's home, by whoever may read it; the file system authorises. The
agent may be running: it finds each decision in the site's own log. Nothing here can raise the lifetime
budget.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from audit.canonical import parse_canonical
from audit.entries import (
    REFUSAL_CODES,
    MechanismEvent,
    RunAccepted,
    parse_body,
)
from audit.epsilon import epsilon_text, recompute, whole_site_epsilon
from audit.shared_noise import alone
from audit.site_bodies import BundleDecided, SiteDecided
from audit.units import of_people
from clients.admission import within_whole_site
from clients.code_digest import agent_code
from clients.decisions import decision, facts_of, run_cost, year_events
from clients.errors import ClientsError, DataProblem
from clients.home import LifetimeBudget, SiteHome
from clients.ledger import SiteLedger
from clients.loader import inspect_file
from clients.proposals import Proposal, Proposals
from clients.rules import breaches
from clients.site_log import SiteLog
from clients.terms import Terms, read_terms
from clients.terms_of_use import terms_of_use
from federation.accounting import LifetimeFilter
from federation.errors import AccountingError

MAX_BUNDLE_BYTES = 64 << 20


class DecisionError(ClientsError):
    """What was asked for cannot be decided; the message names the fix."""

    code = "site.decision"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReview:
    """A proposal as it would bind this site. Every epsilon is at the site's own lifetime delta."""

    id: str
    charter: str
    name: str
    run: str  # "": a charter, whatever the run
    model: str
    author: str  # public key; "" for a charter alone
    code: str  # digest of the coordinator's aggregation code; "" for a charter alone
    agent_code: str  # of the agent that would answer here
    bundles: tuple[str, ...]  # what the relay may run
    purposes: tuple[str, ...]
    members: tuple[str, ...]
    rounds: int
    unit: str
    relation: str
    promised_epsilon: str
    promised_delta: str
    run_epsilon: float  # for one of `unit`
    row_epsilon: float | None  # for one row as a part of the site, where the unit is the site
    counts_on: str  # "": this site adds all of its noise itself; else how many honest sites must
    lifetime_before: float  # spent and reserved, for a row or subject; as `lifetime_after`
    lifetime_after: float
    lifetime_cap: str
    whole_site: str  # all rows together, now and afterwards; "": the site sets no cap for them
    use: tuple[str, ...]  # how answers of a model may be used
    year_after: float
    year_limit: str  # "": site.yaml sets none
    delta: str
    fits: bool
    broken_rules: tuple[str, ...]  # "<rule>: <why>"
    asked_by: tuple[str, ...]  # the rules that will not decide by themselves
    decision: str  # the people's newest word on it: "", "accepted" or "refused"
    problems: tuple[DataProblem, ...]  # in the data file, for these eyes only


def find_proposal(home: SiteHome, name: str) -> Proposal:
    """Return what waits under a run's name or a charter's digest, or a charter from its file.

    Raises:
        DecisionError: nothing of that name waits.
        ClientsError, FederationError: the file is no charter.
    """
    waiting = Proposals(home.path)
    found = waiting.find(name)
    if found is not None:
        return found
    if Path(name).is_file():
        from federation.charter import Charter

        return Proposal(charter=Charter.load(Path(name)).canonical().decode(), run=None)
    known = ", ".join(waiting.ids()) or "nothing"
    raise DecisionError(f"{name!r} does not wait for this site, and is no charter's file; waiting: {known}")


def review_proposal(home: SiteHome, proposal: Proposal, *, now: datetime | None = None) -> SiteReview:
    """Show what a proposal would cost this site and which rules it meets.

    Raises:
        RefusedError: the charter is malformed, or not for this site.
        HomeError: the site's ledger or log cannot be read.
    """
    moment = now or datetime.now(UTC)
    terms = read_terms(proposal.charter, site=home.name)
    document: Any = parse_canonical(proposal.charter.encode())
    lifetime, rules = home.config.lifetime, home.config.rules
    delta = float(lifetime.delta)
    population = home.config.population.pseudonym
    planned = terms.planned
    broken: tuple[str, ...] = ()
    ledger = SiteLedger(home.ledger_path, home.high_water_path, look=True)
    try:
        log = SiteLog.open(home.path, home.name)
        try:
            committed = ledger.committed_events(population)
            in_year = (*year_events(log, ledger, population, moment), *planned)
            year = recompute(of_people(in_year), delta).value
            if proposal.run is not None:
                facts = facts_of(proposal.run, terms, home, log, ledger, moment)
                broken = tuple(f"{item.rule}: {item.detail}" for item in breaches(rules, facts))
            said = latest_word(log, proposal)
        finally:
            log.release()
    finally:
        ledger.close()
    after = recompute(of_people((*committed, *planned)), delta).value
    run = proposal.run
    return SiteReview(
        id=proposal.id,
        charter=proposal.digest,
        name=str(document["name"]),
        run="" if run is None else run.run,
        model="" if run is None else run.model,
        author="" if run is None else run.author,
        code="" if run is None else run.code,
        agent_code=agent_code(),
        bundles=rules.approved_bundles,
        purposes=terms.purposes,
        members=terms.sites,
        rounds=terms.rounds,
        unit=terms.event.unit,
        relation=terms.event.relation,
        promised_epsilon=format(terms.epsilon, "f"),
        promised_delta=format(terms.delta, "f"),
        run_epsilon=recompute(planned, delta).value,
        row_epsilon=run_cost(terms, delta) if terms.by_site else None,
        counts_on=counts_on(terms, delta),
        lifetime_before=recompute(of_people(committed), delta).value if committed else 0.0,
        lifetime_after=after,
        lifetime_cap=format(lifetime.epsilon, "f"),
        whole_site=_whole_site(lifetime, committed, planned),
        use=terms_of_use(document),
        year_after=year,
        year_limit="" if rules.epsilon_per_year is None else format(rules.epsilon_per_year, "f"),
        delta=format(lifetime.delta, "f"),
        fits=_fits(home, committed, planned),
        broken_rules=broken,
        asked_by=rules.ask,
        decision="" if said is None else said.decision,
        problems=inspect_file(home.config.data, terms),
    )


def counts_on(terms: Terms, delta: float) -> str:
    """Say whom a shared noise counts on: the site's people decide whether they trust as many."""
    secure = terms.secure
    if secure is None:
        return ""
    by_itself = recompute([alone(event) for event in terms.planned], delta).value
    return (
        f"{secure.sharers} honest sites of at least {secure.least} in a round, this one among them; if all "
        f"others collude, epsilon is {epsilon_text(by_itself)}"
    )


def row_of_site_text(epsilon: float) -> str:
    """Say what covers one row where the unit is the site."""
    return f"epsilon {epsilon_text(epsilon)}, replace one: its site's protection and none of its own"


def latest_word(log: SiteLog, proposal: Proposal) -> SiteDecided | None:
    """Return what people last said about exactly this proposal."""
    unsigned = (proposal.digest, "" if proposal.run is None else proposal.run.run)
    found = None
    for _, _, body in log.entries(SiteDecided, run=unsigned[1] or None):
        if body.by == "person" and (body.charter, body.run) == unsigned:
            found = body
    return found


def accept(home: SiteHome, proposal: Proposal) -> SiteDecided:
    """Say yes for the site: the agent signs, or accepts the run, when the coordinator asks again.

    Raises:
        DecisionError: the lifetime budget does not allow it, whoever says yes.
        RefusedError: the charter is malformed, or not for this site.
    """
    terms = read_terms(proposal.charter, site=home.name)
    _check_fits(home, terms)
    cost = run_cost(terms, float(home.config.lifetime.delta))
    body = _decide(home, proposal, "accepted", run_epsilon=format(cost, ".6f"))
    home.approve(proposal.digest)
    return body


def approve_charter_text(home: SiteHome, proposal: Proposal) -> SiteHome:
    """Say yes to a charter, whatever its cost: whether a run fits is asked when there is one.

    Raises:
        RefusedError: the charter is malformed, or not for this site.
    """
    terms = read_terms(proposal.charter, site=home.name)
    cost = run_cost(terms, float(home.config.lifetime.delta))
    _decide(home, proposal, "accepted", run_epsilon=format(cost, ".6f"))
    return home.approve(proposal.digest)


def refuse(home: SiteHome, proposal: Proposal, *, reason: str = "refused_by_site") -> SiteDecided:
    """Say no for the site; only the code leaves it.

    Raises:
        DecisionError: the reason is not in the closed list.
    """
    _check_reason(reason)
    body = _decide(home, proposal, "refused", reason=reason)
    if proposal.run is None:
        home.disapprove(proposal.digest)
    return body


def withdraw(home: SiteHome, run: str, *, reason: str = "refused_by_site") -> SiteDecided:
    """Say no to a run that was accepted: its further rounds are refused. What was released stays spent.

    Raises:
        DecisionError: no open run of that name, or the reason is not in the closed list.
    """
    _check_reason(reason)
    ledger = SiteLedger(home.ledger_path, home.high_water_path, look=True)
    try:
        reservation = ledger.reservation(run)
    finally:
        ledger.close()
    if reservation is None or reservation.closed:
        raise DecisionError(f"run {run!r} neither waits for this site nor is open here; see `site status`")
    accepted = parse_body(RunAccepted, parse_canonical(reservation.acceptance))
    log = SiteLog.open(home.path, home.name)
    try:
        body = home.keys().signed(
            SiteDecided(
                site=home.name,
                run=run,
                charter=accepted.charter,
                start=accepted.start,
                decision="refused",
                by="person",
                rules=(),
                reason=reason,
                run_epsilon="",
                signature="",
            )
        )
        log.append(body)
    finally:
        log.close()
    return body


def approve_bundle(home: SiteHome, digest: str) -> SiteHome:
    """Let the relay run the bundle of this SHA-256, from its next message on."""
    return _bundle(home, digest, "approved")


def withdraw_bundle(home: SiteHome, digest: str) -> SiteHome:
    """Take that back."""
    return _bundle(home, digest, "withdrawn")


def bundle_digest(text: str) -> str:
    """Return the digest that `text` is, or that of the bundle's file it names.

    Raises:
        DecisionError: neither.
    """
    if len(text) == 64 and not set(text) - set("0123456789abcdef"):
        return text
    path = Path(text)
    if not path.is_file():
        raise DecisionError(f"{text!r} is neither a SHA-256 in hex nor a bundle's file (.fab)")
    if path.stat().st_size > MAX_BUNDLE_BYTES:
        raise DecisionError(f"{path}: is larger than any bundle")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _bundle(home: SiteHome, digest: str, word: str) -> SiteHome:
    log = SiteLog.open(home.path, home.name)
    try:
        body = BundleDecided(site=home.name, digest=digest, decision=word, signature="")
        log.append(home.keys().signed(body))
        return home.approve_bundle(digest) if word == "approved" else home.withdraw_bundle(digest)
    finally:
        log.close()


def _decide(
    home: SiteHome, proposal: Proposal, word: str, *, reason: str = "", run_epsilon: str = ""
) -> SiteDecided:
    log = SiteLog.open(home.path, home.name)
    try:
        body = decision(
            home.keys(), home.name, proposal, word, by="person", reason=reason, run_epsilon=run_epsilon
        )
        log.append(body)
    finally:
        log.close()
    Proposals(home.path).settle(proposal.id)
    return body


def _check_fits(home: SiteHome, terms: Terms) -> None:
    lifetime = home.config.lifetime
    ledger = SiteLedger(home.ledger_path, home.high_water_path, look=True)
    try:
        committed = ledger.committed_events(home.config.population.pseudonym)
    finally:
        ledger.close()
    if not _fits(home, committed, terms.planned):
        raise DecisionError(
            f"{len(terms.planned)} more releases would pass the population's lifetime cap of epsilon "
            f"{lifetime.epsilon} at delta {lifetime.delta}; no decision passes that cap"
        )


def _fits(home: SiteHome, committed: Sequence[MechanismEvent], planned: Sequence[MechanismEvent]) -> bool:
    """Ask the same hard stop as the agent; what it cannot account for does not fit."""
    lifetime = home.config.lifetime
    try:
        fits = LifetimeFilter(epsilon=lifetime.epsilon, delta=lifetime.delta).admits(committed, planned)
    except AccountingError:
        return False
    return fits and within_whole_site(lifetime, committed, planned)


def _whole_site(
    lifetime: LifetimeBudget, committed: Sequence[MechanismEvent], planned: Sequence[MechanismEvent]
) -> str:
    if lifetime.whole_site_epsilon is None:
        return ""
    delta = float(lifetime.delta)
    now, then = (
        epsilon_text(found) if math.isfinite(found) else "unbounded"
        for found in (
            whole_site_epsilon(committed, delta),
            whole_site_epsilon([*committed, *planned], delta),
        )
    )
    return f"{now} now, {then} afterwards, cap {lifetime.whole_site_epsilon}"


def _check_reason(reason: str) -> None:
    if reason not in REFUSAL_CODES:
        raise DecisionError(
            f"reason {reason!r} is not in the closed list: {', '.join(sorted(REFUSAL_CODES))}"
        )
