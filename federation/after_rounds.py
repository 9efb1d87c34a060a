"""What a run's sites release once each after its last round: counts of held-out rows, then of training rows.

Each is one release more on every odometer, under a statement of its own that builds on the last round's
entry. Who did not answer one is not asked for the next: it could not show its release in witnessed history.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from audit.private_evaluation import Evaluation
from audit.reference import Reference
from federation.charter import Charter
from federation.coordinator import Coordinator
from federation.exchange import Exchange, Request
from federation.preparation import Prepared
from federation.private_evaluation import Counted, evaluate_privately
from federation.resume import RunPast, recall
from federation.run_state import RunState
from federation.sketching import sketch_rows
from federation.statements import AcceptedUpdate, RoundTerms
from federation.witnessing import Witnessing


@dataclass(frozen=True, slots=True, kw_only=True)
class AfterRounds:
    """The releases after the last round of one run."""

    coordinator: Coordinator
    exchange: Exchange
    witnessing: Witnessing
    charter: Charter
    run: str
    terms: Callable[[int, Prepared, RunState], RoundTerms]
    requests: Callable[[int, RunState], Mapping[str, Request]]
    emit: Callable[..., None]

    def carry_out(self, past: RunPast, prepared: Prepared, state: RunState) -> None:
        """Ask for all that the charter wants and the log does not show; `state.base_model` is the average."""
        document = self.charter.document
        evaluation, reference = Evaluation.of_charter(document), Reference.of_charter(document)
        number = self.charter.most_rounds + 1
        if evaluation is not None:
            if past.evaluated is None:
                counted = self._evaluate(evaluation, number, prepared, state)
            else:
                counted = self._counted_before(past, number)
                state.own_leaf |= counted.own_leaf
            if reference is not None:
                state = self._next(past, number + 1, counted, prepared, state)
                number += 1
        if reference is not None and past.referenced is None:
            self._sketch(reference, number, prepared, state)
        elif reference is not None:
            found = {site: leaf for (of, site), leaf in past.statements.items() if of == number}
            state.own_leaf |= {site: release.leaf_index for site, release in found.items()}

    def _evaluate(self, evaluation: Evaluation, number: int, prepared: Prepared, state: RunState) -> Counted:
        """Have the averaged weights counted at the sites."""
        terms = dataclasses.replace(
            self.terms(number, prepared, state),
            event=evaluation.event,
            released=evaluation.event.dimension,
        )
        evaluated = evaluate_privately(
            self.coordinator,
            self.exchange,
            terms,
            evaluation,
            self.requests(number, state),
            state.base_model,
            timeout_s=float(self.charter.plan.round_timeout_s),
            minimum_sites=self.charter.minimum_sites,
            logged=self._recalled(state),
        )
        state.own_leaf |= evaluated.counted.own_leaf
        worth = evaluated.worth
        self.emit(
            "evaluated",
            number=number,
            sites=tuple(sorted(evaluated.counted.own_leaf)),
            metrics={} if worth is None else {"accuracy": float(worth.accuracy)},
            detail="; ".join(str(error) for error in evaluated.counted.rejected.values()),
        )
        return evaluated.counted

    def _sketch(self, reference: Reference, number: int, prepared: Prepared, state: RunState) -> None:
        """Have the training rows counted by bin."""
        terms = dataclasses.replace(
            self.terms(number, prepared, state), event=reference.event, released=reference.event.dimension
        )
        counted = sketch_rows(
            self.coordinator,
            self.exchange,
            terms,
            reference,
            self.requests(number, state),
            timeout_s=float(self.charter.plan.round_timeout_s),
            minimum_sites=self.charter.minimum_sites,
            logged=self._recalled(state),
        )
        state.own_leaf |= counted.own_leaf
        self.emit(
            "sketched",
            number=number,
            sites=tuple(sorted(counted.own_leaf)),
            detail="; ".join(str(error) for error in counted.rejected.values()),
        )

    def _counted_before(self, past: RunPast, number: int) -> Counted:
        """The evaluation's releases, of a run that is resumed after it."""
        named = () if past.evaluated is None else past.evaluated.statements
        releases = {
            site: release
            for (of, site), release in sorted(past.statements.items())
            if of == number and release.leaf_hash in named
        }
        return Counted(
            accepted={
                site: recall(self.coordinator.blobs, self.run, release) for site, release in releases.items()
            },
            leaves=tuple(release.leaf_hash for release in releases.values()),
            own_leaf={site: release.leaf_index for site, release in releases.items()},
            rejected={},
        )

    def _next(
        self, past: RunPast, number: int, counted: Counted, prepared: Prepared, state: RunState
    ) -> RunState:
        """Return the state in which release `number` is asked for, once those before it are witnessed."""
        state.own_leaf |= counted.own_leaf
        for site, update in counted.accepted.items():
            prepared.heads[site] = prepared.heads[site].after(update.statement)
        self.witnessing.cosign(tuple(counted.accepted))
        written_off = {site for of, site in past.written_off if of == number}
        return dataclasses.replace(
            state,
            participants=tuple(counted.accepted),
            logged={site: found for (of, site), found in past.statements.items() if of == number},
            silent=state.silent | written_off,
        )

    def _recalled(self, state: RunState) -> dict[str, AcceptedUpdate]:
        return {
            site: recall(self.coordinator.blobs, self.run, release) for site, release in state.logged.items()
        }
