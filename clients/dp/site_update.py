"""The mechanism where the unit is the site: ordinary training, then one bound and one noise on all of it.

Nothing bounds a row here. The site trains as it likes from the round's model, and what it sends is the
difference of weights, drawn into a ball, rounded, with its share of the noise. Whatever its rows are, two
such differences are no further apart than the ball is wide; how many rows there are decides the steps'
average and leaves the site in no other way. A difference that is not a finite number is sent as zeros: a
refusal would tell of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clients.dp.errors import TermsError
from clients.dp.losses import Loss, loss_sum
from clients.dp.mechanism import Mechanism, MechanismTerms, Recorder
from clients.dp.randomness import SecureRandom

_BLOCK = 1024  # rows whose activations are in memory at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTraining:
    """Gradient descent on the site's own rows, on their mean loss."""

    steps: int
    learning_rate: float
    proximal: float = 0.0  # FedProx's mu: each step is also drawn back towards the round's model

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 100_000:
            raise TermsError("local_steps", self.steps, "give a whole number from 1 to 100000")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise TermsError("local_learning_rate", self.learning_rate, "give a positive number")
        if not 0 <= self.proximal * self.learning_rate <= 1:
            raise TermsError("proximal", self.proximal, "give 0 to 1 / local_learning_rate")


class SiteMechanism(Mechanism):
    """Noised releases of one site's whole update; `terms.max_grad_norm` is the bound on its length.

    Args:
        model, terms, loss, random, recorder: as for `Mechanism`; one noised step of every row.
        training: what happens before the bound.

    Raises:
        TermsError: the terms sample rows, or let several noised steps make a release.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: MechanismTerms,
        loss: Loss,
        training: LocalTraining,
        *,
        random: SecureRandom | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        if terms.sample_rate != 1 or terms.local_steps != 1 or terms.rows_per_unit != 1:
            raise TermsError("local_steps", terms.local_steps, "give one noised step over all of a site")
        if terms.max_update_norm is not None:
            raise TermsError("max_update_norm", terms.max_update_norm, "the unit's own bound is the site's")
        super().__init__(model, terms, loss, random=random, recorder=recorder)
        self._training, self._loss = training, loss

    def prepare(self, sets: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Prepare nothing: what can be made for several sites in one pass are sums of gradients."""
        self._prepared.clear()

    def _sum(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the difference of weights that the site's own training makes."""
        base = self._weights()
        try:
            trained = plain_training(self._model, self._loss, inputs, targets, self._training)
        finally:
            self._set(base)
        return trained - base

    def _bounded(self, total: Tensor) -> Tensor:
        """Return the whole update, at most the unit's bound long, whatever it is."""
        return drawn_in(total, float(self.terms.max_grad_norm))


def plain_training(
    model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, training: LocalTraining
) -> Tensor:
    """Return the weights after `training` from the model's own, float64 in `parameters()` order.

    Rows that cannot be used (NaN, a class that is none) are left out; without any the weights stay. The model
    is left with the weights that are returned.
    """
    parameters = [value for value in model.parameters() if value.requires_grad]
    inputs = inputs.to(parameters[0].dtype) if inputs.is_floating_point() else inputs
    if len(inputs):
        usable = _usable(loss, inputs, targets, _outputs_of(model, inputs))
        inputs, targets = inputs[usable], targets[usable]
    base = [value.detach().clone() for value in parameters]
    for _ in range(training.steps if len(inputs) else 0):
        total = [torch.zeros_like(value) for value in parameters]
        for start in range(0, len(inputs), _BLOCK):
            rows = slice(start, start + _BLOCK)
            found = torch.autograd.grad(
                loss_sum(loss, model(inputs[rows]), targets[rows]), parameters, materialize_grads=True
            )
            total = [sum_ + part for sum_, part in zip(total, found, strict=True)]
        with torch.no_grad():
            for value, sum_, first in zip(parameters, total, base, strict=True):
                pull = training.proximal * (value - first)
                value.sub_(training.learning_rate * (sum_ / len(inputs) + pull))
    return torch.cat([value.detach().flatten() for value in parameters]).to(torch.float64)


def drawn_in(update: Tensor, bound: float) -> Tensor:
    """Return the update, at most `bound` long; zeros where it is no finite number."""
    values = update.to(torch.float64)
    largest = float(values.abs().max()) if len(values) else 0.0
    if not math.isfinite(largest):
        return torch.zeros_like(values)
    if largest == 0.0:
        return values
    norm = largest * float(torch.linalg.vector_norm(values / largest))  # no square overflows or vanishes
    return values if norm <= bound else values / largest * (bound / (norm / largest))


def _outputs_of(model: nn.Module, inputs: Tensor) -> int:
    """How many outputs the model has for one row, by a row of zeros."""
    with torch.no_grad():
        return int(model(torch.zeros((1, *inputs.shape[1:]), dtype=inputs.dtype)).shape[-1])


def _usable(loss: Loss, inputs: Tensor, targets: Tensor, outputs: int) -> Tensor:
    flat = inputs.reshape(len(inputs), -1)
    usable = torch.isfinite(flat).all(dim=1)
    if loss == "cross_entropy":
        return usable & (targets >= 0) & (targets < outputs)
    return usable & torch.isfinite(targets.reshape(len(targets), -1)).all(dim=1)
