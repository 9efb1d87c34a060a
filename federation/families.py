"""Model families, and the layer lists they stand for.

A model is always a layer list from a closed set: no code travels with a charter. A family is a shorter way
of writing one. `check_layers` follows the shape of one example through the list and names the layer that
does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from math import prod
from typing import Any, Final, TypeAlias

from audit.layers import LAYERS, ModelError, dimension, next_shape
from federation.errors import LayerError

Layer: TypeAlias = dict[str, Any]
Shape: TypeAlias = tuple[int, ...]

ACTIVATIONS: Final = ("relu", "tanh", "sigmoid", "gelu")
FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "linear": ("in", "out", "bias"),
    "relu": (),
    "tanh": (),
    "sigmoid": (),
    "gelu": (),
    "flatten": (),
    "reshape": ("shape",),
    "conv2d": ("in", "out", "kernel", "stride", "padding"),
    "max_pool2d": ("kernel",),
    "avg_pool2d": ("kernel",),
    "layer_norm": ("size",),
    "group_norm": ("groups", "channels"),
    "embedding": ("count", "size"),
    "site_intercept": ("sites", "out"),
}
_DEFAULTS: Final[dict[str, int]] = {"bias": 1, "stride": 1, "padding": 0}
_MAY_BE_ZERO: Final = frozenset({"bias", "padding"})


def logistic_regression(width: int, outputs: int, *, sites: int = 0) -> list[Layer]:
    """Return one linear layer, `width` to `outputs`, with an intercept per site when `sites` is not 0."""
    return [{"layer": "linear", "in": width, "out": outputs, "bias": 1}, *_intercept(sites, outputs)]


def mlp(
    width: int, outputs: int, hidden: Sequence[int], *, activation: str = "relu", sites: int = 0
) -> list[Layer]:
    """Return a multilayer perceptron with the given hidden widths."""
    layers: list[Layer] = []
    for size in hidden:
        layers += [{"layer": "linear", "in": width, "out": size, "bias": 1}, {"layer": activation}]
        width = size
    return [*layers, *logistic_regression(width, outputs, sites=sites)]


def cnn(
    width: int,
    outputs: int,
    image: Sequence[int],
    channels: Sequence[int],
    *,
    activation: str = "relu",
    sites: int = 0,
) -> list[Layer]:
    """Return a small convolutional network: 3x3 convolutions, each halved by pooling while the side is even.

    `image` is (channels, height, width) of one example; its product must be the encoded width.
    """
    if prod(image) != width:
        raise LayerError(
            None,
            f"image {list(image)} holds {prod(image)} values, the features encode to {width}",
            "make channels x height x width equal to the encoded width",
        )
    depth, height, side = image
    layers: list[Layer] = [{"layer": "reshape", "shape": [depth, height, side]}]
    for size in channels:
        layers += [
            {"layer": "conv2d", "in": depth, "out": size, "kernel": 3, "stride": 1, "padding": 1},
            {"layer": activation},
        ]
        depth = size
        if height % 2 == 0 and side % 2 == 0:
            layers.append({"layer": "max_pool2d", "kernel": 2})
            height, side = height // 2, side // 2
    layers.append({"layer": "flatten"})
    return [*layers, *logistic_regression(depth * height * side, outputs, sites=sites)]


def _intercept(sites: int, outputs: int) -> list[Layer]:
    return [{"layer": "site_intercept", "sites": sites, "out": outputs}] if sites else []


def normalise_layers(layers: Sequence[Mapping[str, Any]]) -> list[Layer]:
    """Return the list with defaults filled in, whole numbers as `int`, and nothing unknown.

    Raises:
        LayerError: naming the layer, what is wrong and what to write.
    """
    result: list[Layer] = []
    for index, given in enumerate(layers):
        if not isinstance(given.get("layer"), str):
            raise LayerError(
                index, "is not a mapping with a key `layer`", "write {layer: linear, in: 30, out: 1}"
            )
        kind = given["layer"]
        if kind not in LAYERS:
            raise LayerError(index, f"unknown layer {kind!r}", f"choose one of {', '.join(sorted(LAYERS))}")
        allowed = FIELDS[kind]
        unknown = sorted(set(given) - {"layer", *allowed})
        if unknown:
            raise LayerError(
                index, f"{kind} has no field {unknown[0]!r}", f"its fields are {', '.join(allowed) or 'none'}"
            )
        layer: Layer = {"layer": kind}
        for name in allowed:
            if name not in given and name not in _DEFAULTS:
                raise LayerError(index, f"{kind} lacks {name!r}", f"its fields are {', '.join(allowed)}")
            value = given.get(name, _DEFAULTS.get(name))
            layer[name] = (
                [_count(index, name, v) for v in value]
                if _is_shape(name, value)
                else _count(index, name, value)
            )
        if kind == "linear" and layer["bias"] > 1:
            raise LayerError(index, f"bias is {layer['bias']}", "write 1 or 0")
        result.append(layer)
    return result


def _is_shape(name: str, value: object) -> bool:
    return name == "shape" and isinstance(value, (list, tuple))


def _count(index: int, name: str, value: object) -> int:
    if isinstance(value, bool):
        value = int(value) if name == "bias" else value
    if isinstance(value, Decimal) and value == value.to_integral_value():
        value = int(value)
    least = 0 if name in _MAY_BE_ZERO else 1
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 1_000_000:
        raise LayerError(index, f"{name} is {value!r}", f"write a whole number from {least} to 1000000")
    return value


def check_layers(layers: Sequence[Layer], *, width: int, outputs: int, sites: int) -> None:
    """Follow one example of `width` numbers through normalised `layers` to `outputs` numbers.

    Raises:
        LayerError: a layer does not take what it is given, or the end is not what the task needs.
    """
    if not layers:
        raise LayerError(None, "is empty", "write at least one linear layer")
    shape: Shape = (width,)
    for index, layer in enumerate(layers):
        kind = layer["layer"]
        if kind == "embedding":
            raise LayerError(
                index, "a charter's features arrive scaled and one-hot, not as codes", _EMBEDDING_FIX
            )
        if kind == "site_intercept" and layer["sites"] != sites:
            raise LayerError(
                index, f"site_intercept counts {layer['sites']} sites", f"the charter has {sites}"
            )
        try:
            shape = next_shape(layer, shape)
        except ModelError:
            fix = _FIXES.get(kind, "make it take what the layer before it gives")
            raise LayerError(index, f"{kind} does not take values of shape {list(shape)}", fix) from None
    if shape != (outputs,):
        fix = f"end with a linear layer of out: {outputs}"
        raise LayerError(len(layers) - 1, f"gives {list(shape)}, the task needs [{outputs}]", fix)
    try:
        count = dimension(layers)
    except ModelError as error:
        raise LayerError(None, str(error), "write a smaller model") from None
    if not count:
        raise LayerError(None, "has no parameters", "add a linear layer")


_EMBEDDING_FIX: Final = "use a linear layer on the one-hot categories, which is the same function"
_FIXES: Final[dict[str, str]] = {
    "linear": "set `in` to the size before it, or flatten first",
    "reshape": "keep the number of values",
    "conv2d": "put a reshape to [channels, height, width] before it, and match `in` to the channels",
    "max_pool2d": "pool less, or reshape to [channels, height, width] first",
    "avg_pool2d": "pool less, or reshape to [channels, height, width] first",
    "layer_norm": "set `size` to the size before it",
    "group_norm": "set `channels` to the channels before it",
    "site_intercept": "set `out` to the size before it",
}
