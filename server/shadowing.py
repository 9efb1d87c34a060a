"""Shadows: versions under trial that are asked beside the one that answers, and answer nobody.

After an answer has gone out, its rows go through each shadow, and what that would have said is sealed in the
vault (under the person that the request named, else under the caller) and committed to by an entry of its
own. How often the labels agree is counted. Under load shadows are skipped, and that is counted too: they
never cost a caller anything. A shadow is asked what the policies would let it answer, were it live.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Final

from audit.canonical import canonical_bytes
from audit.disclosure import CONTEXT, new_part
from audit.errors import AuditError
from audit.principal import Principal
from audit.runtime_bodies import PredictionShadowed
from audit.vault_records import PERSON, READER
from server.answers import Asked
from server.errors import ServerError
from server.hooks import Answering
from server.journal import Journal
from server.live import ServedVersion
from server.monitoring import Monitoring
from server.sealing import Sealing
from server.warm import WarmModels

_logger = logging.getLogger(__name__)

MAX_WAITING: Final = 64
WouldAllow = Callable[[Principal, Asked, ServedVersion], bool]  # `server.service.PredictService.would_allow`


class Shadowing:
    """Asks shadows, a few at a time, on the loop that answered."""

    def __init__(self, warm: WarmModels, journal: Journal, sealing: Sealing, monitoring: Monitoring) -> None:
        self._warm, self._journal, self._sealing, self._monitoring = warm, journal, sealing, monitoring
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(
        self, shadow: ServedVersion, answering: Answering, leaf_hash: str, would_allow: WouldAllow
    ) -> None:
        """Ask once this answer is out; not at all where too many wait already.

        Nor where the policies would not let the shadow answer, were it live: its charter may allow fewer
        purposes or regions, or ask for a legal basis.
        """
        if len(self._tasks) >= MAX_WAITING:
            self._monitoring.shadowed.labels(shadow.model, "skipped").inc()
            return
        task = asyncio.create_task(self._ask(shadow, answering, leaf_hash, would_allow))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self) -> None:
        """Wait for those that were asked."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(
        self, shadow: ServedVersion, answering: Answering, leaf_hash: str, would_allow: WouldAllow
    ) -> None:
        asked, encoded = answering.asked, answering.encoded
        try:
            if not would_allow(answering.principal, asked, shadow):
                self._monitoring.shadowed.labels(shadow.model, "refused").inc()
                return
            warm = self._warm.ready(shadow)
            if warm is None:
                warm = await asyncio.to_thread(self._warm.get, shadow)
            if warm.charter != answering.served.charter_digest:
                encoded = warm.encode(answering.plain)  # the same row, encoded its way
            answers = warm.answers(encoded, warm.site_index(asked.site))
            part = new_part(
                {f"row.{n}": canonical_bytes(dict(answer)).decode() for n, answer in enumerate(answers)}
            )
            kind, name = (PERSON, asked.subject) if asked.subject else (READER, answering.principal.id)
            event_id = secrets.token_hex(16)
            sealed = await self._sealing.seal(
                kind=kind, name=name, event_id=event_id, type="prediction.shadowed", parts={CONTEXT: part}
            )
            await self._journal.append(
                PredictionShadowed(
                    model=shadow.model,
                    version=shadow.version,
                    transition=shadow.transition,
                    answered=leaf_hash,
                    rows=len(answers),
                    context=part.root(CONTEXT),
                    subject=sealed.pseudonym,
                    sealed=sealed.digest,
                ),
                event_id=event_id,
            )
        except (AuditError, ServerError) as error:
            self._monitoring.shadowed.labels(shadow.model, "failed").inc()
            _logger.warning("shadow %s of %s: %s", shadow.version, shadow.model, error)
            return
        for given, would in zip(answering.answers, answers, strict=True):
            agrees = given["label"] == would["label"]
            self._monitoring.shadowed.labels(shadow.model, "agreed" if agrees else "disagreed").inc()
