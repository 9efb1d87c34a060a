"""One example through a model, in pure Python float64: the definition that every faster path must equal.

Values travel as a flat list in C order beside their shape. Nothing here is fast; a verifier needs it once a
row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

from audit.layers import NORM_EPS, Layer, ModelError, Shape, check_layers, next_shape, parameters_of

Vector = Sequence[float]


def forward(
    layers: Sequence[Layer],
    weights: Sequence[float],
    x: Sequence[float],
    site: int | None = None,
) -> list[float]:
    """Return the model's outputs for one encoded row.

    Args:
        layers: the charter's layer list.
        weights: flat, `dimension(layers)` values in parameter order.
        x: the encoded row, flat.
        site: index among the charter's sorted sites, for site intercepts; None takes their mean.

    Raises:
        ModelError: shapes do not fit, an embedding code is not one, or the site does not exist.
    """
    check_layers(layers)
    shape: Shape = (len(x),)
    values, offset = [float(v) for v in x], 0
    for layer in layers:
        parameters = []
        for _, parameter_shape in parameters_of(layer):
            end = offset + math.prod(parameter_shape)
            parameters.append(weights[offset:end])
            offset = end
        if offset > len(weights):
            raise ModelError(f"{len(weights)} weights are too few for the model")
        after = next_shape(layer, shape)
        values, shape = _apply(layer, parameters, values, shape, after, site), after
    if offset != len(weights):
        raise ModelError(f"{len(weights)} weights, but the model has {offset} parameters")
    return values


def _apply(
    layer: Layer, parameters: list[Vector], x: list[float], shape: Shape, after: Shape, site: int | None
) -> list[float]:
    match layer["layer"]:
        case "linear":
            bias = parameters[1] if layer["bias"] else [0.0] * layer["out"]
            return _linear(parameters[0], bias, x, layer["in"])
        case "relu":
            return [v if v > 0 else 0.0 for v in x]
        case "tanh":
            return [math.tanh(v) for v in x]
        case "sigmoid":
            return [1.0 / (1.0 + math.exp(-v)) if v >= 0 else math.exp(v) / (1.0 + math.exp(v)) for v in x]
        case "gelu":
            return [0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0))) for v in x]
        case "conv2d":
            return _conv2d(layer, parameters[0], parameters[1], x, shape, after)
        case "max_pool2d" | "avg_pool2d":
            return _pool2d(layer["layer"] == "max_pool2d", layer["kernel"], x, shape, after)
        case "layer_norm":
            size = layer["size"]
            rows = [_normalise(x[start : start + size]) for start in range(0, len(x), size)]
            return [
                v * w + b for row in rows for v, w, b in zip(row, parameters[0], parameters[1], strict=True)
            ]
        case "group_norm":
            return _group_norm(layer, parameters[0], parameters[1], x)
        case "embedding":
            return _embedding(layer, parameters[0], x)
        case "site_intercept":
            return _site_intercept(layer, parameters[0], x, site)
        case _:  # flatten, reshape
            return x


def _dot(a: Vector, b: Vector) -> float:
    return math.fsum(map(mul, a, b))


def _linear(weight: Vector, bias: Vector, x: list[float], size: int) -> list[float]:
    rows = [weight[start : start + size] for start in range(0, len(weight), size)]
    return [
        _dot(row, x[start : start + size]) + b
        for start in range(0, len(x), size)
        for row, b in zip(rows, bias, strict=True)
    ]


def _conv2d(
    layer: Layer, weight: Vector, bias: Vector, x: list[float], shape: Shape, after: Shape
) -> list[float]:
    kernel, stride, padding = layer["kernel"], layer["stride"], layer["padding"]
    channels, height, width = shape
    patches = []
    for row in range(after[1]):
        for column in range(after[2]):
            top, left = row * stride - padding, column * stride - padding
            patch = []
            for channel in range(channels):
                for i in range(top, top + kernel):
                    for j in range(left, left + kernel):
                        inside = 0 <= i < height and 0 <= j < width
                        patch.append(x[(channel * height + i) * width + j] if inside else 0.0)
            patches.append(patch)
    size = channels * kernel * kernel
    filters = [weight[start : start + size] for start in range(0, len(weight), size)]
    return [_dot(f, patch) + b for f, b in zip(filters, bias, strict=True) for patch in patches]


def _pool2d(largest: bool, kernel: int, x: list[float], shape: Shape, after: Shape) -> list[float]:
    _, height, width = shape
    values = []
    for channel in range(after[0]):
        for row in range(after[1]):
            for column in range(after[2]):
                window = [
                    x[(channel * height + row * kernel + i) * width + column * kernel + j]
                    for i in range(kernel)
                    for j in range(kernel)
                ]
                values.append(max(window) if largest else math.fsum(window) / len(window))
    return values


def _normalise(x: Vector) -> list[float]:
    mean = math.fsum(x) / len(x)
    variance = math.fsum((v - mean) ** 2 for v in x) / len(x)
    scale = 1.0 / math.sqrt(variance + NORM_EPS)
    return [(v - mean) * scale for v in x]


def _group_norm(layer: Layer, weight: Vector, bias: Vector, x: list[float]) -> list[float]:
    group, channel = len(x) // layer["groups"], len(x) // layer["channels"]
    normal = [v for start in range(0, len(x), group) for v in _normalise(x[start : start + group])]
    return [v * weight[i // channel] + bias[i // channel] for i, v in enumerate(normal)]


def _embedding(layer: Layer, table: Vector, x: list[float]) -> list[float]:
    size: int = layer["size"]
    values: list[float] = []
    for code in x:
        if code != int(code) or not 0 <= code < layer["count"]:
            raise ModelError(f"{code!r} is no code of an embedding of {layer['count']}")
        values += table[int(code) * size : (int(code) + 1) * size]
    return values


def _site_intercept(layer: Layer, table: Vector, x: list[float], site: int | None) -> list[float]:
    out, sites = layer["out"], layer["sites"]
    if site is None:
        return [v + math.fsum(table[k] for k in range(i, sites * out, out)) / sites for i, v in enumerate(x)]
    if not 0 <= site < sites:
        raise ModelError(f"site {site} is not one of the model's {sites}")
    return [v + table[site * out + i] for i, v in enumerate(x)]
