"""A registered version's file for the runtime that serves it: made, measured, and entered in the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from audit.decimals import decimal_text
from audit.entries import VersionRegistered
from audit.runtime_bodies import VersionExported
from federation import registry
from federation.charter import Charter
from federation.coordinator import Coordinator, stable_event_id
from federation.errors import LayerNotExportedError

_logger = logging.getLogger(__name__)


def export(
    coordinator: Coordinator, registered: VersionRegistered, charter: Charter, weights: Sequence[float]
) -> VersionExported | None:
    """Make the version's ONNX file, measure it against the definition, and enter its digest.

    Returns:
        The entry, or None for a model with a layer that ONNX has no float64 form of: torch serves that one.

    Raises:
        ExportError: the file's answers are not the version's.
    """
    from federation import onnx_export

    known = next(registry.bodies(coordinator.ledger, VersionExported, version=registered.version), None)
    if known is not None:
        return known[1]
    inputs = charter.encoded_width
    try:
        data = onnx_export.export_onnx(charter.layers, weights, inputs)
    except LayerNotExportedError as error:
        _logger.info("version=%s: %s", registered.version, error)
        return None
    parity = onnx_export.measure_parity(
        data, charter.layers, weights, inputs, task=charter.task, label=charter.document["label"]
    )
    body = VersionExported(
        model=registered.model,
        version=registered.version,
        charter=registered.charter,
        format="onnx",
        digest=coordinator.blobs.put(data),
        size_bytes=len(data),
        opset=onnx_export.OPSET,
        precision="float64",
        tolerance=decimal_text(onnx_export.TOLERANCE),
        difference=decimal_text(parity.difference),
        rows=parity.rows,
        runtime=parity.runtime,
    )
    coordinator.append(body, "coordinator", stable_event_id("version.exported", registered.version))
    return body
