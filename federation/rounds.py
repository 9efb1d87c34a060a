"""The round loop: ask, prove, aggregate, log, have it witnessed, and only then the next round.

A round ends when every participant answered or its time-out passed, whichever is first; a lost message
costs one repetition, never the round. A site that gave no statement is out for the rest of the run, for it
could not show its own release in witnessed history.

A round that ends with too few sites, or whose masked sum cannot be opened, is abandoned: an entry, releases
that stay debited, and a round with a new number in its place, as long as the charter's `spare_rounds` last.

A run whose coordinator died goes on by the same call: what the log holds of it (`federation.resume`) is not
done again, and the round that was broken off is asked once more. One process at a time carries a run out
(`federation.run_hold`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from audit.entries import (
    RoundCompleted,
    RunCompleted,
    RunFailed,
    RunStarted,
    body_document,
)
from audit.epsilon import recompute
from audit.packing import pack_digests
from federation.abandoning import abandon, regather
from federation.after_rounds import AfterRounds
from federation.anomaly import record_view
from federation.charter import Charter
from federation.coordinator import Coordinator, stable_event_id
from federation.errors import FederationError, ResumeError, ResumeLaterError, RunFailedError
from federation.evaluation import PublicData, metrics_of
from federation.exchange import Around, Exchange, Made, Request
from federation.flat import Vector, average_vectors, initial_vector, model_bytes
from federation.masked_run import MaskedRun
from federation.mechanism import planned_event, planned_events
from federation.patience import PATIENCE_S
from federation.pieces import blob_records
from federation.preparation import (
    ACTOR,
    Prepared,
    connect_sites,
    failures_text,
    gather_signatures,
    propose_run,
    record_charter,
)
from federation.progress import RunEvent, emit
from federation.refusals import (
    noting,
    record_masked,
    record_opened,
    record_refusals,
    record_too_long,
)
from federation.resume import RESTORE, RunPast, opened_total, recall, resumed_body, take_up
from federation.run_hold import TTL_S, RunHold
from federation.run_state import Lost, RunOutcome, RunState
from federation.statements import AcceptedUpdate, RoundTerms, record_statements
from federation.strategies import strategy_of
from federation.witnessing import Witnessing

FINISH_TIMEOUT_S = 10.0
ROUND_TROUBLE_S = 90.0  # a node that was killed is refused for up to a minute


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
        hold_s: float = TTL_S,
    ) -> None:
        """`patience_s`: how long to wait for sites whose people have to decide; `hold_s`: how long a hold
        on the run outlives a process that is killed.
        """
        self._coordinator, self._charter, self._run = coordinator, charter, run_started
        self._grid, self._patience_s, self._stop = grid, patience_s, stop
        self._exchange = exchange or Exchange(grid)
        self._witnessing = Witnessing(coordinator, self._exchange)
        self._masked = MaskedRun(self._exchange, self._witnessing, charter)
        self._hold = RunHold(coordinator.ledger, run_started.run, ttl_s=hold_s)
        self._event, self._planned = planned_event(charter), planned_events(charter)
        self._started = time.monotonic()
        data = None if charter.public_set is None else coordinator.blobs.find(charter.public_set.digest)
        self._public = None if data is None else PublicData.read(charter, data)

    def carry_out(self, author: str, *, principal: str = ACTOR) -> RunOutcome:
        """Do everything that the log does not show as done.

        Args:
            author: the public key under which the charter is published.
            principal: whoever takes the run up again, where it was begun before.

        Raises:
            RunFailedError: the run stopped; the log says why.
            RunHeldError: another process carries it out.
            ResumeError: it was begun, and cannot go on; `ResumeLaterError`: not with the sites that are here.
        """
        with self._hold, self._coordinator.alone():
            past = RunPast.read(self._coordinator.ledger, self._run.run)
            if past.started is not None:
                self._check_same(past)
            if past.ended is not None:
                return self._end_again(past, past.ended)
            return self._go_on(past, self._prepare(author, past), principal)

    def _go_on(self, past: RunPast, prepared: Prepared, principal: str) -> RunOutcome:
        charter = self._charter
        weights = initial_vector(charter.layers, charter.digest)
        strategy = strategy_of(charter, weights)
        strategy.blobs = self._coordinator.blobs
        base = model_bytes(charter.layers, weights)
        self._coordinator.blobs.put(base)
        state = RunState(participants=prepared.sites, base_model=base)
        if past.started is not None:
            connected = self._exchange.sites
            state = take_up(self._coordinator, charter, past, strategy, prepared, connected)
            self._hold.check()
            self._coordinator.append(resumed_body(charter, past, principal), ACTOR)
            self._emit("resumed", number=past.next_round, sites=prepared.sites, detail=principal)
        number = past.next_round
        while state.completed < charter.plan.rounds:
            self._hold.check()
            if self._stop():
                raise self._fail(number, "stopped", "somebody asked it to stop", state)
            if state.lost is not None:
                self._check_spare(number, state.lost, state)
                self._regather(number, state.lost, prepared, state)
            self._round(number, strategy, prepared, state)
            number += 1
        self._hold.check()
        return self._complete(past, prepared, state, number - 1)

    def _check_same(self, past: RunPast) -> None:
        if past.started != self._run:
            problem = "it was started on other terms than those prepared here"
            raise ResumeError(self._run.run, problem, RESTORE)

    def _end_again(self, past: RunPast, ended: RunCompleted | RunFailed) -> RunOutcome:
        """Tell the sites once more how the run ended, in case nobody did.

        Raises:
            RunFailedError: it had failed.
        """
        sites = tuple(sorted(past.accepted))
        connect_sites(self._coordinator, self._exchange, self._charter, sites)
        own_leaf = {
            site: release.leaf_index
            for (_, site), release in sorted((past.statements | past.written_off).items())
        }
        state = RunState(participants=sites, base_model=b"", own_leaf=own_leaf)
        witnesses = self._finish(state)
        if isinstance(ended, RunFailed):
            raise RunFailedError(self._run.run, ended.round, ended.reason, "it had ended before")
        state.participants = tuple(past.rounds[-1].releases)
        return self._outcome(ended.weights, past.next_round - 1, state, witnesses)

    def _prepare(self, author: str, past: RunPast) -> Prepared:
        coordinator, charter = self._coordinator, self._charter
        participants = past.participants(charter.minimum_sites)
        try:
            prepared = connect_sites(coordinator, self._exchange, charter, participants)
            self._emit("enrolled", sites=tuple(sorted(prepared.enrolments)))
            published_by = record_charter(coordinator, charter, author)
            patience: dict[str, Any] = {"patience_s": self._patience_s, "waiting": self._tell_waiting}
            gather_signatures(coordinator, self._exchange, charter, published_by, prepared, **patience)
            self._emit("charter_signed", sites=charter.site_names)
            self._witnessing.cosign(prepared.enrolments)
            propose_run(
                coordinator,
                self._exchange,
                charter,
                self._run,
                prepared,
                self._witnessing,
                accepted=past.accepted if past.started is not None else None,
                **patience,
            )
        except FederationError as error:
            if past.started is not None:
                raise self._later(str(error)) from error
            coordinator.append(self._run, ACTOR, stable_event_id("run.started", self._run.run))
            raise self._fail(0, "site_refused", str(error)) from error
        for site, failure in prepared.failed.items():
            self._emit("refused", sites=(site,), detail=str(failure))
        if len(prepared.sites) < charter.minimum_sites:
            if past.started is not None:
                raise self._later(failures_text(prepared.failed))
            raise self._fail(0, "site_refused", failures_text(prepared.failed))
        self._emit("accepted", sites=prepared.sites)
        self._witnessing.cosign(prepared.sites)
        return prepared

    def _later(self, problem: str) -> ResumeLaterError:
        """A run that is resumed does not end because a site is not back yet."""
        fix = f"at least {self._charter.minimum_sites} sites must be there; resume it again then"
        return ResumeLaterError(self._run.run, problem, fix)

    def _tell_waiting(self, sites: tuple[str, ...]) -> None:
        self._emit("waiting", sites=sites, detail="for the sites' people to decide")

    def _round(self, number: int, strategy: Any, prepared: Prepared, state: RunState) -> None:
        terms = self._terms(number, prepared, state)
        masked = self._masked.opened_for(terms, state)
        total = opened_total(self._coordinator.blobs, state.opened)
        if number > 1:
            shown = [state.own_leaf[site] for site in state.participants if site in state.own_leaf]
            self._witnessing.prepare(shown)
        asked = self._asked(state, again=masked is not None)
        records = blob_records({"base_model": state.base_model})
        requests: Mapping[str, Request]
        if masked is not None:
            there = [site for site in state.participants if site not in state.silent]
            begun = masked.begin({site: self._request(number, site, state) for site in there})
            requests = {site: replace(begun[site], records=records) for site in asked if site in begun}
            terms = masked.terms
        else:
            told = self._request(number, "", state).header
            around = Around.of(told, "own_statement")
            requests = Made(
                asked,
                lambda site: replace(self._request(number, site, state), records=records, around=around),
            )
            if state.opened is not None:
                terms = dataclasses.replace(terms, roster=state.opened.roster)
        opening = (lambda _: total) if total is not None else None
        strategy.open_round(
            terms,
            self._exchange.messages(requests, str(number)),
            opening if masked is None else masked.open,
            nodes=self._exchange.nodes_of(requests),
        )
        for site, known in (self._recalled(state) if masked is None else {}).items():
            strategy.offer(site, body_document(known.statement), known.update)
        arrays: ArrayRecord = strategy.arrays()
        addressed: Iterable[Message] = strategy.configure_train(number, arrays, ConfigRecord(), self._grid)
        self._emit("asked", number=number, sites=state.participants)
        stream = self._exchange.stream(
            addressed,
            requests,
            timeout_s=float(self._charter.plan.round_timeout_s),
            group_id=str(number),
            trouble_s=ROUND_TROUBLE_S,
            on_reply=lambda site: self._emit("answered", number=number, sites=(site,)),
        )
        unanswered: list[Message] = []
        output, _ = strategy.aggregate_train(number, noting(stream, unanswered))
        if masked is not None:
            record_masked(self._coordinator, masked, strategy.rejected)
        self._check_logged(strategy, state)
        self._hold.check()
        record_refusals(
            self._coordinator,
            terms,
            unanswered,
            self._exchange.site_of,
            strategy.rejected,
            prepared.enrolments,
        )
        for site, rejection in strategy.rejected.items():
            self._emit("refused", number=number, sites=(site,), detail=str(rejection))
        accepted = {site: strategy.accepted[site] for site in sorted(strategy.accepted)}
        missing = tuple(sorted(set(state.participants) - set(accepted)))
        state.own_leaf |= record_too_long(self._coordinator, strategy.too_long, strategy.update_terms)
        if output is None:
            lost = abandon(self._coordinator, terms, accepted, missing, strategy, prepared, state)
            state.lost = lost
            self._emit("abandoned", number=number, sites=tuple(accepted), missing=missing, detail=lost.reason)
            return
        leaves: list[str] = []
        for site, sequenced in record_statements(self._coordinator, accepted).items():
            leaves.append(sequenced.leaf_hash.hex())
            state.own_leaf[site] = sequenced.leaf_index
            prepared.heads[site] = prepared.heads[site].after(accepted[site].statement)
        weights: Vector = strategy.weights
        state.base_model = model_bytes(self._charter.layers, weights)
        metrics = () if self._public is None else metrics_of(self._charter, self._public, weights)
        if masked is not None:
            record_opened(self._coordinator, masked)
        plain, packed = pack_digests(tuple(leaves))
        body = RoundCompleted(
            run=self._run.run,
            round=number,
            base_model=terms.base_model,
            statements=plain,
            packed=packed,
            missing=missing,
            output_model=self._coordinator.blobs.put(state.base_model),
            metrics=metrics,
        )
        completed = self._coordinator.append(
            body, ACTOR, stable_event_id("round.completed", self._run.run, str(number))
        )
        if self._charter.aggregation is not None and self._charter.secure is None:
            seen = {site: update.values for site, update in (accepted | strategy.too_long).items()}
            record_view(self._coordinator, self._charter, body, seen)
        state.previous_round, state.round_leaf = completed.leaf_hash.hex(), completed.leaf_index
        state.participants, state.logged, state.silent, state.opened = tuple(accepted), {}, set(), None
        state.completed, state.lost = state.completed + 1, None
        state.outputs = [*state.outputs[-(self._charter.average_last - 1) :], weights]
        if self._charter.average_last == 1:
            state.outputs = [weights]
        witnesses = self._masked.cosign(accepted, masked)
        self._emit(
            "round",
            number=number,
            sites=tuple(accepted),
            missing=missing,
            metrics={metric.name: float(metric.value) for metric in metrics},
            epsilon=self._epsilon(number),
            witnesses=witnesses,
        )

    def _requests(self, number: int, state: RunState) -> dict[str, Request]:
        """Return the question to each participant of `_asked`."""
        return {site: self._request(number, site, state) for site in self._asked(state)}

    def _asked(self, state: RunState, *, again: bool = False) -> list[str]:
        """Return the participants whose release is not in the log already.

        A masked round is asked `again` as a whole: sites give the same keys, shares and bytes, and what the
        log holds of it must come out of it. Once its sum was opened nobody is: nothing more can count.
        """
        if state.opened is not None:
            return []
        known = () if again else state.logged
        return [site for site in state.participants if site not in known and site not in state.silent]

    def _recalled(self, state: RunState) -> dict[str, AcceptedUpdate]:
        return {
            site: recall(self._coordinator.blobs, self._run.run, release)
            for site, release in state.logged.items()
        }

    def _check_logged(self, strategy: Any, state: RunState) -> None:
        """What is logged as a round's statement must count in it, or the log could never be verified."""
        lost = sorted(set(state.logged) - set(strategy.accepted) - set(strategy.too_long))
        if lost:
            problem = f"the log's own statement does not hold: {strategy.rejected[lost[0]]}"
            raise ResumeError(self._run.run, problem, RESTORE)

    def _terms(self, number: int, prepared: Prepared, state: RunState) -> RoundTerms:
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

    def _request(self, number: int, site: str, state: RunState) -> Request:
        shown: dict[str, Any] = {"previous_round": None, "own_statement": None}
        if number > 1 and state.round_leaf is not None:
            shown["previous_round"] = self._witnessing.logged(state.round_leaf)
            own = state.own_leaf.get(site)  # none, where all rounds before were abandoned without it
            shown["own_statement"] = None if own is None else self._witnessing.logged(own)
        header = {
            "run": self._run.run,
            "round": number,
            "charter": self._charter.digest,
            "participants": list(state.participants),
            **shown,
        }
        return Request(kind="round", header=header, blobs={"base_model": state.base_model})

    def _check_spare(self, number: int, lost: Lost, state: RunState) -> None:
        """End the run where the rounds that may still be opened are fewer than those it lacks."""
        if self._charter.most_rounds - number + 1 < self._charter.plan.rounds - state.completed:
            raise self._fail(lost.round, lost.reason, lost.detail, state)

    def _regather(self, number: int, lost: Lost, prepared: Prepared, state: RunState) -> None:
        """Find who is there for a round in place of the one that was lost; too few end the run."""
        timeout_s = float(self._charter.plan.round_timeout_s)
        found = regather(
            self._coordinator, self._exchange, self._run.run, number, prepared, state, timeout_s=timeout_s
        )
        for problem in found.problems:
            self._emit("refused", number=number, sites=(problem.site,), detail=str(problem))
        if len(found.there) < self._charter.minimum_sites:
            detail = f"{lost.detail}; then {len(found.there)} sites were there for another round"
            raise self._fail(lost.round, lost.reason, detail, state)
        self._witnessing.cosign(state.participants)

    def _fail(self, number: int, reason: str, detail: str, state: RunState | None = None) -> RunFailedError:
        body = RunFailed(run=self._run.run, charter=self._charter.digest, round=number, reason=reason)
        self._coordinator.append(body, ACTOR, stable_event_id("run.failed", self._run.run))
        self._finish(RunState(participants=self._exchange.sites, base_model=b"") if state is None else state)
        self._emit("failed", number=number, detail=f"{reason}: {detail}")
        return RunFailedError(self._run.run, number, reason, detail)

    def _complete(self, past: RunPast, prepared: Prepared, state: RunState, opened: int) -> RunOutcome:
        state.base_model = model_bytes(self._charter.layers, average_vectors(state.outputs))
        weights = self._coordinator.blobs.put(state.base_model)
        AfterRounds(
            coordinator=self._coordinator,
            exchange=self._exchange,
            witnessing=self._witnessing,
            charter=self._charter,
            run=self._run.run,
            terms=self._terms,
            requests=self._requests,
            emit=self._emit,
        ).carry_out(past, prepared, state)
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
        return self._outcome(weights, opened, state, self._finish(state))

    def _outcome(self, weights: str, opened: int, state: RunState, witnesses: int) -> RunOutcome:
        outcome = RunOutcome(
            run=self._run.run,
            charter=self._charter.digest,
            rounds=self._charter.plan.rounds,
            weights=weights,
            sites=state.participants,
            epsilon=self._epsilon(opened, is_over=True),
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

    def _finish(self, state: RunState) -> int:
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

    def _epsilon(self, opened: int, *, is_over: bool = False) -> float:
        """What the run cost a site that released in every round that was opened."""
        events, most = self._planned, self._charter.most_rounds
        done = events[:opened] + (events[most:] if is_over else ())
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
