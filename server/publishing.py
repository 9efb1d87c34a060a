"""Checkpoints on a timer, and the cosignatures that witnesses bring.

A new checkpoint is signed within the interval after the log grew, and one of an idle log is announced again
every ten minutes, by the one process of all that serve the log that holds its lease (`audit.publisher`).
Every process looks whether checkpoints keep up; when they do not for `checkpoint_late_s`, it answers nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from anyio import to_thread

from audit.checkpoints import add_signatures, parse_checkpoint_note
from audit.entries import SiteEnrolled, decode_entry
from audit.errors import AuditError, BadSignatureError, LeaseLostError, SignerBusyError
from audit.notes import NoteVerifier, SignatureLine, open_note, parse_note
from audit.principal import Principal
from federation.coordinator import Coordinator
from federation.trust import log_policy
from server.errors import CheckpointLateError
from server.hooks import NO_FACTS, Facts
from server.journal import Clock
from server.monitoring import Monitoring

if TYPE_CHECKING:
    from server.answers import Asked
    from server.live import ServedVersion

_logger = logging.getLogger(__name__)

_RECENT: Final = 64
_FUTURE_S: Final = 300
_MEETING_S: Final = 5.0


class Backlog:
    """How long entries have been waiting for a checkpoint, as far as this process has looked.

    A provider of facts (`server.hooks`), for what it can stop: an answer's receipt promises a checkpoint by a
    deadline, and who sees that none is made, whoever should make it, promises nothing more.
    """

    is_shared: Final = True

    def __init__(self, limit_s: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._now = limit_s, monotonic
        self._waiting: tuple[int, float] | None = None  # a size that no checkpoint covers, and since when

    def look(self, covered: int, size: int) -> None:
        """Take note of a checkpoint of `covered` entries beside a log of `size`."""
        if self._waiting is not None and covered < self._waiting[0]:
            return
        self._waiting = (size, self._now()) if covered < size else None

    def problem(self) -> str:
        """Return why nothing may be answered, or an empty text."""
        waiting = self._waiting
        if waiting is None or self._now() - waiting[1] <= self._limit_s:
            return ""
        waits_s = self._now() - waiting[1]
        return (
            f"entry {waiting[0] - 1} waits for a checkpoint since {waits_s:.0f} s, more than "
            f"checkpoint_late_s ({self._limit_s:g}): the log's signer does not sign; there is no answer"
        )

    def facts(self, principal: Principal, asked: Asked, served: ServedVersion) -> Facts:
        """Return nothing.

        Raises:
            CheckpointLateError: a receipt's promise might not be kept.
        """
        problem = self.problem()
        if problem:
            raise CheckpointLateError(problem)
        return NO_FACTS


class Publisher:
    """Signs what grew, and keeps what witnesses signed."""

    def __init__(
        self,
        coordinator: Coordinator,
        monitoring: Monitoring,
        clock: Clock,
        *,
        interval_s: float,
        late_s: float = math.inf,
    ) -> None:
        self.backlog = Backlog(late_s)
        self._coordinator, self._monitoring, self._clock = coordinator, monitoring, clock
        self._interval_s = interval_s
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._meeting: tuple[float, int] | None = None  # since when, and of how many entries

    async def start(self) -> None:
        """Take the first turn, then go on by the timer.

        Raises:
            SignerError: this signer may not sign for this log, so no receipt may be given either.
        """
        try:
            async with self._lock:
                await to_thread.run_sync(self._step)
        except (LeaseLostError, SignerBusyError) as error:
            _logger.info("another process publishes: %s", error)
        self._task = asyncio.create_task(self._run(), name="publish checkpoints")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def publish(self) -> bytes:
        """Sign the log as it is now, unless that is signed already; return the note."""
        async with self._lock:
            return await to_thread.run_sync(self._publish)

    async def current(self) -> bytes:
        """Return the newest checkpoint; the first one is made on demand."""
        note = await to_thread.run_sync(self._coordinator.ledger.latest_checkpoint)
        return note if note is not None else await self.publish()

    async def meeting(self) -> bytes:
        """Return a checkpoint that stays the same for a while, so that witnesses sign one and not many.

        It comes with the cosignatures that it has by now, and holds all that was durable when the meeting
        began. What a witness has just cosigned is the meeting of every worker, whichever began it.
        """
        now, held = time.monotonic(), self._meeting
        cosigned = await to_thread.run_sync(self._just_cosigned)
        if cosigned is not None:
            size = parse_checkpoint_note(cosigned).tree_size
            if held is None or size > held[1]:
                held = self._meeting = (now, size)
        if held is not None and now - held[0] < _MEETING_S:
            note = await to_thread.run_sync(self._coordinator.ledger.checkpoint_at, held[1])
            if note is not None:
                return note
        try:
            note = await self.publish()
        except SignerBusyError:  # who signs is late: witnesses get what there is
            note = await self.current()
        self._meeting = (now, parse_checkpoint_note(note).tree_size)
        return note

    def _just_cosigned(self) -> bytes | None:
        """The newest recent checkpoint that waits for more witnesses, and was signed by one in these seconds.

        Their clocks count. One with its quorum needs nobody any more, and one under a key that was exchanged
        since is not what witnesses should come to.
        """
        ledger = self._coordinator.ledger
        since, tried = self._clock().timestamp() - _MEETING_S, 0

        def is_over(note: bytes) -> bool:
            nonlocal tried
            tried += 1
            return tried > _RECENT or _cosigned_at(note) >= since

        note = ledger.latest_checkpoint(is_over)
        if note is None or _cosigned_at(note) < since:
            return None
        try:
            open_note(note, [NoteVerifier.parse(self._coordinator.log_key)])
            found = log_policy(ledger).open(note, now=int(self._clock().timestamp())).quorum
        except AuditError:
            return None
        return None if found.satisfied else note

    async def cover(self, leaf_index: int) -> None:
        """Sign a checkpoint now, unless one holds `leaf_index` already or the log lacks that entry."""
        note = await self.current()
        if parse_checkpoint_note(note).tree_size <= leaf_index < self._coordinator.ledger.tree_size:
            await self.publish()

    async def add_cosignature(self, site: str, line: str) -> tuple[int, int]:
        """Keep a witness's signature line over a recent checkpoint.

        Returns:
            The tree size that it cosigns, and how many signatures that checkpoint has now.

        Raises:
            BadSignatureError: it is by no enrolled witness key of the site, or over no recent checkpoint.
            MalformedNoteError: it is not a signature line.
        """
        async with self._lock:
            return await to_thread.run_sync(self._add, site, line)

    async def _run(self) -> None:
        while True:
            try:
                async with self._lock:
                    await to_thread.run_sync(self._step)
            except LeaseLostError as error:
                _logger.warning("another process publishes now: %s", error)
            except (AuditError, OSError) as error:
                _logger.error("no checkpoint: %s: %s", type(error).__name__, error)
            await asyncio.sleep(self._interval_s)

    def _step(self) -> None:
        try:
            self._coordinator.publisher.step()
        finally:
            self._look()

    def _look(self) -> None:
        ledger = self._coordinator.ledger
        note, size = ledger.latest_checkpoint(), ledger.tree_size
        covered = 0 if note is None else parse_checkpoint_note(note).tree_size
        self.backlog.look(covered, size)
        self._monitoring.tree_size.set(size)
        if note is not None:
            self._monitoring.checkpoint_size.set(covered)

    def _publish(self) -> bytes:
        ledger = self._coordinator.ledger
        size = ledger.tree_size
        self._monitoring.tree_size.set(size)
        note = ledger.latest_checkpoint()
        if note is None or parse_checkpoint_note(note).tree_size < size:
            note = self._coordinator.publish()
        covered = parse_checkpoint_note(note).tree_size
        self.backlog.look(covered, size)
        self._monitoring.checkpoint_size.set(covered)
        return note

    def _add(self, site: str, line: str) -> tuple[int, int]:
        raw = line.encode() if line.endswith("\n") else line.encode() + b"\n"
        SignatureLine.parse(raw)
        ledger = self._coordinator.ledger
        keys = []
        for row in ledger.search(type="site.enrolled", site=site):
            body = decode_entry(row.body).body
            if isinstance(body, SiteEnrolled):
                keys.append(NoteVerifier.parse(body.witness_key))
        tried = 0

        def is_over(note: bytes) -> bool:
            nonlocal tried
            tried += 1
            return tried > _RECENT or self._is_signed(note, raw, keys)

        note = ledger.latest_checkpoint(is_over)
        if note is None or not self._is_signed(note, raw, keys):
            raise BadSignatureError(
                f"the line is no valid cosignature by an enrolled key of {site!r} over a recent checkpoint",
                key=site,
            )
        merged = ledger.store_checkpoint(add_signatures(note, [raw]))
        return parse_checkpoint_note(note).tree_size, len(parse_note(merged).signatures) - 1

    def _is_signed(self, note: bytes, raw: bytes, keys: list[NoteVerifier]) -> bool:
        alone = parse_note(note).text + b"\n" + raw
        try:
            signatures = open_note(alone, keys).signatures if keys else ()
        except AuditError:
            return False
        latest = self._clock()
        return any(
            signature.timestamp is not None and signature.timestamp <= latest.timestamp() + _FUTURE_S
            for signature in signatures
        )


def _cosigned_at(note: bytes) -> float:
    """When the note's last cosignature was made, by its own word; -inf where there is none."""
    said = [line.claimed_timestamp for line in parse_note(note).signatures]
    return max((moment for moment in said if moment is not None), default=-math.inf)
