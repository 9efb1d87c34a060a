"""After the last round: ask the sites for noisy counts of how the averaged weights do, and log them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from audit.entries import ZERO_DIGEST
from audit.private_evaluation import METRIC, SOURCE, Evaluation, EvaluationError, Worth, worth
from audit.round_bodies import Metric, RunEvaluated
from federation.coordinator import Coordinator, stable_event_id
from federation.errors import StatementError
from federation.exchange import Exchange, Request
from federation.statements import AcceptedUpdate, RoundTerms, record_statements, verify_statement

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What the sites released, once it is in the log."""

    accepted: Mapping[str, AcceptedUpdate]  # by site, sorted
    leaves: tuple[str, ...]  # leaf hashes of the statements, in that order
    own_leaf: Mapping[str, int]
    rejected: Mapping[str, StatementError]


def gather_counts(
    coordinator: Coordinator,
    exchange: Exchange,
    terms: RoundTerms,
    requests: Mapping[str, Request],
    *,
    timeout_s: float,
    logged: Mapping[str, AcceptedUpdate] | None = None,
) -> Counted:
    """Ask the participants of `terms` for one release, prove each answer, and write its statement.

    `logged` are releases that are in the log already, in a run that is resumed; their sites are not in
    `requests`.
    """
    accepted: dict[str, AcceptedUpdate] = dict(logged or {})
    rejected: dict[str, StatementError] = {}
    answers = exchange.ask(requests, timeout_s=timeout_s, group_id=str(terms.round))
    for site in sorted(requests):
        answer = answers[site][0]
        try:
            if answer.failure or "statement" not in answer.header:
                raise StatementError(site, "reply", answer.failure or "holds no statement")
            update = answer.blobs.get("update", b"")
            accepted[site] = verify_statement(terms, site, answer.header["statement"], update)
        except StatementError as error:
            _logger.warning("release %d: %s", terms.round, error)
            rejected[site] = error
    leaves, own_leaf = [], {}
    for site, sequenced in record_statements(coordinator, dict(sorted(accepted.items()))).items():
        leaves.append(sequenced.leaf_hash.hex())
        own_leaf[site] = sequenced.leaf_index
    return Counted(
        accepted=dict(sorted(accepted.items())), leaves=tuple(leaves), own_leaf=own_leaf, rejected=rejected
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What came of it: `worth` is None where too few sites answered, or the noise left no row."""

    worth: Worth | None
    counted: Counted


def evaluate_privately(
    coordinator: Coordinator,
    exchange: Exchange,
    terms: RoundTerms,
    evaluation: Evaluation,
    requests: Mapping[str, Request],
    model: bytes,
    *,
    timeout_s: float,
    minimum_sites: int,
    logged: Mapping[str, AcceptedUpdate] | None = None,
) -> Evaluated:
    """Ask the participants of `terms`, prove their answers, and write statements and run.evaluated.

    What a site released is logged whatever becomes of the evaluation: it is spent. `logged` are releases
    that are in the log already, in a run that is resumed; their sites are not in `requests`.
    """
    counted = gather_counts(coordinator, exchange, terms, requests, timeout_s=timeout_s, logged=logged)
    accepted = counted.accepted
    said = None
    if len(accepted) >= minimum_sites:
        try:
            said = worth(evaluation, [accepted[site].values for site in sorted(accepted)])
        except EvaluationError as error:
            _logger.warning("evaluation: %s", error)
    metric = (
        ()
        if said is None
        else (Metric(name=METRIC, value=said.accuracy, source=SOURCE, dataset=ZERO_DIGEST),)
    )
    body = RunEvaluated(
        run=terms.run,
        round=terms.round,
        weights=hashlib.sha256(model).hexdigest(),
        statements=counted.leaves,
        missing=tuple(sorted(set(terms.participants) - set(accepted))),
        metrics=metric,
        baseline="" if said is None else said.baseline,
        spread="" if said is None else said.spread,
    )
    coordinator.append(body, "coordinator", stable_event_id("run.evaluated", terms.run))
    return Evaluated(worth=said, counted=counted)
