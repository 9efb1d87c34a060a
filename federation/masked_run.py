"""A run's masked rounds, one after the other: what one of them was given ahead is kept for the next."""

from __future__ import annotations

from collections.abc import Iterable

from federation.charter import Charter
from federation.exchange import Exchange
from federation.run_state import RunState
from federation.secure_round import MaskedRound
from federation.statements import RoundTerms
from federation.witnessing import Alongside, Witnessing


class MaskedRun:
    """Call `opened_for` before each round and `cosign` behind each that gave a model."""

    def __init__(self, exchange: Exchange, witnessing: Witnessing, charter: Charter) -> None:
        self._exchange, self._witnessing, self._charter = exchange, witnessing, charter
        self._ahead: MaskedRound | None = None

    def opened_for(self, terms: RoundTerms, state: RunState) -> MaskedRound | None:
        """Return the masked round to play; None where there are no masks, or its sum was opened before."""
        ahead, self._ahead = self._ahead, None
        secure, plan = self._charter.secure, self._charter.plan
        if secure is None or state.opened is not None:
            return None
        goes_on = state.completed + 1 < plan.rounds
        if ahead is not None and ahead.settle(terms, goes_on=goes_on):
            return ahead
        return MaskedRound(
            self._exchange, secure, terms, timeout_s=float(plan.round_timeout_s), goes_on=goes_on
        )

    def cosign(self, accepted: Iterable[str], masked: MaskedRound | None) -> int:
        """Have the round's end witnessed, and in the same messages the next one's shares sealed."""
        following = None if masked is None else masked.following
        if following is None:
            return self._witnessing.cosign(accepted)
        along = Alongside(dict.fromkeys(following.participants, following.shares_request()))
        witnesses = self._witnessing.cosign(accepted, along)
        following.take_shares(along.answers)
        self._ahead = following
        return witnesses
