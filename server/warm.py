"""Models ready to answer: weights loaded by digest, checked, and kept for the versions in use."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from audit.answers import AnswerTerms
from audit.encoding import RowEncoder
from audit.errors import AuditError
from audit.models import answer_of, dimension, weights_of_file
from federation.blobs import BlobStore
from federation.errors import ExportError, FederationError, LayerNotExportedError
from server.errors import ArtefactError, RowContractError
from server.fast_json import texts_of
from server.live import ServedVersion
from server.probing import margin_of

_logger = logging.getLogger(__name__)

_KEPT: Final = 32  # beside those in use
_SHOWN: Final = 100  # of the fields outside the contract
_WEIGHT_FILE_SLACK: Final = 1 << 20

Forward = Callable[[Sequence[Sequence[float]], int | None], list[list[float]]]


@dataclass(frozen=True, slots=True)
class WarmModel:
    """One version in memory, under one charter's terms."""

    version: str
    charter: str  # its digest
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
        encoded: list[list[float]] = []
        fields: list[dict[str, Any]] = []
        for number, row in enumerate(rows):
            if len(fields) >= _SHOWN:
                break
            values, problems = self.encoder.read(row)
            encoded.append(values)
            if problems:
                fields += [
                    {"row": number, "field": found.field, "problem": found.message, "code": found.code}
                    for found in problems
                ]
        if fields:
            first = fields[0]
            raise RowContractError(
                f"row {first['row']}, {first['field']}: {first['problem']}", fields=fields[:_SHOWN]
            )
        return encoded

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
        return self.answers_of(self.forward(encoded, site))

    def answers_of(self, outputs: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
        """Return what the charter lets out of the model's outputs.

        Raises:
            RowContractError: for these rows the model gives no finite number.
        """
        try:
            return [self.terms.released(answer_of(self.task, self.label, row)) for row in outputs]
        except AuditError as error:
            raise RowContractError(f"the version has no answer to such a row: {error}") from error

    def margins_of(self, outputs: Sequence[Sequence[float]]) -> tuple[float | None, ...]:
        """Return `margin_of` each exact answer where less than that is let out, else nothing.

        Who studies the model by labels alone is not to be missed because labels alone are let out.
        """
        if not self.terms.is_restricted:
            return ()
        return tuple(margin_of(answer_of(self.task, self.label, row)) for row in outputs)


class WarmModels:
    """The versions in memory, loaded once each, by digest, and checked before they answer anybody.

    What is in use (live, canary, shadow) is never put out, however many there are; of the others those that
    were looked for last are kept.
    """

    def __init__(self, blobs: BlobStore, in_use: Callable[[], Collection[tuple[str, str]]]) -> None:
        """Prepare; `in_use` gives (version, charter) of what must stay."""
        self._blobs, self._in_use = blobs, in_use
        self._models: OrderedDict[tuple[str, str], WarmModel] = OrderedDict()  # by version and charter
        self._lock = threading.Lock()

    def ready(self, served: ServedVersion) -> WarmModel | None:
        """Return the version if it is in memory.

        Two charters may name the same weights, and let out more or less of what they say.
        """
        key = (served.version, served.charter_digest)
        found = self._models.get(key)
        if found is not None:
            with suppress(KeyError):  # another thread put it out meanwhile
                self._models.move_to_end(key)
        return found

    def get(self, served: ServedVersion) -> WarmModel:
        """Return the version, loading it when needed.

        Raises:
            ArtefactError: the registry's file is absent, altered, or is not this charter's model.
        """
        key = (served.version, served.charter_digest)
        with self._lock:
            warm = self._models.get(key)
            if warm is None:
                warm = self._models[key] = self._load(served)
                self._make_room(key)
            self._models.move_to_end(key)
            return warm

    def _make_room(self, key: tuple[str, str]) -> None:
        """Put out those that were longest not looked for, of what is neither in use nor the newest."""
        if len(self._models) <= _KEPT:
            return
        in_use = self._in_use()
        others = [known for known in list(self._models) if known != key and known not in in_use]
        for known in others[: max(0, len(others) + (key not in in_use) - _KEPT)]:
            del self._models[known]

    def _load(self, served: ServedVersion) -> WarmModel:
        layers = served.charter["model"]["layers"]
        encoder = RowEncoder(served.charter["features"], texts_of)
        try:
            limit = 8 * dimension(layers) + _WEIGHT_FILE_SLACK
            weights = weights_of_file(layers, self._file(served.version, limit))
            forward = self._forward(served, layers, weights, encoder.size)
        except (AuditError, FederationError, OSError) as error:
            raise ArtefactError(f"version {served.version}: {error}") from error
        return WarmModel(
            version=served.version,
            charter=served.charter_digest,
            encoder=encoder,
            task=served.charter["task"],
            label=served.charter["label"],
            sites=tuple(site["name"] for site in served.charter["sites"]),
            forward=forward,
            terms=AnswerTerms.of_charter(served.charter),
        )

    def _forward(
        self, served: ServedVersion, layers: list[dict[str, Any]], weights: Sequence[float], inputs: int
    ) -> Forward:
        """Run the registry's export when the log names one, else an export made here; torch without one."""
        from federation import onnx_export

        try:
            if served.export is None:
                data = onnx_export.export_onnx(layers, weights, inputs)
            else:
                data = self._file(served.export.digest, 8 * len(weights) + _WEIGHT_FILE_SLACK)
                onnx_export.check_export(data, layers, weights, inputs)
        except LayerNotExportedError as error:
            from server.engine import torch_forward

            _logger.info("version=%s is served by torch: %s", served.version, error)
            return torch_forward(layers, weights)
        from server.onnx_engine import onnx_forward

        return onnx_forward(data, layers)

    def _file(self, digest: str, limit: int) -> bytes:
        size = self._blobs.size_bytes(digest)
        if size > limit:
            raise ExportError(f"the file {digest} has {size} bytes; this version's has at most {limit}")
        return self._blobs.get(digest)
