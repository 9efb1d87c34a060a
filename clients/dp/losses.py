"""The closed set of losses, by gradient at the model's output; each row has its own, nothing is averaged.

cross_entropy: targets (B,) whole numbers, outputs (B, classes). binary_cross_entropy: targets 0..1, outputs
are logits, (B,) or (B, 1). squared_error: half the squared distance, summed over outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from clients.dp.errors import ShapeError

Loss = Literal["cross_entropy", "binary_cross_entropy", "squared_error"]
OutputGradient = Callable[[Tensor, Tensor], Tensor]


def cross_entropy_gradient(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return softmax(outputs) - one_hot(targets); a row whose target names no class becomes NaN."""
    if outputs.dim() != 2 or targets.dim() != 1:
        raise ShapeError("outputs and targets", (outputs.dim(), targets.dim()), "(B, classes) and (B,)")
    gradient = torch.softmax(outputs, dim=1)
    index = targets if targets.dtype == torch.int64 else targets.long()
    low, high = torch.aminmax(index)
    if low < 0 or high >= outputs.shape[1]:
        outside = (index < 0) | (index >= outputs.shape[1])
        gradient = gradient.masked_fill(outside[:, None], torch.nan)
        index = index.masked_fill(outside, 0)
    ones = gradient.new_full((len(index), 1), -1.0)
    return gradient.scatter_add_(1, index[:, None], ones)


def binary_cross_entropy_gradient(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return sigmoid(outputs) - targets."""
    return torch.sigmoid(outputs) - _like(outputs, targets)


def squared_error_gradient(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return outputs - targets."""
    return outputs - _like(outputs, targets)


def _like(outputs: Tensor, targets: Tensor) -> Tensor:
    if targets.numel() != outputs.numel():
        raise ShapeError("targets", tuple(targets.shape), tuple(outputs.shape))
    return targets.to(outputs.dtype).reshape(outputs.shape)


OUTPUT_GRADIENTS: dict[Loss, OutputGradient] = {
    "cross_entropy": cross_entropy_gradient,
    "binary_cross_entropy": binary_cross_entropy_gradient,
    "squared_error": squared_error_gradient,
}


def loss_sum(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the rows' losses, differentiable: the definition of the gradients above."""
    if loss == "cross_entropy":
        return functional.cross_entropy(outputs, targets, reduction="sum")
    if loss == "binary_cross_entropy":
        return functional.binary_cross_entropy_with_logits(outputs, _like(outputs, targets), reduction="sum")
    return 0.5 * functional.mse_loss(outputs, _like(outputs, targets), reduction="sum")
