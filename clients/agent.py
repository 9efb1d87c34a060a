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
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from audit.canonical import JsonValue, canonical_bytes, parse_canonical
from audit.entries import (
    ZERO_DIGEST,
    SiteRefused,
    SiteStatement,
    body_document,
    event_hash,
)
from audit.errors import WitnessConflictError, WitnessError
from clients.admission import Admission
from clients.code_digest import agent_code
from clients.errors import HomeError, LedgerBehindError, RefusedError
from clients.high_water import Head
from clients.history import Clock, History
from clients.home import SiteHome
from clients.ledger import Release, Reservation, SiteLedger
from clients.link import MAX_BLOB_BYTES, MAX_HEADER_BYTES
from clients.requests import (
    LoggedEntry,
    ProposeRequest,
    RoundRequest,
    parse_charter_request,
    parse_cosign,
    parse_finished,
    parse_header,
    parse_propose,
    parse_round,
)
from clients.terms import Terms
from clients.trainer import Trainer

_logger = logging.getLogger(__name__)

Answer = tuple[dict[str, Any], dict[str, bytes]]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Agent:
    """One site's agent. Thread-safe: requests are answered one after the other."""

    def __init__(self, home: SiteHome, ledger: SiteLedger, *, clock: Clock = _utc_now) -> None:
        """Take the home and its open ledger.

        Raises:
            ClientsError: the home's policy or keys are missing, or its population is not the ledger's.
        """
        _check_population(home, ledger)
        self._ledger = ledger
        self._keys = home.keys()
        self._clock = clock
        self._trainer = Trainer(home.config.data)
        policy = home.policy()
        self._origin = policy.logs[0].origin
        self.admission = Admission(home, self._keys, ledger, self._trainer, origin=self._origin)
        self._history = History(policy, self._keys.statement.verify_key, clock)
        self._lock = threading.RLock()
        self._closed_by: LedgerBehindError | None = None
        self._witness = home.witness()

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
            return cls(site_home, ledger, clock=clock)
        except BaseException:
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
    def ledger(self) -> SiteLedger:
        return self._ledger

    def close(self) -> None:
        with self._lock:
            self._ledger.close()

    def handle(self, kind: str, header: bytes, blobs: Mapping[str, bytes]) -> tuple[bytes, dict[str, bytes]]:
        """Answer one request in canonical JSON and blobs; on failure one code from the closed list."""
        with self._lock:
            try:
                document, answer_blobs = self._dispatch(kind, header, blobs)
            except RefusedError as error:
                _logger.warning("site %s refuses %s: %s", self.name, kind, error)
                document, answer_blobs = {"error": error.refusal}, {}
            except Exception:
                _logger.exception("site %s could not answer %s", self.name, kind)
                document, answer_blobs = {"error": "internal_error"}, {}
        return canonical_bytes(document), answer_blobs

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
        if kind == "hello":
            parse_header(header, frozenset())
            enrolment = self._keys.enrolment(
                self.name, self.population, self._origin, self.home.config.operator
            )
            return {"enrolment": body_document(enrolment)}, {}
        if kind == "charter.sign":
            asked = parse_charter_request(header)
            signed = self.admission.sign_charter(asked.charter, asked.author)
            return {"signature": body_document(signed)}, {}
        if kind == "cosign":
            return self._cosign(header)
        if kind == "run.propose":
            proposal = parse_propose(header)
            return self._signed_refusal(proposal.run.run, proposal.run.charter, 0, self._accept, proposal)
        if kind == "round":
            request = parse_round(header, blobs)
            return self._signed_refusal(request.run, request.charter, request.round, self._round, request)
        if kind == "run.finished":
            finished = parse_finished(header)
            if finished.own_statement is not None:
                self._note_own(finished.own_statement)
            self._ledger.close_run(finished.run)
            return {}, {}
        raise RefusedError("bad_request", f"there is no request {kind[:40]!r}")

    def _signed_refusal(self, run: str, charter: str, number: int, act: Any, request: Any) -> Answer:
        try:
            if self._closed_by is not None:
                raise self._closed_by
            answer: Answer = act(request)
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
        return {"refusal": body_document(self._keys.signed(body))}, {}

    def _accept(self, request: ProposeRequest) -> Answer:
        if request.own_statement is not None:
            self._note_own(request.own_statement)
        reservation = self.admission.accept(request.run, request.charter)
        undelivered = [
            body_document(statement)
            for statement in self._ledger.undelivered(self.population)
            if statement.run != request.run.run
        ]
        return {"acceptance": parse_canonical(reservation.acceptance), "undelivered": undelivered}, {}

    def _round(self, request: RoundRequest) -> Answer:
        digest = _request_digest(request)
        released = self._ledger.release_of(request.run, request.round)
        if released is not None:
            if released.request_digest != digest:
                raise RefusedError(
                    "already_released",
                    f"run {request.run} round {request.round} was answered to another request",
                )
            return _answer(released)
        reservation = self._ledger.reservation(request.run)
        if reservation is None or reservation.closed:
            raise RefusedError(
                "run_not_accepted", f"this site has not accepted run {request.run}, or it is over"
            )
        terms = self.admission.approved_terms(reservation.charter)
        if request.charter != terms.digest:
            raise RefusedError("charter_not_approved", "the round names another charter than its run")
        self.admission.check_participants(request.participants, terms)
        if not 1 <= request.round <= terms.rounds:
            raise RefusedError("round_out_of_order", f"the charter has {terms.rounds} rounds")
        previous_round = self._check_past(request, terms)
        self._check_budget(reservation, terms)
        return _answer(self._release(request, terms, previous_round, digest))

    def _check_past(self, request: RoundRequest, terms: Terms) -> str:
        """Return the leaf hash of the previous round, once the base model is proved to be its output."""
        base = hashlib.sha256(request.base_model).hexdigest()
        if request.round == 1:
            if base != hashlib.sha256(terms.initial_model()).hexdigest():
                raise RefusedError("base_model_mismatch", "round 1 does not start from the charter's weights")
            return ZERO_DIGEST
        number = request.round - 1
        completed, leaf_hash = self._history.round_completed(
            request.previous_round, run=request.run, number=number
        )
        self._check_own(request, completed.statements)
        if base != completed.output_model:
            raise RefusedError("base_model_mismatch", f"the base model is not the output of round {number}")
        return leaf_hash

    def _check_own(self, request: RoundRequest, leaves: tuple[str, ...]) -> None:
        own = self._ledger.release_of(request.run, request.round - 1)
        if request.own_statement is None:
            if own is not None:
                raise RefusedError(
                    "unwitnessed_history", "this site's last statement is not shown in the log"
                )
            return
        statement, leaf_hash, in_round = self._history.own_statement(request.own_statement)
        self.observe(statement)
        if own is None or own.statement != statement:
            raise RefusedError("unwitnessed_history", "the statement shown is not this site's for that round")
        if in_round and leaf_hash not in leaves:
            raise RefusedError("unwitnessed_history", "the round's entry leaves this site's statement out")
        self._ledger.mark_delivered(request.run, request.round - 1)

    def _note_own(self, logged: LoggedEntry) -> None:
        statement, _, _ = self._history.own_statement(logged)
        self.observe(statement)
        if (statement.site, statement.population) == (self.name, self.population):
            self._ledger.mark_delivered(statement.run, statement.round)

    def _check_budget(self, reservation: Reservation, terms: Terms) -> None:
        releases = self._ledger.releases(self.population)
        used = sum(release.statement.run == reservation.run for release in releases)
        spent = [release.statement.event for release in releases]
        if used >= len(reservation.planned) or reservation.planned[used] != terms.event:
            raise RefusedError("budget_exhausted", f"run {reservation.run} has used its whole reservation")
        if not self.admission.admits(spent, (terms.event,)):
            raise RefusedError("budget_exhausted", "this site's lifetime cap is reached")

    def _release(self, request: RoundRequest, terms: Terms, previous_round: str, digest: str) -> Release:
        update_file = self._trainer.update(terms, request.base_model)
        head = self._ledger.head(self.population)
        unsigned = SiteStatement(
            run=request.run,
            round=request.round,
            charter=terms.digest,
            site=self.name,
            population=self.population,
            base_model=hashlib.sha256(request.base_model).hexdigest(),
            participants=request.participants,
            agent_code=agent_code(),
            previous_round=previous_round,
            event=terms.event,
            sequence=head.sequence + 1,
            previous_event=head.event_hash,
            update=hashlib.sha256(update_file).hexdigest(),
            signature="",
        )
        return self._ledger.commit_release(self._keys.signed(unsigned), update_file, digest)

    def _cosign(self, header: bytes) -> Answer:
        request = parse_cosign(header)
        try:
            line = self._witness.cosign(
                request.note, request.old_size, request.proof, now=int(self._clock().timestamp())
            )
        except WitnessError as error:
            stale = isinstance(error, WitnessConflictError)  # how a coordinator learns where to start from
            level = logging.DEBUG if stale else logging.WARNING
            _logger.log(level, "site %s does not cosign: %s", self.name, error)
            return _witness_error(error), {}
        return {"cosignature": line.decode()}, {}


def _check_population(home: SiteHome, ledger: SiteLedger) -> None:
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
    return {"statement": body_document(release.statement)}, {"update": release.update}


def _request_digest(request: RoundRequest) -> str:
    """Name a request by what it asks for: the same request may come again with a fresher proof."""

    def leaf(logged: LoggedEntry | None) -> str:
        return "" if logged is None else hashlib.sha256(logged.leaf).hexdigest()

    document: dict[str, JsonValue] = {
        "run": request.run,
        "round": request.round,
        "charter": request.charter,
        "participants": list(request.participants),
        "previous_round": leaf(request.previous_round),
        "own_statement": leaf(request.own_statement),
        "base_model": hashlib.sha256(request.base_model).hexdigest(),
    }
    return hashlib.sha256(b"affidavit/request/v1\x00" + canonical_bytes(document)).hexdigest()
