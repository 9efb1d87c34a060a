"""What witnesses do for a running server: they are offered each checkpoint, and callers may wait for them.

`Watching` runs in every server; only the one that holds the log's lease offers. All witnesses are offered the
same checkpoint, so that they make a quorum on it. Callers that wait share one look at the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from anyio import to_thread

from audit.checkpoints import add_signatures, parse_checkpoint_note
from audit.errors import AuditError
from audit.tlog_policy import NO_QUORUM, Policy
from federation.coordinator import Coordinator
from federation.trust import log_policy
from server.journal import Clock

_logger = logging.getLogger(__name__)

Level = Literal["sequenced", "checkpointed", "witnessed"]

MAX_WAIT_S: Final = 10.0
_OFFER_S: Final = 0.25
_AGAIN_S: Final = 300.0  # an idle log's checkpoint is cosigned afresh, so that it does not grow stale
_MISSING_S: Final = 10.0  # who did not answer is asked again
_LOOK_S: Final = 0.05
_POLICY_S: Final = 30.0
_JUDGED: Final = 1024


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    leaf_index: int
    level: Level
    future: asyncio.Future[bytes]


class Watching:
    """Offers checkpoints to witnesses, and tells callers when theirs is signed or cosigned."""

    def __init__(self, coordinator: Coordinator, clock: Clock) -> None:
        self._coordinator, self._clock = coordinator, clock
        self._offering: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._waiting: set[_Waiter] = set()
        self._offered, self._again_at = -1, 0.0
        self._policy: tuple[float, Policy] | None = None
        self._judged: dict[bytes, bool] = {}

    def start(self) -> None:
        if self._coordinator.watchers is not None and self._coordinator.watchers.reachable:
            self._offering = asyncio.create_task(self._offer_all(), name="offer checkpoints")

    async def stop(self) -> None:
        for task in (self._offering, self._looking):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def policy(self) -> Policy:
        """Return the policy that decides what witnessed means here: the home's own, else the log's members.

        Raises:
            AuditError: the log's entries give none.
        """
        if self._coordinator.watchers is not None:
            return self._coordinator.watchers.policy
        now = time.monotonic()
        if self._policy is None or now - self._policy[0] > _POLICY_S:
            self._policy = (now, await to_thread.run_sync(log_policy, self._coordinator.ledger))
            self._judged.clear()
        return self._policy[1]

    async def wait(self, leaf_index: int, level: Level, timeout_s: float) -> bytes | None:
        """Return a checkpoint that holds the leaf at that level; None when none came in time."""
        if level == "sequenced":
            return None
        waiter = _Waiter(leaf_index, level, asyncio.get_running_loop().create_future())
        self._waiting.add(waiter)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="look for checkpoints")
        try:
            return await asyncio.wait_for(waiter.future, timeout_s)
        except TimeoutError:
            return None
        finally:
            self._waiting.discard(waiter)

    async def _look(self) -> None:
        while self._waiting:
            try:
                policy = await self.policy()
                for level in ("checkpointed", "witnessed"):
                    waiting = [waiter for waiter in self._waiting if waiter.level == level]
                    if waiting:
                        first = min(waiter.leaf_index for waiter in waiting)
                        note = await to_thread.run_sync(self._find, first, level, policy)
                        _tell(waiting, note)
            except (AuditError, OSError) as error:
                _logger.error("no checkpoint can be looked for: %s", error)
            await asyncio.sleep(_LOOK_S)

    def _find(self, leaf_index: int, level: Level, policy: Policy) -> bytes | None:
        """The largest checkpoint above a leaf that reaches the level."""
        ledger = self._coordinator.ledger
        try:
            if level == "checkpointed":
                return ledger.wait_checkpointed(leaf_index, timeout_s=0)
            return ledger.wait_witnessed(leaf_index, partial(self._is_witnessed, policy), timeout_s=0)
        except TimeoutError:
            return None

    def _is_witnessed(self, policy: Policy, note: bytes) -> bool:
        """Whether the policy's quorum cosigned; judged once for the same bytes."""
        if note not in self._judged:
            if len(self._judged) >= _JUDGED:
                self._judged.clear()
            try:
                opened = policy.open(note, now=int(self._clock().timestamp()))
                found = opened.quorum.satisfied and policy.quorum != NO_QUORUM
            except AuditError:
                found = False
            self._judged[note] = found
        return self._judged[note]

    async def _offer_all(self) -> None:
        while True:
            try:
                await to_thread.run_sync(self._offer)
            except (AuditError, OSError) as error:
                _logger.error("witnesses are not offered a checkpoint: %s", error)
            await asyncio.sleep(_OFFER_S)

    def _offer(self) -> None:
        ledger, watchers = self._coordinator.ledger, self._coordinator.watchers
        note = ledger.latest_checkpoint() if self._coordinator.publisher.leads else None
        if note is None or watchers is None:
            return
        size = parse_checkpoint_note(note).tree_size
        if size == self._offered and time.monotonic() < self._again_at:
            return
        lines = watchers.offer(note, ledger.consistency_proof)
        if lines:
            ledger.store_checkpoint(add_signatures(note, lines))
        pause = _AGAIN_S if len(lines) == len(watchers.reachable) else _MISSING_S
        self._offered, self._again_at = size, time.monotonic() + pause


def _tell(waiting: list[_Waiter], note: bytes | None) -> None:
    if note is None:
        return
    size = parse_checkpoint_note(note).tree_size
    for waiter in waiting:
        if waiter.leaf_index < size and not waiter.future.done():
            waiter.future.set_result(note)
