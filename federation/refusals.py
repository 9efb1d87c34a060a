"""What is entered of releases that count for nothing, of refusals, and of a masked round that was opened."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from flwr.app import Message

from audit.entries import SiteEnrolled, SiteUndelivered, event_hash
from audit.round_bodies import UpdateRefused
from audit.secure_bodies import RoundOpened
from audit.update_bounds import UpdateTerms, square_norm
from audit.weights import encode_update
from federation.coordinator import Coordinator, stable_event_id
from federation.errors import StatementError
from federation.exchange import read_answer
from federation.pieces import brings_blobs
from federation.secure_round import MaskedRound
from federation.statements import AcceptedUpdate, RoundTerms, refusal_event_id, verify_refusal

_logger = logging.getLogger(__name__)


def record_too_long(
    coordinator: Coordinator, updates: Mapping[str, AcceptedUpdate], terms: Mapping[str, UpdateTerms]
) -> dict[str, int]:
    """Keep and log updates that pass the norm bound; return the leaf of each site's reported release.

    The update itself is kept, so that anybody can measure it again.
    """
    leaves = {}
    for site, update in sorted(updates.items()):
        statement = update.statement
        reported = coordinator.append(
            SiteUndelivered(statement=statement),
            f"site:{site}",
            stable_event_id("site.undelivered", event_hash(statement)),
        )
        leaves[site] = reported.leaf_index
        body = UpdateRefused(
            run=statement.run,
            round=statement.round,
            site=site,
            update=coordinator.blobs.put(update.update),
            statement=reported.leaf_hash.hex(),
            reason="norm_bound",
            norm=str(math.isqrt(square_norm(update.values))),
            bound=str(terms[site].norm_bound),
        )
        coordinator.append(
            body, "coordinator", stable_event_id("update.refused", statement.run, site, str(statement.round))
        )
    return leaves


def record_masked(coordinator: Coordinator, masked: MaskedRound, rejected: dict[str, StatementError]) -> None:
    """Log what sites refused in the steps around a masked round, and name it in `rejected`."""
    for site, refusal in masked.refusals.items():
        event_id = refusal_event_id(masked.terms.run, masked.terms.round, refusal)
        coordinator.append(refusal, f"site:{site}", event_id)
    for site, problem in masked.rejected.items():
        rejected.setdefault(site, problem)


def record_refusals(
    coordinator: Coordinator,
    terms: RoundTerms,
    replies: Iterable[Message],
    site_of: Callable[[Message], str | None],
    rejected: dict[str, StatementError],
    enrolments: Mapping[str, SiteEnrolled],
) -> None:
    """Log each proved refusal among a round's replies, and name it in place of "holds no statement"."""
    for reply in replies:
        site = site_of(reply)
        if site is None or site not in rejected:
            continue
        answer = read_answer(site, reply)
        if "refusal" in answer.header:
            try:
                refusal = verify_refusal(site, enrolments[site], answer.header["refusal"])
            except StatementError as error:
                rejected[site] = error
                continue
            rejected[site] = StatementError(site, "refusal", refusal.reason)
            event_id = refusal_event_id(terms.run, terms.round, refusal)
            coordinator.append(refusal, f"site:{site}", event_id)
    for rejection in rejected.values():
        _logger.warning("round %d: %s", terms.round, rejection)


def record_opened(coordinator: Coordinator, masked: MaskedRound) -> None:
    """Keep the transcript and the sum of a masked round, and log that it was opened."""
    opened = masked.opened
    if opened is None:
        return
    transcript = opened.transcript
    body = RoundOpened(
        run=masked.terms.run,
        round=masked.terms.round,
        roster=transcript.roster,
        survivors=transcript.survivors,
        transcript=coordinator.blobs.put(transcript.encode()),
        total=coordinator.blobs.put(encode_update(opened.total)),
    )
    coordinator.append(body, "coordinator", stable_event_id("round.opened", body.run, str(body.round)))


def noting(replies: Iterable[Message], unanswered: list[Message]) -> Iterator[Message]:
    """Pass replies on as they come, and keep those that bring no update: they may hold a signed refusal."""
    for reply in replies:
        if reply.has_error() or not brings_blobs(reply.content):
            unanswered.append(reply)
        yield reply
