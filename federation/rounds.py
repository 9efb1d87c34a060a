"""The round loop: ask, prove, aggregate, log, have it witnessed, and only then the next round.

A round ends when every participant answered or its time-out passed, whichever is first; a lost message
costs one repetition, never the round. A site that gave no statement is out for the rest of the run, for it
could not show its own release in witnessed history.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from audit.entries import (
    ZERO_DIGEST,
    RoundAbandoned,
    RoundCompleted,
    RunCompleted,
    RunFailed,
    RunStarted,
    SiteUndelivered,
    event_hash,
)
from audit.epsilon import recompute
from audit.models import initial_weights, model_file
from audit.private_evaluation import Evaluation
from audit.reference import Reference
from audit.replay import average
from federation.anomaly import record_view
from federation.charter import Charter
from federation.coordinator import Coordinator, stable_event_id
from federation.errors import FederationError, RunFailedError, StatementError
from federation.evaluation import PublicData, metrics_of
from federation.exchange import Exchange, Request, read_answer
from federation.mechanism import planned_event, planned_events
from federation.patience import PATIENCE_S
from federation.preparation import (
    ACTOR,
    Prepared,
    connect_sites,
    failures_text,
    gather_signatures,
    propose_run,
    record_charter,
)
from federation.private_evaluation import evaluate_privately
from federation.progress import RunEvent, emit
from federation.refusals import record_too_long
from federation.sketching import sketch_rows
from federation.statements import RoundTerms, verify_refusal
from federation.strategies import strategy_of
from federation.witnessing import Witnessing

_logger = logging.getLogger(__name__)

FINISH_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """A completed run: the digest of its averaged weights, and what it cost."""

    run: str
    charter: str
    rounds: int
    weights: str
    sites: tuple[str, ...]
    epsilon: float  # this run's, per site, by the accountant of the live table
    elapsed_s: float


@dataclass(slots=True)
class _Progress:
    participants: tuple[str, ...]
    base_model: bytes
    previous_round: str = ZERO_DIGEST
    round_leaf: int | None = None
    own_leaf: dict[str, int] = field(default_factory=dict)
    outputs: list[list[float]] = field(default_factory=list)


class RoundLoop:
    """One run, from the first hello to run.completed."""

    def __init__(
        self,
        coordinator: Coordinator,
        grid: Grid,
        charter: Charter,
        run_started: RunStarted,
        *,
        exchange: Exchange | None = None,
        patience_s: float = PATIENCE_S,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`patience_s`: how long to wait for sites whose people have to decide."""
        self._coordinator, self._charter, self._run = coordinator, charter, run_started
        self._grid, self._patience_s, self._stop = grid, patience_s, stop
        self._exchange = exchange or Exchange(grid)
        self._witnessing = Witnessing(coordinator, self._exchange)
        self._event = planned_event(charter)
        self._started = time.monotonic()
        data = None if charter.public_set is None else coordinator.blobs.find(charter.public_set.digest)
        self._public = None if data is None else PublicData.read(charter, data)
        self._counted: tuple[str, ...] | None = None  # who answered the evaluation, where there is one

    def carry_out(self, author: str) -> RunOutcome:
        """Do everything. `author` is the public key under which the charter is published.

        Raises:
            RunFailedError: the run stopped; the log says why.
        """
        weights = initial_weights(self._charter.layers, self._charter.digest)
        prepared = self._prepare(author)
        strategy = strategy_of(self._charter, weights)
        base = model_file(self._charter.layers, weights)
        self._coordinator.blobs.put(base)
        state = _Progress(participants=prepared.sites, base_model=base)
        for number in range(1, self._charter.plan.rounds + 1):
            if self._stop():
                raise self._fail(number, "stopped", "somebody asked it to stop", state)
            self._round(number, strategy, prepared, state)
        return self._complete(prepared, state)

    def _prepare(self, author: str) -> Prepared:
        coordinator, charter = self._coordinator, self._charter
        try:
            prepared = connect_sites(coordinator, self._exchange, charter)
            self._emit("enrolled", sites=tuple(sorted(prepared.enrolments)))
            published_by = record_charter(coordinator, charter, author)
            patience: dict[str, Any] = {"patience_s": self._patience_s, "waiting": self._tell_waiting}
            gather_signatures(coordinator, self._exchange, charter, published_by, prepared, **patience)
            self._emit("charter_signed", sites=charter.site_names)
            self._witnessing.cosign(prepared.enrolments)
            propose_run(
                coordinator, self._exchange, charter, self._run, prepared, self._witnessing, **patience
            )
        except FederationError as error:
            coordinator.append(self._run, ACTOR, stable_event_id("run.started", self._run.run))
            raise self._fail(0, "site_refused", str(error)) from error
        for site, failure in prepared.failed.items():
            self._emit("refused", sites=(site,), detail=str(failure))
        if len(prepared.sites) < charter.minimum_sites:
            raise self._fail(0, "site_refused", failures_text(prepared.failed))
        self._emit("accepted", sites=prepared.sites)
        self._witnessing.cosign(prepared.sites)
        return prepared

    def _tell_waiting(self, sites: tuple[str, ...]) -> None:
        self._emit("waiting", sites=sites, detail="for the sites' people to decide")

    def _round(self, number: int, strategy: Any, prepared: Prepared, state: _Progress) -> None:
        terms = self._terms(number, prepared, state)
        requests = {site: self._request(number, site, state) for site in state.participants}
        strategy.open_round(
            terms, {s: self._exchange.message(s, r, str(number)) for s, r in requests.items()}
        )
        arrays: ArrayRecord = strategy.arrays()
        addressed: list[Message] = list(strategy.configure_train(number, arrays, ConfigRecord(), self._grid))
        self._emit("asked", number=number, sites=state.participants)
        replies = self._exchange.collect(
            addressed,
            requests,
            timeout_s=float(self._charter.plan.round_timeout_s),
            group_id=str(number),
            on_reply=lambda site: self._emit("answered", number=number, sites=(site,)),
        )
        output, _ = strategy.aggregate_train(number, replies)
        self._record_refusals(number, replies, strategy, prepared)
        accepted = {site: strategy.accepted[site] for site in sorted(strategy.accepted)}
        missing = tuple(sorted(set(state.participants) - set(accepted)))
        state.own_leaf |= record_too_long(self._coordinator, strategy.too_long, strategy.update_terms)
        if output is None:
            self._abandon(number, accepted, missing, strategy.rejected, state)
        leaves: list[str] = []
        for site, update in accepted.items():
            self._coordinator.blobs.put(update.update)
            sequenced = self._coordinator.append(
                update.statement,
                f"site:{site}",
                stable_event_id("site.statement", event_hash(update.statement)),
            )
            leaves.append(sequenced.leaf_hash.hex())
            state.own_leaf[site] = sequenced.leaf_index
            prepared.heads[site] = prepared.heads[site].after(update.statement)
        weights: list[float] = strategy.weights.tolist()
        state.base_model = model_file(self._charter.layers, weights)
        metrics = () if self._public is None else metrics_of(self._charter, self._public, weights)
        body = RoundCompleted(
            run=self._run.run,
            round=number,
            base_model=terms.base_model,
            statements=tuple(leaves),
            missing=missing,
            output_model=self._coordinator.blobs.put(state.base_model),
            metrics=metrics,
        )
        completed = self._coordinator.append(
            body, ACTOR, stable_event_id("round.completed", self._run.run, str(number))
        )
        if self._charter.aggregation is not None:
            seen = {site: update.values for site, update in (accepted | strategy.too_long).items()}
            record_view(self._coordinator, self._charter, body, seen)
        state.previous_round, state.round_leaf = completed.leaf_hash.hex(), completed.leaf_index
        state.participants = tuple(accepted)
        state.outputs = [*state.outputs[-(self._charter.average_last - 1) :], weights]
        if self._charter.average_last == 1:
            state.outputs = [weights]
        witnesses = self._witnessing.cosign(accepted)
        self._emit(
            "round",
            number=number,
            sites=tuple(accepted),
            missing=missing,
            metrics={metric.name: float(metric.value) for metric in metrics},
            epsilon=self._epsilon(number),
            witnesses=witnesses,
        )

    def _terms(self, number: int, prepared: Prepared, state: _Progress) -> RoundTerms:
        return RoundTerms(
            run=self._run.run,
            round=number,
            charter=self._charter.digest,
            base_model=hashlib.sha256(state.base_model).hexdigest(),
            participants=state.participants,
            previous_round=state.previous_round,
            event=self._event,
            released=self._charter.released,
            enrolments=prepared.enrolments,
            heads=prepared.heads,
        )

    def _request(
        self, number: int, site: str, state: _Progress, *, participants: tuple[str, ...] | None = None
    ) -> Request:
        shown: dict[str, Any] = {"previous_round": None, "own_statement": None}
        if number > 1 and state.round_leaf is not None:
            shown["previous_round"] = self._witnessing.logged(state.round_leaf)
            shown["own_statement"] = self._witnessing.logged(state.own_leaf[site])
        header = {
            "run": self._run.run,
            "round": number,
            "charter": self._charter.digest,
            "participants": list(state.participants if participants is None else participants),
            **shown,
        }
        return Request(kind="round", header=header, blobs={"base_model": state.base_model})

    def _record_refusals(
        self, number: int, replies: Sequence[Message], strategy: Any, prepared: Prepared
    ) -> None:
        """Write each proved refusal, and name it in place of "holds no statement"."""
        for reply in replies:
            site = self._exchange.site_of(reply)
            if site is None or site not in strategy.rejected:
                continue
            answer = read_answer(site, reply)
            if "refusal" in answer.header:
                try:
                    refusal = verify_refusal(site, prepared.enrolments[site], answer.header["refusal"])
                except StatementError as error:
                    strategy.rejected[site] = error
                    continue
                strategy.rejected[site] = StatementError(site, "refusal", refusal.reason)
                event_id = stable_event_id("site.refused", self._run.run, site, str(number))
                self._coordinator.append(refusal, f"site:{site}", event_id)
        for site, rejection in strategy.rejected.items():
            _logger.warning("round %d: %s", number, rejection)
            self._emit("refused", number=number, sites=(site,), detail=str(rejection))

    def _abandon(
        self, number: int, accepted: Any, missing: tuple[str, ...], rejected: Any, state: _Progress
    ) -> None:
        for site, update in accepted.items():
            body = SiteUndelivered(statement=update.statement)
            event_id = stable_event_id("site.undelivered", event_hash(update.statement))
            state.own_leaf[site] = self._coordinator.append(body, f"site:{site}", event_id).leaf_index
        self._coordinator.append(
            RoundAbandoned(run=self._run.run, round=number, reason="not_enough_sites", missing=missing), ACTOR
        )
        self._emit("abandoned", number=number, sites=tuple(accepted), missing=missing)
        silent = [f"site {site}: no answer in time" for site in missing if site not in rejected]
        detail = "; ".join([*(str(error) for error in rejected.values()), *silent])
        raise self._fail(number, "not_enough_sites", detail, state)

    def _fail(self, number: int, reason: str, detail: str, state: _Progress | None = None) -> RunFailedError:
        body = RunFailed(run=self._run.run, charter=self._charter.digest, round=number, reason=reason)
        self._coordinator.append(body, ACTOR, stable_event_id("run.failed", self._run.run))
        self._finish(_Progress(participants=self._exchange.sites, base_model=b"") if state is None else state)
        self._emit("failed", number=number, detail=f"{reason}: {detail}")
        return RunFailedError(self._run.run, number, reason, detail)

    def _evaluate(self, evaluation: Evaluation, prepared: Prepared, state: _Progress) -> None:
        """Have the averaged weights counted at the sites; `state.base_model` holds them."""
        number = self._charter.plan.rounds + 1
        terms = dataclasses.replace(
            self._terms(number, prepared, state),
            event=evaluation.event,
            released=evaluation.event.dimension,
        )
        evaluated = evaluate_privately(
            self._coordinator,
            self._exchange,
            terms,
            evaluation,
            {site: self._request(number, site, state) for site in state.participants},
            state.base_model,
            timeout_s=float(self._charter.plan.round_timeout_s),
            minimum_sites=self._charter.minimum_sites,
        )
        state.own_leaf |= evaluated.own_leaf
        self._counted = tuple(sorted(evaluated.own_leaf))
        for site, update in evaluated.accepted.items():
            prepared.heads[site] = prepared.heads[site].after(update.statement)
        worth = evaluated.worth
        self._emit(
            "evaluated",
            number=number,
            sites=tuple(sorted(evaluated.own_leaf)),
            metrics={} if worth is None else {"accuracy": float(worth.accuracy)},
            detail="; ".join(str(error) for error in evaluated.rejected.values()),
        )

    def _sketch(self, reference: Reference, prepared: Prepared, state: _Progress, *, number: int) -> None:
        """Have the training rows counted by bin; who did not answer the release before is not asked."""
        asked = state.participants if self._counted is None else self._counted
        if number > self._charter.plan.rounds + 1:
            self._witnessing.cosign(asked)  # the evaluation's statements must be witnessed first
        terms = dataclasses.replace(
            self._terms(number, prepared, state),
            participants=asked,
            event=reference.event,
            released=reference.event.dimension,
        )
        requests = {site: self._request(number, site, state, participants=asked) for site in asked}
        counted = sketch_rows(
            self._coordinator,
            self._exchange,
            terms,
            reference,
            requests,
            timeout_s=float(self._charter.plan.round_timeout_s),
            minimum_sites=self._charter.minimum_sites,
        )
        state.own_leaf |= counted.own_leaf
        self._emit(
            "sketched",
            number=number,
            sites=tuple(sorted(counted.own_leaf)),
            detail="; ".join(str(error) for error in counted.rejected.values()),
        )

    def _complete(self, prepared: Prepared, state: _Progress) -> RunOutcome:
        state.base_model = model_file(self._charter.layers, average(state.outputs))
        weights = self._coordinator.blobs.put(state.base_model)
        evaluation = Evaluation.of_charter(self._charter.document)
        if evaluation is not None:
            self._evaluate(evaluation, prepared, state)
        reference = Reference.of_charter(self._charter.document)
        if reference is not None:
            self._sketch(reference, prepared, state, number=len(planned_events(self._charter)))
        self._coordinator.append(
            RunCompleted(
                run=self._run.run,
                charter=self._charter.digest,
                rounds=self._charter.plan.rounds,
                last_round=state.previous_round,
                weights=weights,
            ),
            ACTOR,
            stable_event_id("run.completed", self._run.run),
        )
        witnesses = self._finish(state)
        outcome = RunOutcome(
            run=self._run.run,
            charter=self._charter.digest,
            rounds=self._charter.plan.rounds,
            weights=weights,
            sites=state.participants,
            epsilon=self._epsilon(self._charter.plan.rounds),
            elapsed_s=time.monotonic() - self._started,
        )
        self._emit(
            "completed",
            number=outcome.rounds,
            sites=outcome.sites,
            epsilon=outcome.epsilon,
            witnesses=witnesses,
        )
        return outcome

    def _finish(self, state: _Progress) -> int:
        """Have the end witnessed, and tell every site that the run is over; what it did not release is free
        again.
        """
        witnesses = self._witnessing.cosign(state.participants)
        finished = {}
        for site in state.participants:
            header: dict[str, Any] = {"run": self._run.run}
            leaf = state.own_leaf.get(site)
            if leaf is not None and self._witnessing.covers(leaf):
                header["own_statement"] = self._witnessing.logged(leaf)
            finished[site] = Request(kind="run.finished", header=header)
        self._exchange.ask(finished, timeout_s=FINISH_TIMEOUT_S)
        return witnesses

    def _epsilon(self, rounds: int) -> float:
        events = planned_events(self._charter)
        done = events if rounds == self._charter.plan.rounds else events[:rounds]
        return recompute(done, float(self._charter.privacy.delta)).value

    def _emit(self, kind: str, *, number: int = 0, **fields: Any) -> None:
        emit(
            RunEvent(
                kind=kind,
                run=self._run.run,
                round=number,
                rounds=self._charter.plan.rounds,
                elapsed_s=time.monotonic() - self._started,
                **fields,
            )
        )
