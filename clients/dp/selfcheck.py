"""The slow definition of a clipped gradient sum, and the comparison every model passes before its first row.

The comparison sees shapes and types only, never data: rows and weights are made up from fixed seeds, so
whether a model is refused depends on the charter alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from clients.dp.errors import DPError, UnsupportedModelError
from clients.dp.losses import Loss, loss_sum

Engine = Callable[[Tensor, Tensor], Tensor]

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}


def example_gradients(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return one flat gradient a row, shape (B, dimension), each from a forward pass of that row alone."""
    return torch.stack(list(gradient_of_each(model, loss, inputs, targets)))


def gradient_of_each(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """Yield the rows of `example_gradients` one by one: those of a large model do not fit side by side."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    for index in range(len(inputs)):
        value = loss_sum(loss, model(inputs[index : index + 1]), targets[index : index + 1])
        gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
        yield torch.cat([gradient.flatten() for gradient in gradients])


def check_against_definition(
    model: nn.Module, loss: Loss, like: Tensor, build: Callable[[nn.Module, float], Engine]
) -> None:
    """Compare `build`'s engine with the definition on 3, 5 and 1 made-up rows, some of them clipped.

    Raises:
        UnsupportedModelError: they differ, or the model cannot run on rows of this shape.
    """
    probe = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in probe.parameters():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * 0.3 + 0.1)
    engine: Engine | None = None
    for rows in (3, 5, 1):
        inputs = _made_up_rows(probe, like, rows, generator)
        try:
            outputs = probe(inputs)
            if outputs.dim() == 0 or len(outputs) != rows:
                raise UnsupportedModelError("model", f"gives {tuple(outputs.shape)} for {rows} rows")
            targets = _made_up_targets(loss, outputs, generator)
            norms = torch.stack([row.norm() for row in gradient_of_each(probe, loss, inputs, targets)])
            if engine is None:
                max_grad_norm = float(norms.median()) or 1.0
                engine = build(probe, max_grad_norm)
            factors = (max_grad_norm / norms).clamp(max=1)
            expected = torch.zeros(())
            for factor, row in zip(factors, gradient_of_each(probe, loss, inputs, targets), strict=True):
                expected = expected + factor * row
            found = engine(inputs, targets)
        except DPError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise UnsupportedModelError(
                "model", f"cannot run on rows of shape {tuple(like.shape[1:])}: {error}"
            ) from error
        error_norm = float((found - expected).norm())
        if not error_norm <= _TOLERANCE[found.dtype] * max(float(expected.norm()), max_grad_norm):
            raise UnsupportedModelError(
                "model",
                "rows have no gradients of their own: look for mixed rows, a moved batch axis, in-place",
            )


def _made_up_rows(model: nn.Module, like: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    shape = (rows, *like.shape[1:])
    counts = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if like.is_floating_point():
        return torch.rand(shape, generator=generator, dtype=like.dtype) * min(counts, default=1)
    return torch.randint(0, min(counts, default=2), shape, generator=generator).to(like.dtype)


def _made_up_targets(loss: Loss, outputs: Tensor, generator: torch.Generator) -> Tensor:
    if loss == "cross_entropy":
        return torch.randint(0, outputs.shape[-1], (len(outputs),), generator=generator)
    return torch.rand(outputs.shape, generator=generator, dtype=outputs.dtype)
