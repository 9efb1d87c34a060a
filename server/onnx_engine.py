"""The forward pass in ONNX Runtime, float64, on one thread: from a file that was proved to be the export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime

from federation.errors import ExportError
from federation.onnx_export import site_input
from server.errors import RowContractError
from server.warm import Forward


def onnx_forward(data: bytes, layers: Sequence[dict[str, Any]]) -> Forward:
    """Return the function from encoded rows, shape (n, inputs), and a site's index to outputs.

    Raises:
        ExportError: the runtime does not take the file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(data, sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime does not take the export: {error}") from error
    sites = next((layer["sites"] for layer in layers if layer["layer"] == "site_intercept"), 0)
    mean = site_input(None, sites) if sites else None
    run, names = session.run, ["outputs"]

    codes = next((layer["count"] for layer in layers if layer["layer"] == "embedding"), 0)

    def forward(rows: Sequence[Sequence[float]], site: int | None) -> list[list[float]]:
        given = np.array(rows, dtype=np.float64)
        if codes and not ((given >= 0) & (given < codes) & (given == np.floor(given))).all():
            raise RowContractError(f"a row holds what is no code of an embedding of {codes}")
        feed = {"rows": given}
        if mean is not None:
            feed["site"] = mean if site is None else site_input(site, sites)
        result: list[list[float]] = run(names, feed)[0].tolist()
        return result

    return forward
