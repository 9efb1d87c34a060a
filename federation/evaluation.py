"""What a model is worth on the charter's public set: the same numbers that a verifier recomputes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audit.decimals import rounded_text
from audit.entries import Metric
from audit.errors import AuditError
from audit.forward import forward
from audit.layers import parameter_specs
from audit.metrics import METRICS_OF_TASK, evaluate
from audit.public_set import missing_values, public_set_digest, read_public_set
from federation.charter import Charter
from federation.errors import PublicSetError
from federation.flat import Vector

_NUMPY_LAYERS = frozenset({"linear", "relu", "tanh", "sigmoid", "flatten", "site_intercept"})


@dataclass(frozen=True, slots=True)
class PublicData:
    """The encoded public set: rows of shape (n, encoded width), labels of length n, and by feature the rows
    that had no value.
    """

    digest: str
    rows: list[list[float]]
    labels: list[float]
    missing: Mapping[str, frozenset[int]]

    @classmethod
    def read(cls, charter: Charter, data: bytes) -> PublicData:
        """Encode the file that the charter names.

        Raises:
            PublicSetError: another file, a row outside the data contract, or another number of rows.
        """
        if charter.public_set is None:
            raise PublicSetError("the charter declares no public set")
        digest = public_set_digest(data)
        if digest != charter.public_set.digest:
            raise PublicSetError(
                f"the public set's digest is {digest}, the charter says {charter.public_set.digest}; "
                "use the very file that was agreed"
            )
        document = charter.document
        try:
            rows, labels = read_public_set(data, document["features"], document["label"])
        except AuditError as error:
            raise PublicSetError(str(error)) from error
        if len(rows) != charter.public_set.rows:
            raise PublicSetError(
                f"the public set has {len(rows)} rows, the charter says {charter.public_set.rows}"
            )
        return cls(digest, rows, labels, missing_values(data, [f.name for f in charter.features]))


def model_outputs(
    layers: Sequence[Any], weights: Sequence[float] | Vector, rows: Sequence[Sequence[float]]
) -> list[list[float]]:
    """Return the raw output of every row, in float64, without a site (the mean intercept).

    Dense models run in numpy; others in torch where it is installed, else in plain Python.
    """
    if all(layer["layer"] in _NUMPY_LAYERS for layer in layers):
        return _numpy_outputs(layers, weights, rows)
    if importlib.util.find_spec("torch") is not None:
        return _torch_outputs(layers, weights, rows)
    return [forward(layers, list(weights), list(row)) for row in rows]


def _numpy_outputs(
    layers: Sequence[Any], weights: Sequence[float] | Vector, rows: Sequence[Sequence[float]]
) -> list[list[float]]:
    flat = np.asarray(weights, dtype=np.float64)
    parts: dict[str, Any] = {}
    offset = 0
    for name, shape in parameter_specs(layers):
        count = int(np.prod(shape))
        parts[name] = flat[offset : offset + count].reshape(shape)
        offset += count
    x = np.asarray(rows, dtype=np.float64)
    for index, layer in enumerate(layers):
        match layer["layer"]:
            case "linear":
                x = x @ parts[f"{index}.weight"].T + parts.get(f"{index}.bias", 0.0)
            case "relu":
                x = np.maximum(x, 0.0)
            case "tanh":
                x = np.tanh(x)
            case "sigmoid":
                x = 0.5 * (1.0 + np.tanh(0.5 * x))
            case "site_intercept":
                x = x + parts[f"{index}.weight"].mean(axis=0)
            case _:
                x = x.reshape(len(x), -1)
    outputs: list[list[float]] = x.tolist()
    return outputs


def _torch_outputs(
    layers: Sequence[Any], weights: Sequence[float] | Vector, rows: Sequence[Sequence[float]]
) -> list[list[float]]:
    import torch

    from federation.torch_models import build_model, set_weights

    model = build_model(layers)
    set_weights(model, weights)
    model.eval()
    with torch.inference_mode():
        outputs: list[list[float]] = model(torch.tensor(rows, dtype=torch.float64)).tolist()
    return outputs


def metrics_of(charter: Charter, data: PublicData, weights: Sequence[float] | Vector) -> tuple[Metric, ...]:
    """Return every metric of the charter's task on the public set, to six places; those undefined there are
    left out.
    """
    outputs = model_outputs(charter.layers, weights, data.rows)
    found = []
    for name in METRICS_OF_TASK[charter.task]:
        try:
            value = evaluate(name, charter.task, charter.document["label"], data.labels, outputs)
        except AuditError:
            continue
        found.append(Metric(name=name, value=rounded_text(value), source="public_set", dataset=data.digest))
    return tuple(found)
