"""Models ready to answer: weights loaded by digest, checked, and kept for the versions in use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from audit.answers import AnswerTerms
from audit.encoding import RowEncoder
from audit.errors import AuditError
from audit.models import answer_of, weights_of_file
from federation.errors import FederationError
from server.errors import ArtefactError, RowContractError
from server.live import ServedVersion

_KEPT: Final = 8

Forward = Callable[[Sequence[Sequence[float]], int | None], list[list[float]]]


@dataclass(frozen=True, slots=True)
class WarmModel:
    """One version in memory."""

    encoder: RowEncoder
    task: str
    label: Mapping[str, Any]
    sites: tuple[str, ...]
    forward: Forward
    terms: AnswerTerms

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        """Encode the rows by the charter.

        Raises:
            RowContractError: a row is outside the contract; names each row, field, problem and fix.
        """
        fields = [
            {"row": number, "field": found.field, "problem": found.message, "code": found.code}
            for number, row in enumerate(rows)
            for found in self.encoder.check(row)
        ]
        if fields:
            first = fields[0]
            raise RowContractError(
                f"row {first['row']}, {first['field']}: {first['problem']}", fields=fields[:100]
            )
        return [self.encoder.encode(row) for row in rows]

    def site_index(self, site: str | None) -> int | None:
        if site is None:
            return None
        if site not in self.sites:
            known = ", ".join(self.sites)
            raise RowContractError(
                f"site: {site!r} is no member of the charter; use one of {known}, or leave it out",
                fields=[{"field": "site", "problem": "is no member of the charter", "code": "unknown_site"}],
            )
        return self.sites.index(site)

    def answers(self, encoded: Sequence[Sequence[float]], site: int | None) -> list[dict[str, Any]]:
        """Return one answer a row, as much of it as the charter lets out; numbers as decimal text."""
        outputs = self.forward(encoded, site)
        return [self.terms.released(answer_of(self.task, self.label, values)) for values in outputs]


class WarmModels:
    """The versions in memory, loaded once each."""

    def __init__(self, get_blob: Callable[[str], bytes]) -> None:
        self._get = get_blob
        self._models: OrderedDict[str, WarmModel] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, served: ServedVersion) -> WarmModel:
        """Return the version, loading it when needed.

        Raises:
            ArtefactError: the registry's file is absent, altered, or is not this charter's model.
        """
        with self._lock:
            warm = self._models.get(served.version)
            if warm is None:
                warm = self._load(served)
                self._models[served.version] = warm
                while len(self._models) > _KEPT:
                    self._models.popitem(last=False)
            self._models.move_to_end(served.version)
            return warm

    def _load(self, served: ServedVersion) -> WarmModel:
        from server.engine import torch_forward

        layers = served.charter["model"]["layers"]
        try:
            weights = weights_of_file(layers, self._get(served.version))
        except (AuditError, FederationError, OSError) as error:
            raise ArtefactError(f"version {served.version}: {error}") from error
        return WarmModel(
            encoder=RowEncoder(served.charter["features"]),
            task=served.charter["task"],
            label=served.charter["label"],
            sites=tuple(site["name"] for site in served.charter["sites"]),
            forward=torch_forward(layers, weights),
            terms=AnswerTerms.of_charter(served.charter),
        )
