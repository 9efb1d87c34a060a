"""What a site agrees to before any round: charters that its people approved, runs that its budget allows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from audit.canonical import canonical_bytes, parse_canonical
from audit.decimals import decimal_text
from audit.entries import (
    CharterSigned,
    MechanismEvent,
    RunAccepted,
    RunStarted,
    body_document,
    decode_signature,
    parse_body,
    run_digest,
    signing_payload,
)
from audit.epsilon import epsilon_floor, epsilon_text, recompute, whole_site_epsilon
from audit.errors import AuditError
from audit.keys import VerifyKey, parse_public_key
from audit.shared_noise import site_level
from clients.decisions import Decisions
from clients.errors import DataFileError, RefusedError
from clients.home import LifetimeBudget, SiteHome
from clients.identity import SiteKeys
from clients.ledger import Odometers, Reservation
from clients.terms import Terms, charter_digest, read_terms
from clients.trainer import Trainer
from federation.accounting import LifetimeFilter, pld_epsilon
from federation.errors import AccountingError


class Admission:
    """One site's yes or no; every method raises `RefusedError` for a no."""

    def __init__(
        self,
        home: SiteHome,
        keys: SiteKeys,
        ledger: Odometers,
        trainer: Trainer,
        decisions: Decisions,
        *,
        origin: str,
    ) -> None:
        self.home, self._origin = home, origin
        self._keys, self._ledger, self._trainer = keys, ledger, trainer
        self._decisions = decisions
        self._terms: dict[str, Terms] = {}
        self._read = home.stamp()

    def refresh(self) -> None:
        """Take the rules of `site.yaml` as they are now, when the file was written since.

        Raises:
            HomeError: the file breaks a rule; names the key and the fix.
        """
        stamp = self.home.stamp()
        if stamp != self._read:
            self.home, self._read = self.home.refreshed(), stamp

    def sign_charter(self, canonical: str, author: str) -> CharterSigned:
        """Return the identity key's signature of a charter that this site's people approved.

        `author` is who is said to have drawn it up; the signature binds it, so that all are told the same.
        """
        terms = read_terms(canonical, site=self.home.name)
        self._check_identity(terms)
        check_promise(terms)
        if terms.digest not in self.home.config.rules.approved_charters:
            self.home = self._decisions.on_charter(self.home, canonical, self._foreign_purposes(terms))
        return self._keys.signed(
            CharterSigned(digest=terms.digest, author=author, site=self.home.name, signature="")
        )

    def approved_terms(self, canonical: str) -> Terms:
        """Return the terms of a charter that this site has approved."""
        digest = charter_digest(canonical)
        if digest not in self.home.config.rules.approved_charters:
            raise RefusedError("charter_not_approved", f"this site has not signed charter {digest}")
        if digest not in self._terms:
            terms = read_terms(canonical, site=self.home.name)
            self._check_identity(terms)
            check_promise(terms)
            self._terms[digest] = terms
        return self._terms[digest]

    def accept(self, run: RunStarted, canonical: str) -> Reservation:
        """Reserve the run's whole plan, or return the reservation it has already."""
        if run.charter != charter_digest(canonical):
            raise RefusedError(
                "charter_not_approved", "the run names another charter than the text it came with"
            )
        terms = self.approved_terms(canonical)
        self._check_run(run, terms)
        reservation = self._ledger.reservation(run.run)
        if reservation is None:
            self._check_free(run.run)
            try:
                self._trainer.check_file(terms)
            except DataFileError as error:
                raise RefusedError("contract_not_met", str(error)) from error
            return self._reserve(run, terms, canonical)
        accepted = parse_body(RunAccepted, parse_canonical(reservation.acceptance))
        if reservation.charter != canonical or reservation.closed or accepted.start != run_digest(run):
            raise RefusedError(
                "run_not_accepted", f"run {run.run} was accepted with another start or charter, or is over"
            )
        return reservation

    def check_not_withdrawn(self, run: str) -> None:
        self._decisions.check_not_withdrawn(run)

    def check_participants(self, names: Sequence[str], terms: Terms) -> None:
        if (
            not _are_of(tuple(names), tuple(terms.sites))
            or self.home.name not in names
            or len(names) < terms.minimum_sites
        ):
            raise RefusedError(
                "participants_not_allowed",
                f"participants {list(names)[:20]} must be sorted, of the charter, include this site, "
                f"and be at least {terms.minimum_sites}",
            )

    def admits(self, committed: Sequence[MechanismEvent], planned: Sequence[MechanismEvent]) -> bool:
        """Ask the hard stops: the site's own caps over the population's whole life, for a row's or subject's
        part and, where the site sets one, for all its rows together.
        """
        lifetime = self.home.config.lifetime
        try:
            fits = LifetimeFilter(epsilon=lifetime.epsilon, delta=lifetime.delta).admits(committed, planned)
        except AccountingError as error:
            raise RefusedError("budget_exhausted", str(error)) from error
        return fits and within_whole_site(lifetime, committed, planned)

    def _check_identity(self, terms: Terms) -> None:
        if terms.identities[self.home.name] != self._keys.identity.text:
            raise RefusedError("charter_not_approved", "the charter gives this site another identity key")

    def _foreign_purposes(self, terms: Terms) -> tuple[str, ...]:
        allowed = self.home.config.rules.purposes
        return tuple(sorted(set(terms.purposes) - set(allowed))) if allowed else ()

    def _check_run(self, run: RunStarted, terms: Terms) -> None:
        domain, payload = signing_payload(run)
        try:
            VerifyKey(parse_public_key(run.author)).verify(domain, payload, decode_signature(run.signature))
        except AuditError as error:
            raise RefusedError("bad_request", f"run_started is not signed by its author: {error}") from error
        if run.rounds != terms.rounds:
            raise RefusedError("bad_request", f"the run has {run.rounds} rounds, the charter {terms.rounds}")
        self.check_participants(run.sites, terms)
        if run.initial_model != terms.initial_digest:
            raise RefusedError("base_model_mismatch", "the run does not start from the charter's weights")

    def _check_free(self, run: str) -> None:
        """One run at a time has a population: its releases follow each other on one odometer, and a run whose
        releases came in between would be refused by its coordinator, after they were debited.
        """
        for other in self._ledger.open_reservations(self.home.config.population.pseudonym):
            if self._decisions.is_withdrawn(other.run):
                self._ledger.close_run(other.run)  # for good: it could not go on beside the new one
            else:
                raise RefusedError(
                    "population_busy",
                    f"run {other.run} has the population until it ends; to end it for this site: "
                    f"affidavit site refuse {other.run[:12]}",
                )

    def _reserve(self, run: RunStarted, terms: Terms, canonical: str) -> Reservation:
        population, lifetime = self.home.config.population.pseudonym, self.home.config.lifetime
        planned = terms.planned
        committed = self._ledger.committed_events(population)
        if not self.admits(committed, planned):
            raise RefusedError(
                "budget_exhausted",
                f"{len(planned)} more releases after {len(committed)} would pass this site's lifetime cap "
                f"of epsilon {lifetime.epsilon} at delta {lifetime.delta}{_whole_site_text(lifetime)}",
            )
        self._decisions.on_run(self.home, run, terms, canonical)
        size, root = self._decisions.anchor()
        head, whole = self._ledger.head(population), lifetime.whole_site_epsilon
        body = RunAccepted(
            run=run.run,
            start=run_digest(run),
            origin=self._origin,
            charter=terms.digest,
            site=self.home.name,
            population=population,
            next_sequence=head.sequence + 1,
            previous_event=head.event_hash,
            planned_events=len(planned),
            lifetime_epsilon_cap=decimal_text(lifetime.epsilon),
            signature="",
            whole_site_epsilon_cap="" if whole is None else decimal_text(whole),
            lifetime_delta="" if whole is None else decimal_text(lifetime.delta),
            site_log_size=size,
            site_log_root=root,
        )
        acceptance = canonical_bytes(body_document(self._keys.signed(body)))
        reservation = Reservation(run.run, population, canonical, planned, acceptance, False)
        self._ledger.reserve(reservation)
        return reservation


@lru_cache(maxsize=8)
def _are_of(names: tuple[str, ...], sites: tuple[str, ...]) -> bool:
    """Whether names are sorted, each once, and all of these sites: asked once for all sites of a process."""
    return set(names) <= set(sites) and list(names) == sorted(set(names))


def within_whole_site(
    lifetime: LifetimeBudget, committed: Sequence[MechanismEvent], planned: Sequence[MechanismEvent]
) -> bool:
    """Whether a site as a whole stays within its own cap; a release that bounds nothing of it never does."""
    cap = lifetime.whole_site_epsilon
    return cap is None or whole_site_epsilon([*committed, *planned], float(lifetime.delta)) <= float(cap)


def _whole_site_text(lifetime: LifetimeBudget) -> str:
    cap = lifetime.whole_site_epsilon
    return (
        ""
        if cap is None
        else f", or of {cap} for all its rows together (which needs site_level, or unit: site)"
    )


def check_promise(terms: Terms) -> None:
    """Hold a charter to its own epsilon: people who read it agreed to that number.

    Raises:
        RefusedError: the plan with this noise costs more.
    """
    cost = _cost(terms.planned, float(terms.delta), float(terms.epsilon))
    if cost > float(terms.epsilon) * (1 + 1e-9):
        raise RefusedError(
            "charter_not_approved",
            f"the charter promises epsilon {terms.epsilon} at delta {terms.delta}, its plan costs "
            f"{epsilon_text(cost)}; `affidavit charter check` names the noise it needs",
        )
    if terms.site_epsilon is not None:
        whole = recompute([site_level(event) for event in terms.planned], float(terms.delta)).value
        if whole > float(terms.site_epsilon) * (1 + 1e-9):
            raise RefusedError(
                "charter_not_approved",
                f"the charter promises a whole site epsilon {terms.site_epsilon}, its plan costs "
                f"{epsilon_text(whole)}",
            )


@lru_cache(maxsize=8)
def _cost(planned: tuple[MechanismEvent, ...], delta: float, promised: float) -> float:
    """Return what a plan costs, by the cheapest bound that decides whether it is within the promise."""
    bound = recompute(planned, delta)
    if bound.value <= promised or bound.exact:
        return bound.value
    try:
        return min(bound.value, pld_epsilon(planned, delta))
    except AccountingError:
        return epsilon_floor(planned, delta)
