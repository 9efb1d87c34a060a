"""The site's agent: the one process that sees rows, holds keys and spends the budget.

`Agent.open(home)` once, then `handle(kind, header, blobs)` for each request; it never raises. Requests come
from an untrusted coordinator through an untrusted relay, so every one is checked against what the site
itself knows: the charters its people approved, its own ledger, its own policy of witnesses. A refusal
carries a code from the closed list; the reason goes to the site's console.

What leaves does not depend on any row outside the mechanism. Time is a declared exception: how long an
answer takes can depend on the number of rows.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from audit.canonical import canonical_bytes, parse_canonical
from audit.entries import (
    Body,
    SiteRefused,
    SiteStatement,
    body_bytes,
    body_document,
    event_hash,
)
from audit.errors import AuditError, WitnessConflictError, WitnessError
from audit.site_bodies import BundleDecided
from audit.weights import encode_update
from clients.admission import Admission
from clients.code_digest import agent_code
from clients.decisions import Decisions
from clients.errors import HomeError, LedgerBehindError, RefusedError, WaitingError
from clients.high_water import Head
from clients.history import Clock, History, OpenedNotes
from clients.home import SiteHome
from clients.ledger import Odometers, Release, Reservation, SiteLedger
from clients.link import MAX_BLOB_BYTES, MAX_HEADER_BYTES
from clients.local_layers import LocalLayers
from clients.masked_rounds import MaskedRequest, MaskedRounds, MaskedStep, parse_masked
from clients.past import Past
from clients.refusal_book import RefusalBook
from clients.requests import (
    LoggedEntry,
    ProposeRequest,
    RoundRequest,
    names_of,
    parse_bundle,
    parse_charter_request,
    parse_cosign,
    parse_finished,
    parse_header,
    parse_propose,
    parse_round,
    parse_run,
    request_digest,
)
from clients.reserved import unused
from clients.site_log import Diary, SiteLog
from clients.story import SiteStory
from clients.terms import Terms
from clients.trainer import Trainer, Workshop
from federation.flat import update_bytes

_logger = logging.getLogger(__name__)

Answer = tuple[dict[str, Any] | bytes, dict[str, bytes]]  # the header, or its canonical bytes
Handler = Callable[[bytes, Mapping[str, bytes]], Answer]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Agent:
    """One site's agent. Thread-safe: requests are answered one after the other."""

    def __init__(
        self,
        home: SiteHome,
        ledger: Odometers,
        log: Diary,
        *,
        clock: Clock = _utc_now,
        workshop: Workshop | None = None,
        notes: OpenedNotes | None = None,
    ) -> None:
        """Take the home, its open ledger and its open log.

        `workshop` and `notes` are what virtual sites of one process share; a real site has its own.

        Raises:
            ClientsError: the home's policy or keys are missing, or its population is not the ledger's.
        """
        _check_population(home, ledger)
        self._ledger, self._log = ledger, log
        self._keys = home.keys()
        self._clock = clock
        self._trainer = Trainer(home.config.data, LocalLayers(home.local_layers_path), workshop)
        policy = home.policy()
        self._origin = policy.logs[0].origin
        self._masked = MaskedRounds(home.name, self._origin, self._keys, ledger)
        self.refusals = RefusalBook(home.name, self._note, self._keys.signed)
        decisions = Decisions(home, self._keys, ledger, log, self.refusals, clock)
        self.admission = Admission(home, self._keys, ledger, self._trainer, decisions, origin=self._origin)
        own = (self._keys.statement.verify_key, *self._keys.past_statements)
        self._history = History(notes or OpenedNotes(policy), own, clock)
        self._past = Past(self._history, ledger, self._trainer, self.observe)
        self._lock = threading.RLock()
        self._closed_by: LedgerBehindError | None = None
        self._closed = False
        self._witness = home.witness()
        self._answers: dict[str, Handler] = {
            "hello": self._hello,
            "charter.sign": self._sign_charter,
            "cosign": self._cosign,
            "run.propose": self._propose,
            "round": self._ask_round,
            "run.undelivered": self._tell_undelivered,
            "run.finished": self._finished,
            "masked.keys": self._masked_step(self._masked.keys, "attempt", "participants"),
            "masked.shares": self._masked_step(self._masked.shares, "keys"),
            "masked.survivors": self._masked_step(self._masked.survivors, "survivors", "updates"),
            "masked.open": self._masked_step(self._masked.open, "agreed"),
            "bundle.check": self._check_bundle,
        }
        self._story = SiteStory(log, ledger)
        self._story.catch_up(self.population)

    @classmethod
    def open(cls, home: Path | SiteHome, *, clock: Clock = _utc_now) -> Agent:
        """Open the agent of a site's home, read afresh; one process at a time.

        Raises:
            LedgerBehindError: an old copy of the ledger was put back.
            ClientsError: the home is incomplete, or another agent holds it.
        """
        site_home = SiteHome.open(home.path if isinstance(home, SiteHome) else home)
        ledger = SiteLedger(site_home.ledger_path, site_home.high_water_path)
        try:
            log = SiteLog.open(site_home.path, site_home.name, clock=clock)
        except BaseException:
            ledger.close()
            raise
        try:
            return cls(site_home, ledger, log, clock=clock)
        except BaseException:
            log.close()
            ledger.close()
            raise

    @property
    def home(self) -> SiteHome:
        return self.admission.home

    @property
    def name(self) -> str:
        return self.home.name

    @property
    def population(self) -> str:
        return self.home.config.population.pseudonym

    @property
    def ledger(self) -> Odometers:
        return self._ledger

    @property
    def log(self) -> Diary:
        return self._log

    def rest(self) -> bool:
        """Use a quiet moment for what a round to come needs anyway; say whether there is more of it."""
        return self._trainer.rest()

    def settle(self) -> None:
        """Write what was only counted, and sign the site's log as it stands; once in a while, and idle."""
        self.refusals.settle()
        self._log.publish()

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self.refusals.settle(now=True)
                self._log.close()
            self._ledger.close()

    def handle(self, kind: str, header: bytes, blobs: Mapping[str, bytes]) -> tuple[bytes, dict[str, bytes]]:
        """Answer one request in canonical JSON and blobs; on failure one code from the closed list."""
        with self._lock:
            document: dict[str, Any] | bytes
            try:
                document, answer_blobs = self._dispatch(kind, header, blobs)
            except WaitingError as error:
                _logger.warning("site %s: %s", self.name, error)
                document, answer_blobs = {"error": error.refusal}, {}
            except RefusedError as error:
                _logger.warning("site %s refuses %s: %s", self.name, kind[:40], error)
                document, answer_blobs = self._declined(kind, error.refusal), {}
            except Exception:
                _logger.exception("site %s could not answer %s", self.name, kind[:40])
                document, answer_blobs = self._declined(kind, "internal_error"), {}
        return document if isinstance(document, bytes) else canonical_bytes(document), answer_blobs

    def observe(self, statement: SiteStatement) -> None:
        """Take note of a statement that the log shows; this site's own are compared with its ledger.

        Raises:
            LedgerBehindError: this site signed a release that its ledger does not have; the agent stops.
        """
        if (statement.site, statement.population) != (self.name, self.population):
            return
        self._history.verify_own(statement)
        seen = Head(statement.sequence, event_hash(statement))
        try:
            self._ledger.check_not_behind(self.population, seen, witness="the log")
        except LedgerBehindError as error:
            self._closed_by = error
            raise

    def _dispatch(self, kind: str, header: bytes, blobs: Mapping[str, bytes]) -> Answer:
        if len(header) > MAX_HEADER_BYTES or any(len(blob) > MAX_BLOB_BYTES for blob in blobs.values()):
            raise RefusedError("bad_request", "the request is larger than any this agent answers")
        answer = self._answers.get(kind)
        if answer is None:
            raise RefusedError("bad_request", f"there is no request {kind[:40]!r}")
        return answer(header, blobs)

    def _declined(self, kind: str, code: str) -> dict[str, Any]:
        """Enter an unsigned refusal; a log that cannot be written changes nothing about the answer."""
        try:
            self.refusals.refused(kind, code)
        except AuditError:
            _logger.exception("site %s cannot write its own log", self.name)
        return {"error": code}

    def _note(self, body: Body, event_id: str | None) -> None:
        self._log.append(body, event_id=event_id)

    def _hello(self, header: bytes, _: Mapping[str, bytes]) -> Answer:
        parse_header(header, frozenset())
        enrolment = self._keys.enrolment(self.name, self.population, self._origin, self.home.config.operator)
        self._story.enrolled(enrolment)
        return {"enrolment": body_document(enrolment)}, {}

    def _sign_charter(self, header: bytes, _: Mapping[str, bytes]) -> Answer:
        asked = parse_charter_request(header)
        self.admission.refresh()
        signed = self.admission.sign_charter(asked.charter, asked.author)
        self._story.signed(signed)
        return {"signature": body_document(signed)}, {}

    def _propose(self, header: bytes, _: Mapping[str, bytes]) -> Answer:
        proposal = parse_propose(header)
        return self._signed_refusal(proposal.run.run, proposal.run.charter, 0, self._accept, proposal)

    def _ask_round(self, header: bytes, blobs: Mapping[str, bytes]) -> Answer:
        request = parse_round(header, blobs)
        return self._signed_refusal(request.run, request.charter, request.round, self._round, request)

    def _check_bundle(self, header: bytes, _: Mapping[str, bytes]) -> Answer:
        digest = parse_bundle(header)
        self.admission.refresh()
        approved = digest in self.home.config.rules.approved_bundles
        if not approved:
            _logger.warning("site %s: bundle %s is not approved", self.name, digest)
            body = BundleDecided(site=self.name, digest=digest, decision="refused", signature="")
            self.refusals.enter(self._keys.signed(body), kind="bundle.check", reason="bundle_not_approved")
        return {"approved": approved}, {}

    def _tell_undelivered(self, header: bytes, _: Mapping[str, bytes]) -> Answer:
        """Name the releases of an open run that no witnessed checkpoint has shown: they stay debited."""
        run = parse_run(header)
        if self._closed_by is not None:
            raise RefusedError("ledger_behind_log", str(self._closed_by))
        reservation = self._ledger.reservation(run)
        if reservation is None or reservation.closed:
            raise RefusedError("run_not_accepted", f"this site has not accepted run {run}, or it is over")
        undelivered = [
            body_document(self._keys.signed(statement))
            for statement in self._ledger.undelivered(self.population)
            if statement.run == run
        ]
        return {"undelivered": undelivered}, {}

    def _finished(self, header: bytes, _: Mapping[str, bytes]) -> Answer:
        finished = parse_finished(header)
        if finished.own_statement is not None:
            self._note_own(finished.own_statement)
        self._end(finished.run)
        return {}, {}

    def _end(self, run: str) -> None:
        self._ledger.close_run(run)
        self._masked.forget(run)

    def _signed_refusal(self, run: str, charter: str, number: int, act: Any, request: Any) -> Answer:
        try:
            if self._closed_by is not None:
                raise self._closed_by
            answer: Answer = act(request)
        except WaitingError:
            raise
        except LedgerBehindError as error:
            return self._refuse(run, charter, number, RefusedError("ledger_behind_log", str(error)))
        except RefusedError as error:
            return self._refuse(run, charter, number, error)
        return answer

    def _refuse(self, run: str, charter: str, number: int, error: RefusedError) -> Answer:
        _logger.warning("site %s refuses run %s round %d: %s", self.name, run, number, error)
        body = SiteRefused(
            run=run, charter=charter, site=self.name, round=number, reason=error.refusal, signature=""
        )
        signed = self._keys.signed(body)
        kind = "round" if number else "run.propose"
        self.refusals.enter(signed, kind=kind, reason=signed.reason)
        return {"refusal": body_document(signed)}, {}

    def _accept(self, request: ProposeRequest) -> Answer:
        if request.own_statement is not None:
            self._note_own(request.own_statement)
        if request.ended is not None:  # it may never have heard: it was away, or out of the run
            self._end(self._history.run_ended(request.ended))
        self.admission.refresh()
        reservation = self.admission.accept(request.run, request.charter)
        self._story.accepted(reservation)
        # signed anew: it is logged now, and from now on only the present key's signatures count
        undelivered = [
            body_document(self._keys.signed(statement))
            for statement in self._ledger.undelivered(self.population)
            if statement.run != request.run.run
        ]
        return {"acceptance": parse_canonical(reservation.acceptance), "undelivered": undelivered}, {}

    def _round(self, request: RoundRequest) -> Answer:
        digest = request_digest(request)
        released = self._ledger.release_of(request.run, request.round)
        if released is not None:
            if released.request_digest != digest:
                raise RefusedError(
                    "already_released",
                    f"run {request.run} round {request.round} was answered to another request",
                )
            self._story.released(released)
            return _answer(released)
        reservation, terms = self._running(request.run, request.charter)
        self.admission.check_participants(request.participants, terms)
        if not 1 <= request.round <= terms.releases:
            raise RefusedError("round_out_of_order", f"the charter has {terms.releases} releases a run")
        if (request.shares is not None) != terms.masks(request.round):
            raise RefusedError("bad_request", "shares come with a masked round, and with no other")
        previous_round = self._past.check(request, terms)
        self._check_budget(reservation, terms, request.round)
        released = self._release(request, terms, previous_round, digest)
        self._story.released(released)
        return _answer(released)

    def _running(self, run: str, charter: str) -> tuple[Reservation, Terms]:
        """Return an accepted run's reservation and terms."""
        reservation = self._ledger.reservation(run)
        if reservation is None or reservation.closed:
            raise RefusedError("run_not_accepted", f"this site has not accepted run {run}, or it is over")
        self.admission.check_not_withdrawn(run)
        terms = self.admission.approved_terms(reservation.charter)
        if charter != terms.digest:
            raise RefusedError("charter_not_approved", "the round names another charter than its run")
        return reservation, terms

    def _masked_step(self, step: MaskedStep, *fields: str) -> Handler:
        """Return the handler of one step of a masked round."""

        def act(request: MaskedRequest) -> Answer:
            _, terms = self._running(request.run, request.charter)
            if "participants" in fields:
                self.admission.check_participants(names_of(request.document, "participants"), terms)
            return step(request, terms), {}

        def handle(header: bytes, _: Mapping[str, bytes]) -> Answer:
            request = parse_masked(header, *fields)
            return self._signed_refusal(request.run, request.charter, request.round, act, request)

        return handle

    def _note_own(self, logged: LoggedEntry) -> None:
        statement, _, _ = self._history.own_statement(logged)
        self.observe(statement)
        if (statement.site, statement.population) == (self.name, self.population):
            self._ledger.mark_delivered(statement.run, statement.round)

    def _check_budget(self, reservation: Reservation, terms: Terms, number: int) -> None:
        releases = self._ledger.spent(self.population)
        spent = [release.event for release in releases]
        event = terms.event_of(number)
        used = [release.event for release in releases if release.run == reservation.run]
        if event not in unused(reservation, used):
            raise RefusedError("budget_exhausted", f"run {reservation.run} has used its whole reservation")
        if not self.admission.admits(spent, (event,)):
            raise RefusedError("budget_exhausted", "this site's lifetime cap is reached")

    def _release(self, request: RoundRequest, terms: Terms, previous_round: str, digest: str) -> Release:
        values = self._trainer.update(terms, request.base_model, run=request.run, server_round=request.round)
        masked = self._masked.mask(request, terms, list(values)) if terms.masks(request.round) else None
        update_file = update_bytes(values) if masked is None else encode_update(masked.values)
        head = self._ledger.head(self.population)
        unsigned = SiteStatement(
            run=request.run,
            round=request.round,
            charter=terms.digest,
            site=self.name,
            population=self.population,
            base_model=request.base_digest,
            participants=_shared_names(request.participants),
            agent_code=agent_code(),
            previous_round=previous_round,
            event=terms.event_of(request.round),
            sequence=head.sequence + 1,
            previous_event=head.event_hash,
            update=hashlib.sha256(update_file).hexdigest(),
            signature="",
            roster="" if masked is None else masked.roster,
        )
        kept = None if masked is None else masked.state
        return self._ledger.commit_release(self._keys.signed(unsigned), update_file, digest, kept)

    def _cosign(self, header: bytes, _: Mapping[str, bytes]) -> Answer:
        request = parse_cosign(header)
        try:
            line = self._witness.cosign(
                request.note, request.old_size, request.proof, now=int(self._clock().timestamp())
            )
        except WitnessError as error:
            stale = isinstance(error, WitnessConflictError)  # how a coordinator learns where to start from
            level = logging.DEBUG if stale else logging.WARNING
            _logger.log(level, "site %s does not cosign: %s", self.name, error)
            if not stale:
                self._declined("cosign", error.code)
            return _witness_error(error), {}
        return {"cosignature": line.decode()}, {}


@lru_cache(maxsize=4)
def _shared_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the first of equal tuples, so that many sites of one process hold their names once."""
    return names


def _check_population(home: SiteHome, ledger: Odometers) -> None:
    """A new pseudonym would set the odometer back to 1, and nothing signed says that nobody is in both."""
    others = sorted(ledger.populations() - {home.config.population.pseudonym})
    if others:
        raise HomeError(
            home.path / "site.yaml",
            f"names another population than the ledger, which counts for {', '.join(others)}",
            "put that pseudonym back; other people need a site of their own",
        )


def _witness_error(error: WitnessError) -> dict[str, Any]:
    if isinstance(error, WitnessConflictError):
        return {"error": "witness.stale", "tree_size": error.recorded_size}
    return {"error": error.code}


def _answer(release: Release) -> Answer:
    return b'{"statement":%b}' % body_bytes(release.statement), {"update": release.update}
