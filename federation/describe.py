"""From a torch `nn.Sequential` to the declarative layer list that a charter holds.

What the list cannot express is named, with what would do instead: no code and no pickle ever travels with a
model.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from audit.layers import NORM_EPS
from federation.errors import DescribeError
from federation.families import Layer
from federation.torch_models import Reshape, SiteIntercept

_INSTEAD = {
    "BatchNorm1d": "LayerNorm; batch statistics mix rows, which per-example clipping cannot undo",
    "BatchNorm2d": "GroupNorm; batch statistics mix rows, which per-example clipping cannot undo",
    "BatchNorm3d": "GroupNorm; batch statistics mix rows, which per-example clipping cannot undo",
    "SyncBatchNorm": "GroupNorm; batch statistics mix rows, which per-example clipping cannot undo",
    "InstanceNorm2d": "GroupNorm with as many groups as channels",
    "Dropout": "nothing: leave it out, the noise regularises already",
    "LeakyReLU": "ReLU or GELU",
    "ELU": "ReLU or GELU",
    "SiLU": "GELU",
    "Softmax": "nothing: leave it out, the loss takes raw outputs",
    "LogSoftmax": "nothing: leave it out, the loss takes raw outputs",
    "LSTM": "a Linear layer over a fixed window",
    "GRU": "a Linear layer over a fixed window",
    "MultiheadAttention": "Linear layers; attention is not in the closed set of this release",
    "AdaptiveAvgPool2d": "AvgPool2d with the kernel that gives the same size",
    "Conv1d": "Conv2d on a [channels, 1, length] reshape",
}


def describe(model: nn.Module) -> list[Layer]:
    """Return the layer list of `model`, an `nn.Sequential` (nested ones are flattened).

    Raises:
        DescribeError: naming every part that the list cannot express, and what would do instead.
    """
    if not isinstance(model, nn.Sequential):
        raise DescribeError([f"{type(model).__name__} is not an nn.Sequential; write the model as one"])
    layers: list[Layer] = []
    problems: list[str] = []
    for name, module in _flat(model, ""):
        found = _layer(module)
        if isinstance(found, str):
            problems.append(f"{name} ({type(module).__name__}): {found}")
        else:
            layers.append(found)
    if problems:
        raise DescribeError(problems)
    return layers


def _flat(model: nn.Sequential, prefix: str) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_children():
        if isinstance(module, nn.Sequential):
            found += _flat(module, f"{prefix}{name}.")
        elif not isinstance(module, nn.Identity):
            found.append((prefix + name, module))
    return found


def _layer(module: nn.Module) -> Layer | str:
    """Return the layer, or what is wrong and what would do instead."""
    kind = type(module)
    if kind in _SIMPLE:
        return {"layer": _SIMPLE[kind]}
    match module:
        case nn.Linear() if kind is nn.Linear:
            bias = int(module.bias is not None)
            return {"layer": "linear", "in": module.in_features, "out": module.out_features, "bias": bias}
        case nn.GELU():
            if module.approximate != "none":
                return "the tanh approximation is not in the list; use GELU()"
            return {"layer": "gelu"}
        case nn.Flatten():
            if (module.start_dim, module.end_dim) != (1, -1):
                return "only Flatten(1, -1) is in the list"
            return {"layer": "flatten"}
        case Reshape():
            return {"layer": "reshape", "shape": list(module.shape)}
        case nn.Unflatten():
            if module.dim != 1:
                return "only Unflatten(1, shape) is in the list"
            return {"layer": "reshape", "shape": [int(size) for size in module.unflattened_size]}
        case nn.Conv2d() if kind is nn.Conv2d:
            return _conv2d(module)
        case nn.MaxPool2d() | nn.AvgPool2d():
            return _pool2d(module)
        case nn.LayerNorm():
            return _layer_norm(module)
        case nn.GroupNorm():
            if module.eps != NORM_EPS or not module.affine:
                return f"only eps {NORM_EPS} with weight and bias is in the list"
            return {"layer": "group_norm", "groups": module.num_groups, "channels": module.num_channels}
        case nn.Embedding() if kind is nn.Embedding:
            if module.padding_idx is not None or module.max_norm is not None:
                return "padding_idx and max_norm are not in the list"
            return {"layer": "embedding", "count": module.num_embeddings, "size": module.embedding_dim}
        case SiteIntercept():
            sites, out = module.weight.shape
            return {"layer": "site_intercept", "sites": sites, "out": out}
        case _:
            instead = _INSTEAD.get(kind.__name__, "layers that are")
            return f"is not in the closed set; use {instead}"


_SIMPLE: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}


def _square(value: Any) -> int | None:
    if isinstance(value, int):
        return value
    if isinstance(value, tuple) and len(value) == 2 and value[0] == value[1] and isinstance(value[0], int):
        return value[0]
    return None


def _conv2d(module: nn.Conv2d) -> Layer | str:
    kernel, stride, padding = _square(module.kernel_size), _square(module.stride), _square(module.padding)
    if kernel is None or stride is None or padding is None:
        return "kernel, stride and padding must be square whole numbers"
    if module.groups != 1 or _square(module.dilation) != 1 or module.padding_mode != "zeros":
        return "groups, dilation and padding modes other than zeros are not in the list"
    if module.bias is None:
        return "a Conv2d without bias is not in the list; leave bias on"
    return {
        "layer": "conv2d",
        "in": module.in_channels,
        "out": module.out_channels,
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
    }


def _pool2d(module: nn.MaxPool2d | nn.AvgPool2d) -> Layer | str:
    kernel, stride, padding = _square(module.kernel_size), _square(module.stride), _square(module.padding)
    if kernel is None or stride != kernel or padding != 0 or module.ceil_mode:
        return "only a square kernel with the same stride and no padding is in the list"
    if isinstance(module, nn.MaxPool2d):
        return (
            {"layer": "max_pool2d", "kernel": kernel}
            if module.dilation == 1
            else "dilation is not in the list"
        )
    return {"layer": "avg_pool2d", "kernel": kernel}


def _layer_norm(module: nn.LayerNorm) -> Layer | str:
    plain = module.eps == NORM_EPS and module.elementwise_affine and module.bias is not None
    if not plain or len(module.normalized_shape) != 1:
        return f"only one axis, eps {NORM_EPS}, with weight and bias is in the list"
    return {"layer": "layer_norm", "size": int(module.normalized_shape[0])}
