"""How far each row lies from what the model was trained on, beside every answer.

The score is `audit.reference.OodScorer`'s, by the sketch that the version's run paid for, else by the
declared bounds. It is committed to and sealed with the row's answer, shown in the answer's annotations, and
counted.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from audit.errors import AuditError
from audit.ledger import Ledger
from audit.reference import Ood, OodScorer, Reference, sketch_counts
from federation import registry
from federation.errors import FederationError
from server.errors import ArtefactError
from server.hooks import Annotation, Answering
from server.live import ServedVersion
from server.monitoring import Monitoring

_KEPT: Final = 64  # scorers in memory: a few kilobytes each
_INLINE_ROWS: Final = 32  # more rows than this are scored beside the event loop


class Scoring:
    """Annotates every answer with its rows' scores."""

    def __init__(self, ledger: Ledger, get_blob: Callable[[str], bytes], monitoring: Monitoring) -> None:
        self._ledger, self._get, self._monitoring = ledger, get_blob, monitoring
        self._scorers: OrderedDict[tuple[str, str], OodScorer] = OrderedDict()  # by version and charter
        self._lock = threading.Lock()

    def annotate(self, answering: Answering) -> Annotation | Awaitable[Annotation]:
        """Score the rows; the first request of a version reads its sketch.

        Raises:
            ArtefactError: the charter pays for a sketch and the registry's copy of it cannot be used.
        """
        served = answering.served
        scorer = self._scorers.get((served.version, served.charter_digest))
        if scorer is None or len(answering.encoded) > _INLINE_ROWS:
            return self._beside(answering)
        return self._annotation(answering, [scorer.score(row) for row in answering.encoded])

    def scorer(self, served: ServedVersion) -> OodScorer:
        """Return the version's scorer, reading the log and the sketch when needed; errors as `annotate`."""
        key = (served.version, served.charter_digest)
        with self._lock:
            scorer = self._scorers.get(key)
            if scorer is None:
                scorer = self._scorers[key] = self._load(served)
                while len(self._scorers) > _KEPT:
                    self._scorers.popitem(last=False)
            return scorer

    async def _beside(self, answering: Answering) -> Annotation:
        def work() -> list[Ood]:
            scorer = self.scorer(answering.served)
            return [scorer.score(row) for row in answering.encoded]

        return self._annotation(answering, await asyncio.to_thread(work))

    def _annotation(self, answering: Answering, scores: Sequence[Ood]) -> Annotation:
        model = answering.served.model
        for score in scores:
            self._monitoring.scored(model, score["basis"], float(score["score"]), score["out"])
        return Annotation(shown={"ood": list(scores)}, rows=[{"ood": score} for score in scores])

    def _load(self, served: ServedVersion) -> OodScorer:
        features = served.charter["features"]
        try:
            reference = Reference.of_charter(served.charter)
            found = (
                None if reference is None else registry.run_referenced(self._ledger, served.registered.run)
            )
            if reference is None or found is None or not found.sketch:
                return OodScorer(features)
            counts = sketch_counts(self._get(found.sketch), digest=found.sketch, reference=reference)
            return OodScorer(features, reference=reference, counts=counts)
        except (AuditError, FederationError, OSError) as error:
            raise ArtefactError(f"the sketch of version {served.version}: {error}") from error
