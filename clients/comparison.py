"""The same recipe with the noise left out: what privacy costs in accuracy, on data that needs none.

NOT PRIVATE. Nothing here goes through an agent, a ledger or a log, and nothing can be registered: it reads
the rows of every site in one process, which no federation may. Clipping stays, so that only the noise
differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from audit.models import initial_weights
from audit.replay import AggregationPlan, Aggregator, SiteUpdate
from clients.dp.bookkeeping import ClippedGradient
from clients.dp.site_update import drawn_in, plain_training
from clients.loader import load_training_data
from clients.local_layers import moved_locally, overlaid, shared_values
from clients.terms import Terms, read_terms
from clients.trainer import local_training, targets_of
from federation.charter import Charter
from federation.torch_models import build_model, set_weights


class UnprotectedSite:
    """One site's rows, clipped and summed, without noise."""

    def __init__(self, terms: Terms, path: Path) -> None:
        data = load_training_data(path, terms)
        self._terms = terms
        self._inputs = torch.from_numpy(data.inputs)
        self._targets = targets_of(data, terms)
        self._model = build_model([dict(layer) for layer in terms.layers], site=terms.site_index)
        self._gradient = ClippedGradient(self._model, terms.max_grad_norm, terms.loss)
        self._scale = 2.0**terms.event.grid_bits / terms.max_grad_norm
        self.local: list[float] | None = None  # layers that stay here

    def update(self, weights: list[float]) -> list[int]:
        terms = self._terms
        if self.local is not None:
            weights = overlaid(terms.spans, weights, self.local)
        set_weights(self._model, weights)
        expected = float(terms.sample_rate)
        if terms.by_site:
            trained = plain_training(
                self._model, terms.loss, self._inputs, self._targets, local_training(terms)
            )
            moved = drawn_in(trained - torch.tensor(weights, dtype=torch.float64), terms.max_grad_norm)
        elif terms.local_steps == 1:
            moved = self._gradient(self._inputs, self._targets) * expected
        else:
            theta = torch.tensor(weights, dtype=torch.float64)
            for _ in range(terms.local_steps):
                step = self._gradient(self._inputs, self._targets) * expected / terms.normaliser
                pull = terms.proximal * (theta - torch.tensor(weights, dtype=torch.float64))
                theta = theta - terms.local_learning_rate * (step + pull)
                set_weights(self._model, theta.tolist())
            moved = theta - torch.tensor(weights, dtype=torch.float64)
        grid: list[int] = np.rint(moved.numpy() * self._scale).astype(np.int64).tolist()
        if terms.spans:
            self.local = moved_locally(terms, self._scale, weights, grid)
        return shared_values(terms.spans, grid)


def train_without_privacy(charter: Charter, files: Mapping[str, Path]) -> list[list[float]]:
    """Return the weights after each round of the charter's plan, without noise. NOT PRIVATE.

    Raises:
        DataFileError: a file as a whole cannot serve.
    """
    canonical = charter.canonical().decode()
    sites = {name: UnprotectedSite(read_terms(canonical, site=name), files[name]) for name in sorted(files)}
    aggregator = Aggregator(AggregationPlan.of_charter(charter.document))
    members = {member["name"]: member for member in charter.document["sites"]}
    weights = initial_weights(list(charter.layers), charter.digest)
    after: list[list[float]] = []
    for number in range(1, charter.plan.rounds + 1):
        updates = [
            SiteUpdate(
                site=name,
                nominal_rows=members[name]["nominal_rows"],
                weight=float(members[name]["weight"]),
                values=site.update(weights),
            )
            for name, site in sites.items()
        ]
        weights = list(aggregator.step(number, weights, updates))
        after.append(weights)
    return after
