"""After the last round: ask the sites for noisy counts of their training rows by bin, and log their sum."""

from __future__ import annotations

from collections.abc import Mapping

from audit.reference import Reference, sketch_document
from audit.round_bodies import RunReferenced
from federation.coordinator import Coordinator, stable_event_id
from federation.exchange import Exchange, Request
from federation.private_evaluation import Counted, gather_counts
from federation.statements import AcceptedUpdate, RoundTerms


def sketch_rows(
    coordinator: Coordinator,
    exchange: Exchange,
    terms: RoundTerms,
    reference: Reference,
    requests: Mapping[str, Request],
    *,
    timeout_s: float,
    minimum_sites: int,
    logged: Mapping[str, AcceptedUpdate],
) -> Counted:
    """Ask the participants of `terms`, prove their answers, and write statements and run.referenced.

    What a site released is logged whatever becomes of the sketch: it is spent. `logged` as in
    `gather_counts`.
    """
    counted = gather_counts(coordinator, exchange, terms, requests, timeout_s=timeout_s, logged=logged)
    sketch = ""
    if len(counted.accepted) >= minimum_sites:
        document = sketch_document(
            reference,
            run=terms.run,
            charter=terms.charter,
            sites=tuple(counted.accepted),
            counts=[update.values for update in counted.accepted.values()],
        )
        sketch = coordinator.blobs.put(document)
    body = RunReferenced(
        run=terms.run,
        round=terms.round,
        statements=counted.leaves,
        missing=tuple(sorted(set(terms.participants) - set(counted.accepted))),
        sketch=sketch,
    )
    coordinator.append(body, "coordinator", stable_event_id("run.referenced", terms.run))
    return counted
