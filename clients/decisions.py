"""Yes, no or wait: what a site answers to a charter or a run, by its rules or by its people.

Each decision is a signed entry of the site's own log; the entries are also where the agent finds what the
people decided, so a decision holds from the moment it is written, whether the agent runs or not. Outward go
closed codes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from audit.entries import (
    ZERO_DIGEST,
    MechanismEvent,
    RunStarted,
    SiteStatement,
    run_digest,
)
from audit.epsilon import recompute
from audit.site_bodies import SiteDecided
from audit.units import of_people
from clients.errors import RefusedError, WaitingError
from clients.home import SiteHome
from clients.identity import SiteKeys
from clients.ledger import Odometers
from clients.proposals import Proposal, Proposals
from clients.refusal_book import RefusalBook
from clients.reserved import unused
from clients.rules import Breach, Rule, RunFacts, breaches
from clients.site_log import Diary, event_id
from clients.terms import Terms

YEAR = timedelta(days=365)


def decision(
    keys: SiteKeys,
    site: str,
    proposal: Proposal,
    decision: str,
    *,
    by: str,
    rules: Sequence[str] = (),
    reason: str = "",
    run_epsilon: str = "",
) -> SiteDecided:
    """Return a signed decision about a charter or one start of a run."""
    run = proposal.run
    return keys.signed(
        SiteDecided(
            site=site,
            run="" if run is None else run.run,
            charter=proposal.digest,
            start=ZERO_DIGEST if run is None else run_digest(run),
            decision=decision,
            by=by,
            rules=tuple(rules),
            reason=reason,
            run_epsilon=run_epsilon,
            signature="",
        )
    )


def run_cost(terms: Terms, delta: float) -> float:
    """Return what the whole plan costs one row or subject at the site's delta."""
    return recompute(of_people(terms.planned), delta).value


def year_events(log: Diary, ledger: Odometers, population: str, now: datetime) -> tuple[MechanismEvent, ...]:
    """Return the releases of the last 365 days and all that open runs may still add."""
    released = [body.event for _, _, body in log.entries(SiteStatement, since=now - YEAR)]
    open_runs = ledger.open_reservations(population)
    done = ledger.spent(population) if open_runs else ()
    for reservation in open_runs:
        released += unused(reservation, [release.event for release in done if release.run == reservation.run])
    return tuple(released)


def facts_of(
    run: RunStarted, terms: Terms, home: SiteHome, log: Diary, ledger: Odometers, now: datetime
) -> RunFacts:
    """Return what the site's rules look at in a proposed run."""
    delta = float(home.config.lifetime.delta)
    planned = terms.planned
    year = 0.0
    if home.config.rules.epsilon_per_year is not None:
        events = year_events(log, ledger, home.config.population.pseudonym, now)
        year = recompute(of_people((*events, *planned)), delta).value
    return RunFacts(
        purposes=terms.purposes,
        model=run.model,
        sites=len(run.sites),
        run_epsilon=run_cost(terms, delta),
        year_epsilon=year,
        moment=now,
    )


class Decisions:
    """One agent's decisions; every method raises `RefusedError` for a no and `WaitingError` for not yet."""

    def __init__(
        self,
        home: SiteHome,
        keys: SiteKeys,
        ledger: Odometers,
        log: Diary,
        refusals: RefusalBook,
        clock: Callable[[], datetime],
    ) -> None:
        self._keys, self._ledger, self._log, self._clock = keys, ledger, log, clock
        self._refusals = refusals
        self._proposals = Proposals(home.path)

    def on_charter(self, home: SiteHome, canonical: str, foreign: Sequence[str]) -> SiteHome:
        """Decide about a charter that is not approved yet; return the home with it approved.

        `foreign` are its purposes that `site.yaml` does not list.
        """
        proposal, rules = Proposal(charter=canonical, run=None), home.config.rules
        said = self._said(proposal)
        if said is not None and said.decision == "refused":
            raise RefusedError(said.reason, f"this site's people refused charter {proposal.digest}")
        if said is not None:
            return home.approve(proposal.digest)
        asked: list[Rule] = ["purposes"] if foreign else []
        if not rules.auto_approve:
            asked.append("charters")
        if not asked:
            self._enter(proposal, "accepted")
            return home.approve(proposal.digest)
        if foreign and "purposes" not in rules.ask:
            self._refuse(proposal, "purposes", "purpose_not_allowed", f"the charter serves {list(foreign)}")
        if "charters" in asked and "charters" not in rules.ask:
            self._refuse(
                proposal,
                "charters",
                "charter_not_approved",
                f"charter {proposal.digest} waits for this site's people; see `affidavit charter sign`",
            )
        raise self._wait(proposal, asked)

    def on_run(self, home: SiteHome, run: RunStarted, terms: Terms, canonical: str) -> None:
        """Decide about a run that the lifetime budget allows."""
        proposal, rules = Proposal(charter=canonical, run=run), home.config.rules
        said = self._said(proposal)
        if said is not None and said.decision == "refused":
            raise RefusedError(said.reason, f"this site's people refused run {run.run}")
        facts = facts_of(run, terms, home, self._log, self._ledger, self._clock())
        cost = format(facts.run_epsilon, ".6f")
        broken = breaches(rules, facts)
        names = [breach.rule for breach in broken]
        if said is not None:  # accepted: people stand above their own rules
            self._proposals.settle(proposal.id)
            return
        for breach in broken:
            if breach.rule not in rules.ask:
                self._refuse(proposal, breach.rule, breach.code, breach.detail, cost)
        if broken or "runs" in rules.ask:
            raise self._wait(proposal, names or ["runs"], cost, broken)
        self._enter(proposal, "accepted", cost=cost)

    def check_not_withdrawn(self, run: str) -> None:
        """Hold an accepted run back once the site's people refused it."""
        said = self._last_word(run)
        if said is not None and said.decision == "refused":
            raise RefusedError(said.reason, f"this site's people withdrew from run {run}")

    def anchor(self) -> tuple[int, str]:
        """Return size and root of the site's own log, with everything decided so far."""
        return self._log.anchor()

    def is_withdrawn(self, run: str) -> bool:
        """Whether the site's people refused a run that was accepted."""
        said = self._last_word(run)
        return said is not None and said.decision == "refused"

    def _last_word(self, run: str) -> SiteDecided | None:
        said = None
        for _, _, body in self._log.entries(SiteDecided, run=run):
            said = body if body.by == "person" else said
        return said

    def _said(self, proposal: Proposal) -> SiteDecided | None:
        """The newest word of the site's people on exactly this proposal."""
        found = None
        run = "" if proposal.run is None else proposal.run.run
        start = ZERO_DIGEST if proposal.run is None else run_digest(proposal.run)
        for _, _, body in self._log.entries(SiteDecided, run=run or None):
            if (body.by, body.run, body.charter, body.start) == ("person", run, proposal.digest, start):
                found = body
        return found

    def _refuse(self, proposal: Proposal, rule: str, code: str, detail: str, cost: str = "") -> None:
        self._enter(proposal, "refused", (rule,), code, cost)
        raise RefusedError(code, detail)

    def _wait(
        self, proposal: Proposal, rules: Sequence[str], cost: str = "", broken: Sequence[Breach] = ()
    ) -> WaitingError:
        self._proposals.keep(proposal)
        self._enter(proposal, "waiting", rules, cost=cost)
        why = "; ".join(breach.detail for breach in broken) or f"rules {', '.join(rules)} ask"
        return WaitingError(f"{why}: see `affidavit site review {proposal.id}`")

    def _enter(
        self, proposal: Proposal, word: str, rules: Sequence[str] = (), reason: str = "", cost: str = ""
    ) -> None:
        """Write what the rules decided, once; refusals and delays go by the book, which bounds a flood."""
        body = decision(
            self._keys,
            self._log.site,
            proposal,
            word,
            by="rules",
            rules=rules,
            reason=reason,
            run_epsilon=cost,
        )
        name = event_id("decided", body.run, body.charter, body.start, word, reason, *rules)
        if word == "accepted":
            self._log.append(body, event_id=name)
        else:
            kind = "run.propose" if body.run else "charter.sign"
            self._refusals.enter(body, kind=kind, reason=reason or word, event_id=name)
