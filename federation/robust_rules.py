"""The aggregation rules of `audit.robust` in numpy: the same operations in the same order, the same bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np

from audit.robust import AggregationRule, check_rule, select

Vector: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


def combine(rule: AggregationRule, vectors: Iterable[Vector], weights: Sequence[float]) -> Vector:
    """Return the aggregate of one vector a site, shape (dimension,), exactly as `audit.robust` defines it.

    Under a mean the vectors are taken one at a time, so that a large model's updates need not all be held.

    Raises:
        RuleError: there are too few vectors for the rule.
    """
    if rule.name == "mean":
        return _mean(vectors, weights)
    rows = list(vectors)
    check_rule(rule, len(rows))
    if rule.name in ("krum", "multi_krum"):
        kept = select(rule, square_distances(rows))
        return _mean((rows[i] for i in kept), [weights[i] for i in kept])
    ordered: Vector = np.sort(np.stack(rows), axis=0)
    count = len(rows)
    if rule.name == "median":
        middle = count // 2
        median: Vector = ordered[middle] if count % 2 else (ordered[middle - 1] + ordered[middle]) / 2
        return median
    total: Vector = np.zeros_like(rows[0])
    for row in ordered[rule.byzantine : count - rule.byzantine]:
        total = total + row
    return total / (count - 2 * rule.byzantine)


def square_distances(rows: Sequence[Vector]) -> list[list[float]]:
    """Return all squared distances, shape (sites, sites), each summed left to right."""
    found = [[0.0] * len(rows) for _ in rows]
    for i, j in combinations(range(len(rows)), 2):
        found[i][j] = found[j][i] = left_to_right((rows[i] - rows[j]) * (rows[i] - rows[j]))
    return found


def left_to_right(terms: Vector) -> float:
    """Return the sum of `terms` from the first to the last; `np.sum` would add in pairs."""
    return float(np.cumsum(terms)[-1])


def spread(spans: Sequence[tuple[int, int]], shared: Vector, dimension: int) -> Vector:
    """Return the flat vector that has `shared` in the ranges of `spans` and 0.0 elsewhere."""
    if not spans:
        return shared
    flat: Vector = np.zeros(dimension)
    offset = 0
    for start, stop in spans:
        flat[start:stop] = shared[offset : offset + stop - start]
        offset += stop - start
    return flat


def _mean(vectors: Iterable[Vector], weights: Sequence[float]) -> Vector:
    total = 0.0
    for weight in weights:
        total = total + weight
    acc: Vector | None = None
    for weight, vector in zip(weights, vectors, strict=True):
        share = weight / total
        acc = (np.zeros_like(vector) if acc is None else acc) + share * vector
    if acc is None:
        raise ValueError("no vector to average")
    return acc
