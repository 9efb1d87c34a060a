"""A site's part in federated evaluation: held-out rows counted by true and called class, with noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from audit.private_evaluation import GRID_BITS, Evaluation
from clients.dp.randomness import SecureRandom
from clients.loader import TrainingData
from clients.terms import Terms
from federation.torch_models import build_model, set_weights


def noisy_counts(
    evaluation: Evaluation,
    terms: Terms,
    weights: Sequence[float],
    data: TrainingData,
    *,
    random: SecureRandom | None = None,
) -> list[int]:
    """Return the flat matrix of counts, true class by row, in grid units, with noise in every cell.

    A row whose output is not finite counts nowhere. The model is used as the charter's public set is judged:
    without the site's own intercept, for that is the version everybody gets.

    Args:
        data: the held-out rows; how many there are is never released but through the counts.
    """
    counts = true_counts(evaluation, terms, weights, data)
    noise = (random or SecureRandom()).discrete_gaussian(evaluation.event.sigma_grid, counts.size)
    released: list[int] = ((counts << GRID_BITS) + noise).tolist()
    return released


def true_counts(
    evaluation: Evaluation, terms: Terms, weights: Sequence[float], data: TrainingData
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the flat matrix of counts; it never leaves the site.

    Rows go through the model one by one: in a batch, the last bit of one row's output can depend on how many
    others there are, and a model can be chosen whose calls hang on that bit.
    """
    model = build_model([dict(layer) for layer in terms.layers])
    set_weights(model, weights)
    model.eval()
    with torch.inference_mode():
        outputs = [model(row.unsqueeze(0)).flatten() for row in torch.from_numpy(data.inputs)]
    counts = np.zeros(evaluation.classes**2, dtype=np.int64)
    for label, output in zip(data.targets.astype(np.int64).tolist(), outputs, strict=True):
        if bool(torch.isfinite(output).all()):
            called = int(output[0] >= 0) if len(output) == 1 else int(output.argmax())
            counts[label * evaluation.classes + called] += 1
    return counts
