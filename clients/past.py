"""What a round builds on: whether the past that a request shows is the one that this site took part in."""

from __future__ import annotations

from collections.abc import Callable

from audit.entries import ZERO_DIGEST, RoundAbandoned, RoundCompleted, SiteStatement
from clients.errors import RefusedError
from clients.history import History
from clients.ledger import Odometers, Release
from clients.requests import RoundRequest
from clients.terms import Terms
from clients.trainer import Trainer


class Past:
    """One agent's check of what comes before a round; it refuses whatever the witnessed log does not show."""

    def __init__(
        self,
        history: History,
        ledger: Odometers,
        trainer: Trainer,
        observe: Callable[[SiteStatement], None],
    ) -> None:
        """`observe` compares a statement that the log shows with the ledger."""
        self._history, self._ledger, self._trainer, self._observe = history, ledger, trainer, observe

    def check(self, request: RoundRequest, terms: Terms) -> str:
        """Return the leaf hash of the previous round's end, once the base model is proved to follow from it.

        Raises:
            RefusedError: base_model_mismatch, unwitnessed_history or round_out_of_order.
            LedgerBehindError: the log shows a release of this site that its ledger lacks.
        """
        base = request.base_digest
        if request.round == 1:
            if base != terms.initial_digest:
                raise RefusedError("base_model_mismatch", "round 1 does not start from the charter's weights")
            return ZERO_DIGEST
        numbers = range(request.round - 1, request.round)
        if request.round > terms.most_rounds:  # builds on the last round, whichever number that had
            numbers = range(terms.rounds, terms.most_rounds + 1)
        before, leaf_hash = self._history.round_ended(
            request.previous_round, run=request.run, numbers=numbers
        )
        own = self._last_release(request)
        self._check_own(request, own, before)
        if isinstance(before, RoundAbandoned):
            self._check_abandoned(request, own, before, terms)
        # the averaged weights are no round's output; any model's counts have the same cost
        elif request.round <= terms.most_rounds and base != before.output_model:
            raise RefusedError(
                "base_model_mismatch", f"the base model is not the output of round {before.round}"
            )
        return leaf_hash

    def _last_release(self, request: RoundRequest) -> Release | None:
        """Return the site's release of the run before the one that is asked for."""
        earlier = (self._ledger.release_of(request.run, number) for number in range(request.round - 1, 0, -1))
        return next((release for release in earlier if release is not None), None)

    def _check_abandoned(
        self, request: RoundRequest, own: Release | None, before: RoundAbandoned, terms: Terms
    ) -> None:
        """The next round is built on what the abandoned one was built on, as far as this site saw that."""
        if request.round > terms.most_rounds:
            raise RefusedError("round_out_of_order", "what is counted after the rounds builds on a model")
        known = {before.base_model}
        if own is not None and own.statement.round == before.round:
            known.add(own.statement.base_model)
        if before.previous_round == ZERO_DIGEST:
            known.add(terms.initial_digest)
        if known != {request.base_digest}:
            raise RefusedError(
                "base_model_mismatch", f"the base model is not what round {before.round} was built on"
            )
        self._trainer.forget_round(request.run, before.round)

    def _check_own(
        self, request: RoundRequest, own: Release | None, before: RoundCompleted | RoundAbandoned
    ) -> None:
        if request.own_statement is None:
            if own is not None:
                raise RefusedError(
                    "unwitnessed_history", "this site's last statement is not shown in the log"
                )
            return
        statement, leaf_hash, in_round = self._history.own_statement(
            request.own_statement, None if own is None else own.statement
        )
        self._observe(statement)
        if own is None or own.statement != statement:
            raise RefusedError("unwitnessed_history", "the statement shown is not this site's for that round")
        counted = before.leaves if isinstance(before, RoundCompleted) else ()
        of_this = isinstance(before, RoundCompleted) and statement.round == before.round
        if of_this and in_round and leaf_hash not in counted:
            raise RefusedError("unwitnessed_history", "the round's entry leaves this site's statement out")
        self._ledger.mark_delivered(request.run, statement.round)
