"""What one round's updates look like beside each other: lengths, directions, and who stands apart.

Made from released, noised updates and charter constants alone: post-processing, free of further privacy
cost. It is a reading aid for officers; no update is refused for it. A site whose people are unlike the
others' stands apart as a lying one does, and where noise is larger than what sites learn, nobody does.

The definition is plain Python float64 in a fixed order, so that a verifier makes the same document again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from audit.decimals import rounded_text
from audit.errors import AuditError

APART: Final = 4.0  # deviations from the median distance, beyond which a site is marked
LEAST_EXCESS: Final = 1.25  # and at least so many times the median distance
_MAD: Final = 1.4826  # median absolute deviation to standard deviation, for normal values
_SMALL: Final = 0.02  # least spread of distances taken for real, relative to their median

Row = TypeVar("Row")


class AnomalyError(AuditError):
    """There is nothing to compare."""

    code = "audit.anomaly"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    """Constants of one site's release."""

    site: str
    bound: float  # the charter's norm bound, in the unit of the vectors
    noise: float  # standard deviation of one coordinate, in the same unit


def plain_dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the inner product, summed left to right."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    return total


def examine(
    server_round: int,
    facts: Sequence[SiteFacts],
    vectors: Sequence[Row],
    dimension: int,
    dot: Callable[[Row, Row], float],
) -> dict[str, Any]:
    """Return the round's document: sites, a cosine matrix, and for each site its length and its distance.

    `length` is relative to the norm bound. `distance` is the median, over the other sites, of how far
    apart the two updates are relative to what their noise alone would make: about 1 where sites learn alike
    or noise drowns what they learn. `cosine` is the median of a site's cosines with the others. A site is
    `apart` when its distance passes the median site's by `APART` robust deviations and `LEAST_EXCESS` times,
    or when its cosine is below minus three of what noise alone gives while the other sites agree beyond it.
    Numbers are decimal text of six places.

    Args:
        vectors: one a site, in the order of the sites' names, of `dimension` numbers.
        dot: the inner product of two of them, left to right.

    Raises:
        AnomalyError: no update.
    """
    count = len(vectors)
    if not count:
        raise AnomalyError(f"round {server_round} has no update to examine")
    gram = [[0.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i, count):
            gram[i][j] = gram[j][i] = dot(vectors[i], vectors[j])
    cosines = [[_cosine(gram, i, j) for j in range(count)] for i in range(count)]
    directions = [_median([cosines[i][j] for j in range(count) if j != i]) for i in range(count)]
    distances = [
        _median([_distance(gram, facts, i, j, dimension) for j in range(count) if j != i])
        for i in range(count)
    ]
    apart = _apart(distances, directions, dimension)
    return {
        "round": server_round,
        "sites": [fact.site for fact in facts],
        "cosines": [[rounded_text(value) for value in row] for row in cosines],
        "length": [rounded_text(math.sqrt(gram[i][i]) / facts[i].bound) for i in range(count)],
        "distance": [rounded_text(value) for value in distances],
        "cosine": [rounded_text(value) for value in directions],
        "apart": [facts[i].site for i in apart],
    }


def _cosine(gram: Sequence[Sequence[float]], i: int, j: int) -> float:
    lengths = math.sqrt(gram[i][i]) * math.sqrt(gram[j][j])
    return 0.0 if lengths == 0.0 else gram[i][j] / lengths


def _distance(
    gram: Sequence[Sequence[float]], facts: Sequence[SiteFacts], i: int, j: int, dimension: int
) -> float:
    square = max(0.0, gram[i][i] + gram[j][j] - 2.0 * gram[i][j])
    return math.sqrt(square / (dimension * (facts[i].noise ** 2 + facts[j].noise ** 2)))


def _apart(distances: Sequence[float], directions: Sequence[float], dimension: int) -> list[int]:
    if len(distances) < 4:
        return []  # with three sites nobody can say which of two is the odd one
    middle = _median(distances)
    spread = max(_MAD * _median([abs(value - middle) for value in distances]), _SMALL * middle)
    by_noise = 3.0 / math.sqrt(dimension)
    agree = _median(directions) > by_noise
    return [
        i
        for i, (distance, cosine) in enumerate(zip(distances, directions, strict=True))
        if (distance > middle + APART * spread and distance > LEAST_EXCESS * middle)
        or (agree and cosine < -by_noise)
    ]


def _median(values: Sequence[float]) -> float:
    if not values:
        return 0.0
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2.0
