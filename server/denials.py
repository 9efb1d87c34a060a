"""Refused reads and changes, made entries: as many as tell what is tried, and not as many as somebody likes.

A refusal's entry says who asked for which action and which policies refused; a thousand of them say no more
than the first few, and would let anybody with a key fill the log for good. So the first `MOST` of a
principal, an action and a minute are entries; later ones of that minute are counted in
`affidavit_denials_total` alone, as all are, and their answers name no entry. The count is a worker's own.
Refused predictions are counted by quotas (`server.service`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from audit.entries import AccessDenied
from audit.principal import AccessDeniedError
from server.errors import LedgerUnavailableError
from server.journal import Clock, Journal
from server.monitoring import Monitoring

MOST: Final = 5
WINDOW_S: Final = 60
_KEPT: Final = 4_096  # principals and actions that are remembered


class Denials:
    """One worker's."""

    def __init__(self, journal: Journal, monitoring: Monitoring, clock: Clock) -> None:
        self._journal, self._monitoring, self._clock = journal, monitoring, clock
        self._written: OrderedDict[tuple[str, str], tuple[int, int]] = OrderedDict()  # window, entries in it

    async def record(self, denied: AccessDeniedError, request_id: str) -> None:
        """Count a refusal, and make it an entry that `denied.entry` names, unless enough of them are.

        Raises:
            LedgerUnavailableError: it should be an entry, and is none.
        """
        action, principal = denied.question.action, denied.principal
        for policy in denied.decision.policies:
            self._monitoring.denials.labels(action, policy).inc()
        key, window = (principal.id, action), int(self._clock().timestamp()) // WINDOW_S
        if not self._is_one_of_the_first(key, window):
            return
        entry = AccessDenied(
            request_id=request_id,
            action=action,
            principal=principal.id,
            role=principal.role,
            policies=denied.decision.policies,
            policy_set=denied.decision.policy_set,
        )
        try:
            sequenced = await self._journal.append(entry)
        except LedgerUnavailableError:
            self._give_back(key, window)
            raise
        denied.entry = {"leaf_index": sequenced.leaf_index, "leaf_hash": sequenced.leaf_hash.hex()}

    def _is_one_of_the_first(self, key: tuple[str, str], window: int) -> bool:
        before, count = self._written.get(key, (window, 0))
        if before != window:
            count = 0
        if count >= MOST:
            return False
        self._written[key] = window, count + 1
        self._written.move_to_end(key)
        while len(self._written) > _KEPT:
            self._written.popitem(last=False)
        return True

    def _give_back(self, key: tuple[str, str], window: int) -> None:
        before, count = self._written.get(key, (window, 0))
        if before == window and count > 0:
            self._written[key] = window, count - 1
