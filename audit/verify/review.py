"""Steps on the charter's terms for a prediction, and on the person behind it (GDPR Art. 22)."""

from __future__ import annotations

from audit.entries import Prediction
from audit.serving_bodies import LEGAL_BASES, REVIEW_OUTCOMES, PredictionReviewed
from audit.verify.chain import Chain, FailError, GapError, Leaf, Outcome, expect, need, verify_body
from audit.verify.history import LINKS
from audit.verify.members import CHARTER
from audit.verify.report import Word

REVIEW = "The review by a person"


def check_review(chain: Chain) -> Outcome:
    """Where the charter gives decisions legal effect, an officer confirmed this one."""
    charter, leaf = need(chain.charter, CHARTER), need(chain.prediction, LINKS)
    if not charter.legal_effect:
        return Outcome(word=Word.PROVED, detail="the charter gives decisions no legal effect: none is needed")
    found = [
        review for review in chain.leaves(PredictionReviewed) if review.body.prediction == leaf.leaf_hash
    ]
    if not found:
        raise GapError(
            "review.none",
            "the charter gives decisions legal effect, and no review of this one is in the file: not final",
            leaf.index,
        )
    signed = [_check_one(chain, leaf, review) for review in found]
    review = found[0]
    if any(other.body.outcome != review.body.outcome for other in found):
        raise FailError(
            "review.contradicted", "the log holds reviews that contradict each other", review.index
        )
    if review.body.outcome != "confirmed":
        raise FailError("review.overturned", "an officer overturned this decision; nothing may rest on it",
                        review.index)  # fmt: skip
    who = next((name for name in signed if name), "")
    if who:
        return Outcome(word=Word.PROVED, detail=f"confirmed by the key of {who}, an officer of the charter")
    return Outcome(
        word=Word.ATTESTED,
        code="review.unsigned",
        detail=f"by the log's operator: confirmed by a holder of an officer's key, {review.body.principal}",
    )


def check_terms(chain: Chain, legal_basis: str | None, region: str, entry: int) -> None:
    """The request was what the charter's terms ask: a legal basis, and a region.

    Args:
        legal_basis: the word; "" when none was said; None where it stays closed.

    Raises:
        FailError: it was not, and the decision to answer was wrong.
    """
    charter = need(chain.charter, CHARTER)
    if legal_basis is not None:
        if charter.needs_legal_basis and not legal_basis:
            raise FailError(
                "prediction.legal_basis", "the charter demands one and the request said none", entry
            )
        if legal_basis and legal_basis not in LEGAL_BASES:
            raise FailError("prediction.legal_basis", f"{legal_basis[:40]!r} is no word for one", entry)
    if charter.regions and region not in charter.regions:
        raise FailError("prediction.region", f"region {region!r} is not in the charter", entry)


def _check_one(chain: Chain, leaf: Leaf[Prediction], review: Leaf[PredictionReviewed]) -> str:
    """Return the officer who signed, "" where nobody did."""
    charter, body = need(chain.charter, CHARTER), review.body
    prediction = need(chain.prediction, LINKS).body
    for field in ("model", "version"):
        expect(
            getattr(body, field),
            getattr(prediction, field),
            code="review.other_decision",
            field=field,
            entry=review.index,
        )
    event = chain.located[leaf.index].entry.event_id
    expect(body.decision, event, code="review.other_decision", field="decision", entry=review.index)
    if review.index <= leaf.index:
        raise FailError("verify.order", "the review comes before what it reviews", review.index)
    if body.outcome not in REVIEW_OUTCOMES:
        raise FailError("review.outcome", f"{body.outcome[:40]!r} is no outcome", review.index)
    if not body.officer and not body.signature:
        expect(body.role, "officer", code="review.not_an_officer", field="role", entry=review.index)
        return ""
    if body.officer not in charter.officers:
        raise FailError("review.not_an_officer", f"{body.officer} is no officer of the charter", review.index)
    verify_body(body, body.officer, code="review.signature", who="the officer", entry=review.index)
    return charter.officers[body.officer]
