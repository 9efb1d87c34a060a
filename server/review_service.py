"""Use cases of human review: is a decision final, and an officer's word on it (GDPR Art. 22).

A decision is named by the event id of its entry. Where its charter says `decisions: legal_effect`, it is
final only once one entry `prediction.reviewed` names it; there is at most one, because its event id follows
from the decision's. The officer's own key may sign it; without a signature the log's operator vouches for the
key holder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Final

from audit.entries import (
    Prediction,
    body_document,
    decode_entry,
    decode_signature,
    signing_payload,
)
from audit.errors import AuditError
from audit.keys import VerifyKey, parse_public_key
from audit.ledger import Ledger, StoredEntry
from audit.principal import Authorizer, Principal, Question, require
from audit.serving_bodies import REVIEW_OUTCOMES, PredictionReviewed
from federation.coordinator import stable_event_id
from server.answers import never_final
from server.errors import (
    LedgerUnavailableError,
    MalformedRequestError,
    ReviewDoneError,
    ReviewNotFoundError,
    ReviewNotNeededError,
    ReviewSignatureError,
)
from server.facts import has_legal_effect
from server.journal import Journal
from server.live import LiveModels

_DECISION: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """What is known of one decision."""

    decision: str
    leaf_index: int
    leaf_hash: str
    model: str
    version: str
    required: bool
    never_final: str  # why no review can make it final; "" where one can
    reviewed: PredictionReviewed | None
    reviewed_index: int | None
    reviewed_at: str

    @property
    def final(self) -> bool:
        """Whether anything may rest on the decision: it needs no review, or a person confirmed it.

        A tester's answer is never final.
        """
        if self.never_final:
            return False
        return not self.required or (self.reviewed is not None and self.reviewed.outcome == "confirmed")

    def to_json(self) -> dict[str, Any]:
        found = None
        if self.reviewed is not None:
            found = {
                **body_document(self.reviewed), "leaf_index": self.reviewed_index, "time": self.reviewed_at,
            }  # fmt: skip
        return {
            "decision": self.decision,
            "entry": {"leaf_index": self.leaf_index, "leaf_hash": self.leaf_hash},
            "model": self.model,
            "version": self.version,
            "review_required": self.required,
            "final": self.final,
            "reason": self.never_final,
            "review": found,
        }


def event_of(decision: str) -> str:
    """Return the event id of the one review of a decision."""
    return stable_event_id("prediction.reviewed", decision)


def read_review(
    ledger: Ledger, live: LiveModels, principal: Principal, authorizer: Authorizer, decision: str
) -> Review:
    """Say whether a decision is final.

    Raises:
        ReviewNotFoundError: no decision has that id.
        AccessDeniedError: it is neither the caller's own, nor are they an officer.
    """
    stored, body = _decision(ledger, decision)
    attributes: dict[str, str | int | bool | tuple[str, ...]] = {
        "principal": body.principal, "site": body.site, "public": False,
    }  # fmt: skip
    question = Question(action="reviews.read", resource=str(stored.leaf_index), attributes=attributes)
    require(authorizer, principal, question)
    return _review(ledger, live, stored, body)


def draft_review(
    review: Review, principal: Principal, outcome: str, reason: str, officer: str
) -> PredictionReviewed:
    """Return the body of the review, unsigned: what an officer's own key signs."""
    return PredictionReviewed(
        decision=review.decision,
        prediction=review.leaf_hash,
        model=review.model,
        version=review.version,
        outcome=outcome,
        reason=reason,
        principal=principal.id,
        role=principal.role,
        officer=officer,
        signature="",
    )


def record_review(
    ledger: Ledger,
    journal: Journal,
    live: LiveModels,
    principal: Principal,
    authorizer: Authorizer,
    decision: str,
    *,
    outcome: str,
    reason: str = "",
    officer: str = "",
    signature: str = "",
) -> Review:
    """Write an officer's word on a decision; it is the last.

    Raises:
        AccessDeniedError: the caller is no officer.
        ReviewNotFoundError, ReviewNotNeededError: there is no such decision, or nothing to review.
        ReviewDoneError: somebody reviewed it before.
        ReviewSignatureError: the signature is not of an officer of the charter, over this review.
        LedgerUnavailableError: it is not, or not known to be, in the log.
    """
    require(authorizer, principal, Question(action="reviews.write", resource="service"))
    if outcome not in REVIEW_OUTCOMES:
        raise MalformedRequestError(
            f"outcome: {outcome[:40]!r}; say one of {', '.join(sorted(REVIEW_OUTCOMES))}"
        )
    stored, prediction = _decision(ledger, decision)
    review = _review(ledger, live, stored, prediction)
    if review.never_final:
        raise ReviewNotNeededError(
            f"decision {decision} is {review.never_final}, so there is no review of it"
        )
    if not review.required:
        raise ReviewNotNeededError(
            f"decision {decision} has no legal effect by its charter; nothing to review"
        )
    if review.reviewed is not None:
        raise ReviewDoneError(f"decision {decision} was reviewed before", review=review.to_json()["review"])
    body = draft_review(review, principal, outcome, reason, officer)
    if officer or signature:
        body = replace(body, signature=signature)
        _check_signature(body, live.version(prediction.model, prediction.version).charter)
    try:
        journal.append_now(body, event_id=event_of(decision))
    except LedgerUnavailableError as error:
        if ledger.find_event(event_of(decision)) is not None:  # another officer, in this moment
            raise ReviewDoneError(f"decision {decision} was reviewed before") from error
        raise
    return _review(ledger, live, stored, prediction)


def _decision(ledger: Ledger, decision: str) -> tuple[StoredEntry, Prediction]:
    stored = ledger.find_event(decision) if _DECISION.fullmatch(decision) else None
    body = decode_entry(stored.body).body if stored is not None else None
    if stored is None or not isinstance(body, Prediction):
        raise ReviewNotFoundError(f"no decision {decision[:40]!r} is in the log")
    return stored, body


def _review(ledger: Ledger, live: LiveModels, stored: StoredEntry, body: Prediction) -> Review:
    charter = live.version(body.model, body.version).charter
    found = ledger.find_event(event_of(stored.event_id))
    entry = decode_entry(found.body) if found is not None else None
    reviewed = entry.body if entry is not None and isinstance(entry.body, PredictionReviewed) else None
    return Review(
        decision=stored.event_id,
        leaf_index=stored.leaf_index,
        leaf_hash=stored.leaf_hash.hex(),
        model=body.model,
        version=body.version,
        required=has_legal_effect(charter),
        never_final=never_final(body.role, body.transition),
        reviewed=reviewed,
        reviewed_index=found.leaf_index if found is not None and reviewed is not None else None,
        reviewed_at=entry.time if entry is not None and reviewed is not None else "",
    )


def _check_signature(body: PredictionReviewed, charter: dict[str, Any]) -> None:
    if body.officer not in [officer["key"] for officer in charter["officers"]]:
        raise ReviewSignatureError("officer: is no officer of the decision's charter")
    try:
        domain, payload = signing_payload(body)
        key = VerifyKey(parse_public_key(body.officer))
        key.verify(domain, payload, decode_signature(body.signature))
    except AuditError as error:
        raise ReviewSignatureError(f"signature: {error}") from error
