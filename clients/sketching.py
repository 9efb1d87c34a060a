"""A site's part in the reference sketch: training rows counted by feature and declared bin, with noise."""

from __future__ import annotations

import numpy as np

from audit.reference import GRID_BITS, Reference, row_bins
from clients.dp.randomness import SecureRandom
from clients.loader import TrainingData
from clients.terms import Terms


def noisy_sketch(
    reference: Reference, terms: Terms, data: TrainingData, *, random: SecureRandom | None = None
) -> list[int]:
    """Return the flat counts, feature after feature, in grid units, with noise in every bin.

    Args:
        data: the rows that are trained on; how many there are is never released but through the counts.
    """
    counts = true_sketch(reference, terms, data)
    noise = (random or SecureRandom()).discrete_gaussian(reference.event.sigma_grid, counts.size)
    released: list[int] = ((counts << GRID_BITS) + noise).tolist()
    return released


def true_sketch(
    reference: Reference, terms: Terms, data: TrainingData
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the flat counts; they never leave the site. A row counts in at most one bin of each feature."""
    counts = np.zeros(reference.event.dimension, dtype=np.int64)
    for row in data.inputs.tolist():
        for place in row_bins(terms.features, reference.widths, row):
            counts[place] += 1
    return counts
