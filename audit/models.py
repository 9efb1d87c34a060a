"""Models as data: initial weights, model files, and what a model's outputs mean.

The layers are in `audit.layers`, one example's way through them in `audit.forward` (the definition in float64
that a verifier runs; the torch models are tested equal to it).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from audit.decimals import parse_decimal, rounded_text
from audit.forward import forward
from audit.layers import (
    LAYERS,
    Layer,
    ModelError,
    check_layers,
    dimension,
    output_shape,
    parameter_specs,
    parameters_of,
)
from audit.weights import decode_weights, encode_weights

__all__ = [
    "LAYERS",
    "Layer",
    "ModelError",
    "answer_of",
    "check_layers",
    "dimension",
    "forward",
    "initial_weights",
    "model_file",
    "output_shape",
    "outputs_of",
    "parameter_specs",
    "probabilities",
    "value_of",
    "weights_of_file",
]


def initial_weights(layers: Sequence[Layer], charter_digest: str) -> list[float]:
    """Return the flat starting weights that a charter fixes.

    A model whose only trainable layers are one linear and site intercepts starts at zero. Otherwise
    linear and conv2d are uniform in ±1/sqrt(fan_in) (weight and bias), embeddings uniform in ±0.05, norms
    1 and 0, site intercepts 0. The uniforms are 53-bit, from SHA-256(b"affidavit/init/v1\\0" || digest ||
    counter, 8 bytes big-endian), four to a block, drawn in parameter order.
    """
    check_layers(layers)
    if is_zero_start(layers):
        return [0.0] * dimension(layers)
    stream = _uniforms(bytes.fromhex(charter_digest))
    values: list[float] = []
    for count, bound, constant in starting_spans(layers):
        if bound is None:
            values += [constant] * count
        else:
            values += [bound * (2.0 * u - 1.0) for u in islice(stream, count)]
    return values


def is_zero_start(layers: Sequence[Layer]) -> bool:
    """Whether a model's only trainable layers are one linear and site intercepts."""
    kinds = [layer["layer"] for layer in layers if parameters_of(layer)]
    return kinds.count("linear") == 1 and set(kinds) <= {"linear", "site_intercept"}


def starting_spans(layers: Sequence[Layer]) -> Iterator[tuple[int, float | None, float]]:
    """Yield (count, bound, constant) a parameter: from ±bound, or all `constant` where bound is None."""
    for layer in layers:
        for name, shape in parameters_of(layer):
            count = math.prod(shape)
            match layer["layer"]:
                case "linear" | "conv2d":
                    yield count, 1.0 / math.sqrt(layer["in"] * layer.get("kernel", 1) ** 2), 0.0
                case "embedding":
                    yield count, 0.05, 0.0
                case "layer_norm" | "group_norm":
                    yield count, None, 1.0 if name == "weight" else 0.0
                case _:
                    yield count, None, 0.0


def _uniforms(digest: bytes) -> Iterator[float]:
    counter = 0
    while True:
        block = hashlib.sha256(b"affidavit/init/v1\x00" + digest + counter.to_bytes(8, "big")).digest()
        for start in range(0, 32, 8):
            yield (int.from_bytes(block[start : start + 8], "big") >> 11) * 2.0**-53
        counter += 1


def model_file(layers: Sequence[Layer], weights: Sequence[float]) -> bytes:
    """Return the model file (`audit.weights`) of a flat weight vector."""
    specs = parameter_specs(layers)
    if len(weights) != sum(math.prod(shape) for _, shape in specs):
        raise ModelError(f"{len(weights)} weights do not fit the model's {dimension(layers)} parameters")
    tensors, offset = {}, 0
    for name, shape in specs:
        end = offset + math.prod(shape)
        tensors[name] = (shape, weights[offset:end])
        offset = end
    return encode_weights(tensors)


def weights_of_file(layers: Sequence[Layer], data: bytes) -> list[float]:
    """Return the flat weights of a model file that must fit `layers` exactly.

    Raises:
        WeightsError: the bytes are not a model file.
        ModelError: another model's file.
    """
    tensors = decode_weights(data)
    found = tuple((name, shape) for name, (shape, _) in tensors.items())
    if found != parameter_specs(layers):
        raise ModelError("the model file's tensors are not those of the charter's layers")
    return [value for _, values in tensors.values() for value in values]


def outputs_of(task: str, label: Mapping[str, Any]) -> int:
    """Return how many outputs a model for `task` has: 1, or one for each class."""
    return len(label["classes"]) if task == "multiclass" else 1


def probabilities(task: str, outputs: Sequence[float]) -> list[float]:
    """Return one probability for each class: sigmoid of the logit, or softmax.

    Raises:
        ModelError: the outputs do not fit the task.
    """
    if task == "binary" and len(outputs) == 1:
        z = outputs[0]
        positive = 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))
        return [1.0 - positive, positive]
    if task == "multiclass" and len(outputs) > 1:
        top = max(outputs)
        parts = [math.exp(z - top) for z in outputs]
        total = math.fsum(parts)
        return [part / total for part in parts]
    raise ModelError(f"{len(outputs)} outputs give no probabilities for a {task} task")


def value_of(label: Mapping[str, Any], outputs: Sequence[float]) -> float:
    """Return a regression answer in the label's own unit: the output maps [-1, 1] to the declared bounds."""
    if len(outputs) != 1:
        raise ModelError(f"a regression model has one output, not {len(outputs)}")
    lower, upper = float(parse_decimal(label["lower"])), float(parse_decimal(label["upper"]))
    return lower + (outputs[0] + 1.0) / 2.0 * (upper - lower)


def answer_of(task: str, label: Mapping[str, Any], outputs: Sequence[float]) -> dict[str, Any]:
    """Return the answer given to a caller, numbers as decimal text of six places.

    binary: {"label": class, "probability": of classes[1]}; multiclass: {"label", "probabilities": in the
    order of the classes}; regression: {"label": the label's name, "value"}.
    """
    if not all(map(math.isfinite, outputs)):
        raise ModelError("the model's output is not finite")
    if task == "regression":
        return {"label": label["name"], "value": rounded_text(value_of(label, outputs))}
    chances = probabilities(task, outputs)
    if task == "binary":
        chosen = label["classes"][1 if chances[1] >= 0.5 else 0]
        return {"label": chosen, "probability": rounded_text(chances[1])}
    best = max(range(len(chances)), key=lambda k: (chances[k], -k))
    return {"label": label["classes"][best], "probabilities": [rounded_text(chance) for chance in chances]}
