"""Receipts for callers: entries that became durable together share one signature by the log's key.

A batch of the log wakes its requests in one turn of the event loop; what they ask for in that turn is signed
at its end, without a timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from audit.errors import AuditError
from audit.ledger import Sequenced
from audit.receipts import MAX_BATCH, issue_documents
from audit.signer import Signer
from server.errors import LedgerUnavailableError
from server.journal import Clock, time_text


class Receipting:
    """Gathers for one turn of the loop, then signs once."""

    def __init__(self, signer: Signer, clock: Clock, *, merge_delay_s: int) -> None:
        self._signer, self._clock, self._merge_delay_s = signer, clock, merge_delay_s
        self._waiting: list[tuple[Sequenced, asyncio.Future[dict[str, Any]]]] = []

    async def receipt(self, sequenced: Sequenced) -> dict[str, Any]:
        """Return the signed receipt of a durable entry, as JSON fields.

        Raises:
            LedgerUnavailableError: the log's key cannot sign.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._waiting.append((sequenced, future))
        if len(self._waiting) == 1:
            loop.call_soon(self._sign)
        return await future

    def receipts(self, sequenced: Sequence[Sequenced]) -> list[dict[str, Any]]:
        """Return the receipts of durable entries that are there already, under as few signatures as can be.

        Raises:
            LedgerUnavailableError: the log's key cannot sign.
        """
        now = self._clock()
        found: list[dict[str, Any]] = []
        time, deadline = time_text(now), time_text(now + timedelta(seconds=self._merge_delay_s))
        try:
            for start in range(0, len(sequenced), MAX_BATCH):
                leaves = [(each.leaf_index, each.leaf_hash) for each in sequenced[start : start + MAX_BATCH]]
                found += issue_documents(
                    self._signer.key, self._signer.origin, leaves, time=time, merge_deadline=deadline
                )
        except AuditError as error:
            raise LedgerUnavailableError(f"no receipt could be signed: {error}") from error
        return found

    def _sign(self) -> None:
        gathered, self._waiting = self._waiting, []
        try:
            receipts = self.receipts([sequenced for sequenced, _ in gathered])
        except LedgerUnavailableError as error:
            for _, future in gathered:
                if not future.done():
                    future.set_exception(LedgerUnavailableError(str(error)))
            return
        for (_, future), receipt in zip(gathered, receipts, strict=True):
            if not future.done():
                future.set_result(receipt)
