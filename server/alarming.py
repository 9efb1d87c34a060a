"""From suspicions to entries: watches who asks what, and raises an alarm in the log.

Each worker keeps its own windows, bounded in number and length, in memory and nowhere else: they hold rows.
What the workers share is the log: an alarm's event id follows from kind, model, principal and hour, so that
those who see the same write one entry, and the same alarm is raised once an hour. An alarm blocks nobody by
itself: an officer looks into it and closes it, and the access policies may ask for open ones.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from audit.decimals import rounded_text
from audit.errors import AuditError
from audit.serving_bodies import AlarmRaised
from server.errors import ServerError
from server.hooks import Answering
from server.journal import Journal
from server.monitoring import Monitoring
from server.probing import LEAST, WINDOW, Look, Suspicion, Window, margin_of

_logger = logging.getLogger(__name__)

_PRINCIPALS: Final = 512  # windows in memory; the longest unused goes first
_EVERY: Final = 64  # rows between two judgements of a window
_QUIET_S: Final = 3600  # the same alarm is raised once in so long


class Alarming:
    """Observes every answer."""

    def __init__(
        self, journal: Journal, monitoring: Monitoring, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._journal, self._monitoring, self._clock = journal, monitoring, clock
        self._windows: OrderedDict[tuple[str, str], Window] = OrderedDict()
        self._since: dict[tuple[str, str], int] = {}
        self._raised: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        self._writing: set[asyncio.Task[None]] = set()

    def observe(self, answering: Answering, answered: Any) -> None:
        """Remember the rows, and judge the window now and then."""
        key = (answering.principal.id, answering.served.model)
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = Window()
        self._windows.move_to_end(key)
        while len(self._windows) > _PRINCIPALS:
            gone, _ = self._windows.popitem(last=False)
            self._since.pop(gone, None)
        scores, answers, margins = answered.annotations.get("ood", ()), answering.answers, answering.margins
        count = len(answering.encoded)
        for place in range(max(0, count - WINDOW), count):
            out = place < len(scores) and bool(scores[place]["out"])
            margin = margins[place] if margins else margin_of(answers[place])
            window.add(Look(tuple(answering.encoded[place]), margin, out))
        since = self._since[key] = self._since.get(key, 0) + count
        if since >= _EVERY and len(window.looks) >= LEAST:
            self._since[key] = 0
            for suspicion in window.suspicions():
                self._raise(suspicion, answering)

    async def settle(self) -> None:
        """Wait until every alarm is written; before the log is closed."""
        while self._writing:
            await asyncio.gather(*self._writing, return_exceptions=True)

    def _raise(self, suspicion: Suspicion, answering: Answering) -> None:
        principal, model = answering.principal.id, answering.served.model
        key, now = (suspicion.kind, model, principal), self._clock()
        if now - self._raised.get(key, -_QUIET_S) < _QUIET_S:
            return
        self._raised[key] = now
        while len(self._raised) > 4 * _PRINCIPALS:
            self._raised.popitem(last=False)
        hour = int(now // _QUIET_S)
        name = "\x00".join((suspicion.kind, model, principal, str(hour)))
        alarm = hashlib.sha256(f"affidavit/alarm/v1\x00{name}".encode()).hexdigest()[:32]
        body = AlarmRaised(
            alarm=alarm,
            kind=suspicion.kind,
            model=model,
            measure=suspicion.measure,
            value=rounded_text(suspicion.value),
            threshold=rounded_text(suspicion.threshold),
            window_s=0,
            version=answering.served.version,
            principal=principal,
        )
        task = asyncio.get_running_loop().create_task(self._write(body, key), name="raise an alarm")
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _write(self, body: AlarmRaised, key: tuple[str, str, str]) -> None:
        try:
            await self._journal.append(body, event_id=body.alarm)
        except (AuditError, ServerError) as error:
            self._raised.pop(key, None)  # the next judgement tries again
            _logger.error("an alarm of kind %s could not be written: %s", body.kind, error.code)
            return
        self._monitoring.alarms.labels(body.model, body.kind).inc()
        _logger.warning(
            "alarm %s: %s of %s is %s, above %s",
            body.kind, body.measure, body.model, body.value, body.threshold,
            extra={"ecs": {"event.action": "alarm.raised", "user.id": body.principal}},
        )  # fmt: skip
