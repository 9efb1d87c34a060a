"""Whether what a site sent for a round is what the charter, the run and its own odometer demand."""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

from audit.canonical import canonical_bytes
from audit.changed_body import with_fields
from audit.entries import (
    ZERO_DIGEST,
    CharterSigned,
    MechanismEvent,
    RunAccepted,
    RunStarted,
    SiteEnrolled,
    SiteRefused,
    SiteStatement,
    body_document,
    decode_signature,
    event_hash,
    parse_body,
    run_digest,
    signing_payload,
)
from audit.errors import AuditError
from audit.keys import VerifyKey, parse_public_key
from audit.ledger import Sequenced
from audit.notes import NoteVerifier
from audit.weights import update_array
from federation.blobs import SMALL_BYTES, BlobStore
from federation.coordinator import Addition, Coordinator, stable_event_id
from federation.errors import StatementError
from federation.flat import update_vector
from federation.trust import OPERATOR

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class OdometerHead:
    """The last event of a population that the coordinator knows of."""

    sequence: int = 0
    event_hash: str = ZERO_DIGEST

    def after(self, statement: SiteStatement) -> OdometerHead:
        return OdometerHead(sequence=statement.sequence, event_hash=event_hash(statement))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTerms:
    """What every statement of one round must say."""

    run: str
    round: int
    charter: str
    base_model: str
    participants: tuple[str, ...]
    previous_round: str
    event: MechanismEvent
    released: int  # numbers in an update; the event's dimension counts those that stay at the site too
    enrolments: Mapping[str, SiteEnrolled]
    heads: Mapping[str, OdometerHead]
    roster: str = ""  # whose masks the updates carry; "" where they carry none


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedUpdate:
    """A site's proved statement and the integers it released."""

    statement: SiteStatement
    read: Callable[[], bytes]  # gives the update file, from memory or from where it is kept
    is_kept: bool = False  # in the coordinator's files already

    @property
    def update(self) -> bytes:
        return self.read()

    @property
    def values(self) -> array[int]:
        return update_array(self.read())

    def kept_in(self, blobs: BlobStore) -> AcceptedUpdate:
        """Write the update where files lie by digest, and hold it no longer: a round of a large model does
        not fit into memory. Small ones stay, and are written together once all are there.
        """
        if len(self.read()) <= SMALL_BYTES:
            return self
        return dataclasses.replace(self, read=partial(blobs.get, blobs.put(self.read())), is_kept=True)


def verify_statement(terms: RoundTerms, site: str, document: object, update: bytes) -> AcceptedUpdate:
    """Prove one site's reply to a round: its statement's document, or the statement read of it.

    Raises:
        StatementError: naming the field that is not as it must be.
    """
    try:
        statement = document if type(document) is SiteStatement else parse_body(SiteStatement, document)
    except AuditError as error:
        raise StatementError(site, "statement", str(error)) from error
    enrolment, head = terms.enrolments[site], terms.heads[site]
    wanted: dict[str, Any] = {
        "run": terms.run,
        "round": terms.round,
        "charter": terms.charter,
        "site": site,
        "population": enrolment.population,
        "base_model": terms.base_model,
        "participants": terms.participants,
        "previous_round": terms.previous_round,
        "event": terms.event,
        "sequence": head.sequence + 1,
        "previous_event": head.event_hash,
        "update": hashlib.sha256(update).hexdigest(),
        "roster": terms.roster,
    }
    for name, value in wanted.items():
        found = getattr(statement, name)
        if found != value:
            raise StatementError(site, name, f"is {_short(found)}, must be {_short(value)}")
    verify_signature(site, statement, enrolment.statement_key)
    try:
        count = len(update_vector(update))
    except AuditError as error:
        raise StatementError(site, "update", str(error)) from error
    if count != terms.released:
        raise StatementError(site, "update", f"has {count} numbers, the model {terms.released}")
    if statement.participants is not terms.participants or statement.event is not terms.event:
        # they are the round's own again, not one more copy of them a site
        statement = with_fields(statement, participants=terms.participants, event=terms.event)
    return AcceptedUpdate(statement=statement, read=lambda: update)


def record_statements(
    coordinator: Coordinator, accepted: Mapping[str, AcceptedUpdate]
) -> dict[str, Sequenced]:
    """Keep the sites' updates, then enter their statements, together and in the order given."""
    updates = [update for update in accepted.values() if not update.is_kept]
    digests = [update.statement.update for update in updates]  # compared with the bytes by `verify_statement`
    coordinator.blobs.put_all([update.update for update in updates], digests)
    entries: list[Addition] = [
        (update.statement, f"site:{site}", stable_event_id("site.statement", event_hash(update.statement)))
        for site, update in accepted.items()
    ]
    return dict(zip(accepted, coordinator.append_all(entries), strict=True))


def verify_enrolment(site: str, identity: str, origin: str, document: object) -> SiteEnrolled:
    """Prove an enrolment: all three keys signed it for log `origin`, the identity is the charter's.

    Raises:
        StatementError: naming the field.
    """
    try:
        body = parse_body(SiteEnrolled, document)
        witness = NoteVerifier.parse(body.witness_key)
    except AuditError as error:
        raise StatementError(site, "enrolment", str(error)) from error
    if body.site != site or body.identity_key != identity:
        raise StatementError(site, "identity_key", "is not the one in the charter")
    if body.origin != origin:
        raise StatementError(site, "origin", f"is {_short(body.origin)}, must be {_short(origin)}")
    if body.operator and not OPERATOR.fullmatch(body.operator):
        raise StatementError(site, "operator", "is not lower-case letters, digits and hyphens")
    if witness.name != site:
        raise StatementError(site, "witness_key", f"bears the name {witness.name!r}")
    domain, payload = signing_payload(body)
    for name, key in (
        ("signature", VerifyKey(parse_public_key(body.identity_key))),
        ("statement_proof", _key(site, body.statement_key)),
        ("witness_proof", witness.key),
    ):
        try:
            key.verify(domain, payload, decode_signature(getattr(body, name), field=name))
        except AuditError as error:
            raise StatementError(site, name, str(error)) from error
    return body


def verify_charter_signature(
    site: str, identity: str, digest: str, author: str, document: object
) -> CharterSigned:
    """Prove that the site's identity key signed the charter, as drawn up by `author`."""
    body = _parse(CharterSigned, site, document)
    if (body.digest, body.site) != (digest, site):
        raise StatementError(site, "digest", "signs another charter, or for another site")
    if body.author != author:
        raise StatementError(site, "author", f"is {_short(body.author)}, must be {_short(author)}")
    verify_signature(site, body, identity)
    return body


def verify_acceptance(
    site: str, enrolment: SiteEnrolled, started: RunStarted, releases: int, document: object
) -> RunAccepted:
    """Prove that the site reserved the whole plan of this start of a run, `releases` events, in this log."""
    body = _parse(RunAccepted, site, document)
    wanted = {
        "run": started.run,
        "start": run_digest(started),
        "origin": enrolment.origin,
        "charter": started.charter,
        "site": site,
        "population": enrolment.population,
        "planned_events": releases,
    }
    for name, value in wanted.items():
        if getattr(body, name) != value:
            raise StatementError(site, name, f"is {_short(getattr(body, name))}, must be {_short(value)}")
    verify_signature(site, body, enrolment.statement_key)
    return body


def verify_refusal(site: str, enrolment: SiteEnrolled, document: object) -> SiteRefused:
    """Prove that it was the site that declined."""
    body = _parse(SiteRefused, site, document)
    if body.site != site:
        raise StatementError(site, "site", "refuses in another site's name")
    verify_signature(site, body, enrolment.statement_key)
    return body


def refusal_event_id(run: str, number: int, refusal: SiteRefused) -> str:
    """Return the event id of a refusal: the same one once, and another of the same site beside it.

    A site that is asked again after a crash may refuse for another reason; that must not stop the run.
    """
    said = hashlib.sha256(canonical_bytes(body_document(refusal))).hexdigest()
    return stable_event_id("site.refused", run, refusal.site, str(number), said)


def verify_past_statement(site: str, enrolment: SiteEnrolled, document: object) -> SiteStatement:
    """Prove a statement of an earlier round that the site reports as undelivered."""
    body = _parse(SiteStatement, site, document)
    if (body.site, body.population) != (site, enrolment.population):
        raise StatementError(site, "undelivered", "is another site's or another population's statement")
    verify_signature(site, body, enrolment.statement_key)
    return body


def verify_signature(site: str, body: Any, public_key: str) -> None:
    """Prove a signed body's `signature`; StatementError when it does not verify."""
    domain, payload = signing_payload(body)
    try:
        _key(site, public_key).verify(domain, payload, decode_signature(body.signature))
    except AuditError as error:
        raise StatementError(site, "signature", str(error)) from error


def _parse(kind: type[T], site: str, document: object) -> T:
    try:
        return parse_body(kind, document)
    except AuditError as error:
        raise StatementError(site, kind.__name__, str(error)) from error


@lru_cache(maxsize=4096)
def _verify_key(text: str) -> VerifyKey:
    return VerifyKey(parse_public_key(text))


def _key(site: str, text: str) -> VerifyKey:
    try:
        return _verify_key(text)
    except AuditError as error:
        raise StatementError(site, "key", str(error)) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 90 else text[:87] + "..."
