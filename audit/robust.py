"""Rules of aggregation that a few lying sites cannot steer, defined in plain Python float64.

The arithmetic is that of Flower's Krum, MultiKrum, FedMedian and FedTrimmedAvg on the sites' updates. Sites
come in the order of their names, every sum runs left to right from 0.0, and that order decides ties, so that
a verifier rebuilds the same bits. `byzantine` is f, the number of lying sites a rule is to stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from audit.errors import AuditError

RULES: Final = ("mean", "krum", "multi_krum", "median", "trimmed_mean")
Vector = Sequence[float]


class RuleError(AuditError):
    """The rule cannot be applied to so many updates; `field` is the charter's key under `aggregation`."""

    code = "audit.aggregation_rule"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"aggregation.{field} {problem}")
        self.field, self.problem = field, problem


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregationRule:
    """What a charter says under `aggregation`; the default is what a charter without that key means."""

    name: str = "mean"
    byzantine: int = 0
    keep: int = 0  # updates that are averaged: 1 for krum, as declared for multi_krum, 0 (all) otherwise
    norm_bound: bool = False  # longer updates than clipping and noise allow count for nothing

    @classmethod
    def of_charter(cls, charter: Any) -> AggregationRule:
        """Read the rule from a charter's canonical JSON values."""
        found: Mapping[str, Any] | None = charter.get("aggregation")
        if found is None:
            return cls()
        return cls(
            name=found["rule"],
            byzantine=found["byzantine"],
            keep=found["keep"],
            norm_bound=found["norm_bound"] == 1,
        )


MEAN: Final = AggregationRule()


def check_rule(rule: AggregationRule, sites: int) -> None:
    """Check that a round of `sites` updates can stand the lying sites that the rule is declared for.

    Raises:
        RuleError: names the field and what it may be.

    Source: Blanchard et al. 2017, proposition 1 (krum: n > 2f + 2); Yin et al. 2018 (the others: n > 2f).
    """
    f = rule.byzantine
    if rule.name not in RULES:
        raise RuleError("rule", f"{rule.name!r} is none of {', '.join(RULES)}")
    if f < 0 or (rule.name == "mean" and f):
        raise RuleError("byzantine", f"is {f}; a mean stands no lying site, so it is 0 there and never below")
    krum = rule.name in ("krum", "multi_krum")
    least = 2 * f + (3 if krum else 1)
    if sites < least:
        raise RuleError(
            "byzantine", f"is {f}: {rule.name} then needs rounds of at least {least} sites, not {sites}"
        )
    kept = range(1, sites - f + 1) if rule.name == "multi_krum" else (int(rule.name == "krum"),)
    if rule.keep not in kept:
        raise RuleError("keep", f"is {rule.keep}; {rule.name} with {sites} sites takes {_shown(kept)}")


def chosen(rule: AggregationRule, vectors: Sequence[Vector]) -> list[int]:
    """Return the positions of the updates that krum or multi_krum averages, ascending; of all, elsewhere."""
    count = len(vectors)
    if rule.name not in ("krum", "multi_krum"):
        return list(range(count))
    distances = [[0.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i + 1, count):
            distances[i][j] = distances[j][i] = _square_distance(vectors[i], vectors[j])
    return select(rule, distances)


def select(rule: AggregationRule, distances: Sequence[Sequence[float]]) -> list[int]:
    """Return the positions that the rule keeps, given all squared distances: those of the lowest scores."""
    scores = krum_scores(distances, rule.byzantine)
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return sorted(order[: rule.keep])


def krum_scores(distances: Sequence[Sequence[float]], byzantine: int) -> list[float]:
    """Return each update's sum of squared distances to its n - f - 2 nearest others (at least one)."""
    count = len(distances)
    nearest = max(1, count - byzantine - 2)
    scores = []
    for i in range(count):
        total = 0.0
        for distance in sorted(distances[i][j] for j in range(count) if j != i)[:nearest]:
            total = total + distance
        scores.append(total)
    return scores


def combine(rule: AggregationRule, vectors: Sequence[Vector], weights: Sequence[float]) -> list[float]:
    """Return the aggregate of the sites' vectors, shape (dimension,).

    Args:
        vectors: one a site, in the order of the sites' names.
        weights: the charter's; they count among what a mean, krum or multi_krum averages. A median and a
            trimmed mean count every site alike.

    Raises:
        RuleError: there are too few vectors for the rule.
    """
    check_rule(rule, len(vectors))
    if rule.name == "median":
        return [_median(sorted(column)) for column in zip(*vectors, strict=True)]
    if rule.name == "trimmed_mean":
        return [_mean(sorted(column), rule.byzantine) for column in zip(*vectors, strict=True)]
    kept = chosen(rule, vectors)
    total = 0.0
    for i in kept:
        total = total + weights[i]
    acc = [0.0] * len(vectors[0])
    for i in kept:
        share = weights[i] / total
        acc = [a + share * v for a, v in zip(acc, vectors[i], strict=True)]
    return acc


def _square_distance(a: Vector, b: Vector) -> float:
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total = total + (x - y) * (x - y)
    return total


def _median(ordered: Vector) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _mean(ordered: Vector, cut: int) -> float:
    total = 0.0
    for value in ordered[cut : len(ordered) - cut]:
        total = total + value
    return total / (len(ordered) - 2 * cut)


def _shown(allowed: Sequence[int]) -> str:
    return str(allowed[0]) if len(allowed) == 1 else f"{allowed[0]} to {allowed[-1]}"
