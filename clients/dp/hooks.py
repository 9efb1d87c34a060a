"""Per-example gradients for the layers `layers` does not know, through Opacus's `GradSampleModule`.

Slower, and memory grows with batch times parameters; loaded only when a model needs it.
"""

from __future__ import annotations

import copy

import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from clients.dp.errors import UnsupportedModelError
from clients.dp.layers import refuse_in_place
from clients.dp.losses import OutputGradient


class HookPass:
    """A forward and backward pass of a private copy that keeps one gradient per example and parameter."""

    def __init__(self, model: nn.Module, views: dict[str, Tensor], gradient: OutputGradient) -> None:
        memo: dict[int, object] = {
            id(value): nn.Parameter(value.detach(), requires_grad=value.requires_grad)
            for value in model.parameters()
        }
        memo |= {id(value): value for value in model.buffers()}
        private = copy.deepcopy(model, memo)
        was_training = private.training
        refuse_in_place(private)
        problems = ModuleValidator.validate(private.train(), strict=False)
        if problems:
            raise UnsupportedModelError("model", "; ".join(str(problem) for problem in problems))
        for module in private.modules():
            if not list(module.parameters()):
                module.train(was_training)  # the hooks only work in training mode; dropout keeps the caller's
        try:
            self._module = GradSampleModule(private, loss_reduction="sum")
        except NotImplementedError as error:
            raise UnsupportedModelError("model", str(error)) from error
        self._gradient = gradient
        named = dict(private.named_parameters())
        self._pairs = [(named[name], view) for name, view in views.items()]

    def square_norms(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        self._forget()
        if inputs.is_floating_point():
            inputs = inputs.detach().requires_grad_()  # backward hooks warn when no input asks for a gradient
        with torch.enable_grad():
            outputs = self._module(inputs)
        with torch.no_grad():
            start = self._gradient(outputs.detach(), targets)
        outputs.backward(start)
        with torch.no_grad():
            norms = [
                torch.linalg.vector_norm(sample.flatten(1), dim=1).square_() for sample, _ in self._samples()
            ]
            return torch.stack(norms).sum(0), None

    def accumulate(self, factors: Tensor) -> None:
        for sample, view in self._samples():
            view.view(-1).addmv_(sample.flatten(1).t(), factors)
        self._forget()

    def _samples(self) -> list[tuple[Tensor, Tensor]]:
        found = []
        for parameter, view in self._pairs:
            sample = getattr(parameter, "grad_sample", None)
            if isinstance(sample, list):
                sample = torch.stack(sample).sum(0)
            if sample is not None:
                found.append((sample, view))
        return found

    def _forget(self) -> None:
        for parameter, _ in self._pairs:
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
