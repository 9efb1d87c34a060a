"""Layers as data: the closed set, the fields each has, its parameters and the shapes it takes and gives.

A model is a list of layers (plain dicts, fully resolved). Parameters are named as in `nn.Sequential`
("<layer index>.weight", "<layer index>.bias") and laid out in one flat vector: by layer, weight before bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from audit.errors import AuditError

Layer: TypeAlias = Mapping[str, Any]
Shape: TypeAlias = tuple[int, ...]

NORM_EPS: Final = 1e-5
MAX_PARAMETERS: Final = 120_000_000  # above 8 million the updates themselves do not fit into evidence
MAX_WORK: Final = 200_000_000  # multiplications for one example, some ten seconds in plain Python
_MAX_SIZE: Final = 1 << 24

_FIELDS: Final[dict[str, tuple[str, ...]]] = {
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
LAYERS: Final = frozenset(_FIELDS)
_ZERO_ALLOWED: Final = frozenset({"bias", "padding"})


class ModelError(AuditError):
    """The layer list is not a model, or the numbers do not fit it."""

    code = "audit.model"


def check_layers(layers: object) -> None:
    """Check names, fields and ranges of every layer.

    Raises:
        ModelError: names the layer's index, the field and what is allowed.
    """
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ModelError("layers: a model needs a list of at least one layer")
    total = 0
    for index, layer in enumerate(layers):
        where = f"layers[{index}]"
        if not isinstance(layer, Mapping) or not isinstance(layer.get("layer"), str):
            raise ModelError(f'{where}: needs a field "layer" naming its kind')
        kind = layer["layer"]
        if kind not in _FIELDS:
            raise ModelError(f"{where}: no layer is called {kind!r}; use one of {', '.join(sorted(LAYERS))}")
        if set(layer) != {"layer", *_FIELDS[kind]}:
            raise ModelError(f"{where}: a {kind} layer has exactly the fields {list(_FIELDS[kind])}")
        for name in _FIELDS[kind]:
            sizes = layer[name] if name == "shape" else [layer[name]]
            if not isinstance(sizes, (list, tuple)) or not 1 <= len(sizes) <= 4:
                raise ModelError(f"{where}.shape: needs 1 to 4 sizes")
            for size in sizes:
                if type(size) is not int or not (0 if name in _ZERO_ALLOWED else 1) <= size < _MAX_SIZE:
                    raise ModelError(f"{where}.{name}: {size!r} is not a size this release accepts")
        if kind == "linear" and layer["bias"] > 1:
            raise ModelError(f"{where}.bias: is 0 or 1")
        if kind == "group_norm" and layer["channels"] % layer["groups"]:
            raise ModelError(f"{where}.groups: does not divide channels")
        total += sum(math.prod(shape) for _, shape in parameters_of(layer))
        if total > MAX_PARAMETERS:
            raise ModelError(f"{where}: the model has more than {MAX_PARAMETERS} parameters")


def parameters_of(layer: Layer) -> tuple[tuple[str, Shape], ...]:
    """Return (name, shape) of one checked layer's parameters."""
    match layer["layer"]:
        case "linear":
            weight = ("weight", (layer["out"], layer["in"]))
            return (weight, ("bias", (layer["out"],))) if layer["bias"] else (weight,)
        case "conv2d":
            shape = (layer["out"], layer["in"], layer["kernel"], layer["kernel"])
            return ("weight", shape), ("bias", (layer["out"],))
        case "layer_norm":
            return ("weight", (layer["size"],)), ("bias", (layer["size"],))
        case "group_norm":
            return ("weight", (layer["channels"],)), ("bias", (layer["channels"],))
        case "embedding":
            return (("weight", (layer["count"], layer["size"])),)
        case "site_intercept":
            return (("weight", (layer["sites"], layer["out"])),)
        case _:
            return ()


def parameter_specs(layers: Sequence[Layer]) -> tuple[tuple[str, Shape], ...]:
    """Return (name, shape) of every parameter, in the order of the flat vector."""
    check_layers(layers)
    return tuple(
        (f"{index}.{name}", shape)
        for index, layer in enumerate(layers)
        for name, shape in parameters_of(layer)
    )


def dimension(layers: Sequence[Layer]) -> int:
    """Return the number of parameters."""
    return sum(math.prod(shape) for _, shape in parameter_specs(layers))


def check_local_layers(layers: Sequence[Layer], local: Sequence[object]) -> None:
    """Check a list of layers that stay at the sites: their indices, ascending, each with parameters.

    Raises:
        ModelError: says what is wrong; a model of which nothing is shared is no federation's.
    """
    if not local or any(type(index) is not int for index in local):
        raise ModelError("are one or more layer indices, whole numbers")
    indices = [index for index in local if isinstance(index, int)]
    if indices != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= len(layers):
        raise ModelError(f"{indices} are not indices of the {len(layers)} layers, each once, ascending")
    for index in indices:
        if not parameters_of(layers[index]):
            raise ModelError(f"layer {index} ({layers[index]['layer']}) has no parameters that could stay")
    if not shared_spans(layers, indices):
        raise ModelError("hold every parameter, so nothing would be shared")


def shared_spans(layers: Sequence[Layer], local: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the (start, stop) ranges of the flat vector that are not of a local layer, ascending."""
    spans: list[tuple[int, int]] = []
    offset = 0
    for index, layer in enumerate(layers):
        end = offset + sum(math.prod(shape) for _, shape in parameters_of(layer))
        if index not in local and end > offset:
            if spans and spans[-1][1] == offset:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((offset, end))
        offset = end
    return tuple(spans)


def output_shape(layers: Sequence[Layer], input_shape: Shape) -> Shape:
    """Follow one example's shape through the model.

    Raises:
        ModelError: a layer does not fit what comes before it; names both.
    """
    check_layers(layers)
    shape = input_shape
    for index, layer in enumerate(layers):
        try:
            shape = next_shape(layer, shape)
        except ModelError as error:
            raise ModelError(f"layers[{index}]: {error}") from None
    return shape


def work(layers: Sequence[Layer], input_shape: Shape) -> int:
    """Return how many multiplications (or moves of a number) one example costs.

    Raises:
        ModelError: the layers do not fit, or one example would cost more than `MAX_WORK`.
    """
    check_layers(layers)
    shape, total = input_shape, 0
    for index, layer in enumerate(layers):
        after = next_shape(layer, shape)
        each = 1
        if layer["layer"] == "linear":
            each = layer["in"]
        elif layer["layer"] == "conv2d":
            each = layer["in"] * layer["kernel"] ** 2
        total += max(math.prod(shape), math.prod(after) * each)
        if total > MAX_WORK:
            raise ModelError(f"layers[{index}]: one example would cost more than {MAX_WORK} multiplications")
        shape = after
    return total


def next_shape(layer: Layer, shape: Shape) -> Shape:
    """Return what one checked layer makes of one example's shape."""
    match layer["layer"]:
        case "linear":
            _expect(shape[-1:] == (layer["in"],), layer, shape)
            return (*shape[:-1], layer["out"])
        case "flatten":
            return (math.prod(shape),)
        case "reshape":
            _expect(math.prod(layer["shape"]) == math.prod(shape), layer, shape)
            return tuple(layer["shape"])
        case "conv2d":
            kernel, stride, padding = layer["kernel"], layer["stride"], layer["padding"]
            _expect(len(shape) == 3 and shape[0] == layer["in"], layer, shape)
            _expect(min(shape[1:]) + 2 * padding >= kernel, layer, shape)
            return (layer["out"], *((n + 2 * padding - kernel) // stride + 1 for n in shape[1:]))
        case "max_pool2d" | "avg_pool2d":
            _expect(len(shape) == 3 and min(shape[1:]) >= layer["kernel"], layer, shape)
            return (shape[0], *(n // layer["kernel"] for n in shape[1:]))
        case "layer_norm":
            _expect(shape[-1:] == (layer["size"],), layer, shape)
        case "group_norm":
            _expect(len(shape) >= 1 and shape[0] == layer["channels"], layer, shape)
        case "embedding":
            _expect(len(shape) == 1, layer, shape)
            return (*shape, layer["size"])
        case "site_intercept":
            _expect(shape == (layer["out"],), layer, shape)
    return shape


def _expect(fits: bool, layer: Layer, shape: Shape) -> None:
    if not fits:
        raise ModelError(f"{dict(layer)} cannot take an input of shape {shape}")
