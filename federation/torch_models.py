"""The layer list as a torch module, and its weights as model files.

Parameters are named and ordered as in `nn.Sequential` ("0.weight", "0.bias", "2.weight", …), which is also
the order of the flat vector in updates and in `audit.weights` files. Attention: this module imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from audit.layers import NORM_EPS, check_layers
from audit.models import model_file, weights_of_file
from federation.errors import LayerError
from federation.families import Layer
from federation.flat import Vector

DTYPES: Final = {"float64": torch.float64, "float32": torch.float32}


class SiteIntercept(nn.Module):
    """Adds `weight[site]` to its input; without a site, the mean row. `weight` has shape (sites, out)."""

    site: int | None

    def __init__(self, sites: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(sites, out))
        self.site = None

    def forward(self, x: Tensor, site: int | Tensor | None = None) -> Tensor:
        """Return x + weight[site], x of shape (n, out); `site` an index or one index a row."""
        chosen = self.site if site is None else site
        return x + (self.weight.mean(0) if chosen is None else self.weight[chosen])


class Reshape(nn.Module):
    """Gives every example the declared shape."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.shape)


class LayerModel(nn.Sequential):
    """A torch model of a layer list; `model(x)`, or `model(x, site)` where it has an intercept per site."""

    def forward(self, x: Tensor, site: int | Tensor | None = None) -> Tensor:
        for module in self:
            if isinstance(module, SiteIntercept):
                x = module(x, site)
            elif isinstance(module, nn.Embedding):
                x = module(x.long())
            else:
                x = module(x)
        return x


def build_model(
    layers: Sequence[Layer], *, precision: str = "float64", site: int | None = None
) -> LayerModel:
    """Return the model with unset weights; `site` is the row a `SiteIntercept` uses (index in sorted site
    names).

    Raises:
        audit.layers.ModelError: the list is not a model.
    """
    check_layers(layers)
    model = LayerModel(*[_module(layer) for layer in layers]).to(DTYPES[precision])
    for module in model:
        if isinstance(module, SiteIntercept):
            if site is not None and not 0 <= site < module.weight.shape[0]:
                raise LayerError(
                    None, f"site {site} of {module.weight.shape[0]}", "give the index in the charter"
                )
            module.site = site
    return model


def _module(layer: Layer) -> nn.Module:
    match layer["layer"]:
        case "linear":
            return nn.Linear(layer["in"], layer["out"], bias=bool(layer["bias"]))
        case "relu":
            return nn.ReLU()
        case "tanh":
            return nn.Tanh()
        case "sigmoid":
            return nn.Sigmoid()
        case "gelu":
            return nn.GELU()
        case "flatten":
            return nn.Flatten()
        case "reshape":
            return Reshape(layer["shape"])
        case "conv2d":
            return nn.Conv2d(
                layer["in"], layer["out"], layer["kernel"], stride=layer["stride"], padding=layer["padding"]
            )
        case "max_pool2d":
            return nn.MaxPool2d(layer["kernel"])
        case "avg_pool2d":
            return nn.AvgPool2d(layer["kernel"])
        case "layer_norm":
            return nn.LayerNorm(layer["size"], eps=NORM_EPS)
        case "group_norm":
            return nn.GroupNorm(layer["groups"], layer["channels"], eps=NORM_EPS)
        case "embedding":
            return nn.Embedding(layer["count"], layer["size"])
        case _:
            return SiteIntercept(layer["sites"], layer["out"])


def set_weights(model: nn.Module, flat: Sequence[float] | Vector) -> None:
    """Write a flat vector into the model's parameters, in their order."""
    vector = torch.as_tensor(flat, dtype=torch.float64)
    if vector.numel() != sum(p.numel() for p in model.parameters()):
        raise LayerError(None, f"{vector.numel()} numbers for another model", "use the charter's own weights")
    offset = 0
    with torch.no_grad():
        for parameter in model.parameters():
            count = parameter.numel()
            parameter.copy_(vector[offset : offset + count].reshape(parameter.shape))
            offset += count


def get_weights(model: nn.Module) -> list[float]:
    """Return the model's parameters as one flat list of float64."""
    return [value for p in model.parameters() for value in p.detach().double().reshape(-1).tolist()]


def load_model(
    layers: Sequence[Layer], data: bytes, *, precision: str = "float64", site: int | None = None
) -> LayerModel:
    """Build the model of `layers` with the weights of a model file.

    Raises:
        audit.weights.WeightsError: the bytes are not a model file.
        audit.layers.ModelError: another model's file.
    """
    model = build_model(layers, precision=precision, site=site)
    set_weights(model, weights_of_file(layers, data))
    return model


def dump_model(layers: Sequence[Layer], model: nn.Module) -> bytes:
    """Return the model file of a torch model's weights."""
    return model_file(layers, get_weights(model))
