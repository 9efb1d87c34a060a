"""Follows the log's rules beside the requests: a change or a revocation counts within seconds everywhere."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from anyio import to_thread

from audit.errors import AuditError
from audit.ledger import Ledger
from audit.serving_bodies import PolicyChanged
from federation.coordinator import stable_event_id
from server.access import CedarAuthorizer
from server.errors import LedgerUnavailableError
from server.journal import Journal
from server.rules import Change, RulesInForce

_logger = logging.getLogger(__name__)


class RulesFollower:
    """One task of one worker."""

    def __init__(
        self,
        rules: RulesInForce,
        ledger: Ledger,
        journal: Journal,
        authorizer: CedarAuthorizer,
        *,
        interval_s: float,
    ) -> None:
        self._rules, self._ledger, self._journal, self._authorizer = rules, ledger, journal, authorizer
        self._interval_s = interval_s
        self._said: Change | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Know the rules before the first request, then follow.

        Raises:
            AuditError: the log cannot be read.
        """
        await self.step()
        self._task = asyncio.create_task(self._run(), name="rules")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def step(self) -> None:
        """Read what is new; where it changes the rules, say in the log that they decide, once a change."""
        await to_thread.run_sync(self._rules.refresh)
        change = self._rules.change
        if change is self._said or change is None:
            return
        await self._record(change.body, change.leaf_hash)
        self._said = change

    async def _record(self, body: PolicyChanged, leaf_hash: str) -> None:
        applied = self._authorizer.applied()
        event_id = stable_event_id("policy.applied", leaf_hash, applied.policy_set, applied.engine)
        if await to_thread.run_sync(self._ledger.find_event, event_id) is None:
            try:
                await self._journal.append(applied, event_id=event_id)
            except LedgerUnavailableError:
                # another worker wrote it in this moment; if not, the next step tries again
                if await to_thread.run_sync(self._ledger.find_event, event_id) is None:
                    raise
        _logger.warning("rules %s of entry %s decide from now on", body.policy_set[:16], leaf_hash[:16])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.step()
            except (AuditError, LedgerUnavailableError, OSError) as error:
                _logger.error("the rules of the log cannot be read: %s", error)
