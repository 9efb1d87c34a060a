"""Receipts for callers: entries that became durable together share one signature by the log's key.

A batch of the log wakes its requests in one turn of the event loop; what they ask for in that turn is signed
at its end, without a timer.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from audit.errors import AuditError
from audit.ledger import Sequenced
from audit.receipts import MAX_BATCH, issue_receipts
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

    def _sign(self) -> None:
        gathered, self._waiting = self._waiting, []
        now = self._clock()
        for start in range(0, len(gathered), MAX_BATCH):
            batch = gathered[start : start + MAX_BATCH]
            try:
                receipts = issue_receipts(
                    self._signer.key,
                    self._signer.origin,
                    [(sequenced.leaf_index, sequenced.leaf_hash) for sequenced, _ in batch],
                    time=time_text(now),
                    merge_deadline=time_text(now + timedelta(seconds=self._merge_delay_s)),
                )
            except AuditError as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(LedgerUnavailableError(f"no receipt could be signed: {error}"))
                continue
            for (_, future), receipt in zip(batch, receipts, strict=True):
                if not future.done():
                    future.set_result(dict(receipt.to_json()))
