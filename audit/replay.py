"""Aggregation, defined: from the sites' integer updates to the next weights, in float64, in one fixed order.

Anyone who repeats these operations gets the same bits, so a round can be replayed from its update files.
Sites come in the order of their names; every sum runs left to right from 0.0; no compensated or parallel
summation. The optimiser formulas are those of Flower's FedAvg, FedAdam and FedYogi on the pseudo-gradient
d.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from audit.decimals import parse_decimal
from audit.errors import AuditError
from audit.layers import shared_spans
from audit.robust import MEAN, AggregationRule, combine

STRATEGIES: Final = ("fedavg", "fedadam", "fedyogi")


class ReplayError(AuditError):
    """The updates cannot be aggregated under the plan."""

    code = "audit.replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregationPlan:
    """What a charter fixes about aggregation."""

    strategy: str
    is_gradient: bool  # one noised step a round: sums of gradients are released, not differences of weights
    learning_rate: float
    beta1: float
    beta2: float
    tau: float
    scale: float  # grid units for one unit of the norm that bounds a contribution: 2**grid_bits / norm
    sample_rate: float
    average_last: int
    rule: AggregationRule = MEAN
    spans: tuple[tuple[int, int], ...] = ()  # of the flat vector, what sites release; empty: all of it
    by_site: bool = False  # the unit is the site: each counts once, and the sum is divided by their number

    @classmethod
    def of_charter(cls, charter: Any) -> AggregationPlan:
        """Read the plan from a charter's canonical JSON values."""
        plan, privacy, model = charter["plan"], charter["privacy"], charter["model"]
        local = model.get("local_layers", ())
        return cls(
            strategy=plan["strategy"],
            is_gradient=plan["local_steps"] == 1 and privacy["unit"] != "site",
            learning_rate=float(parse_decimal(plan["learning_rate"])),
            beta1=float(parse_decimal(plan["beta1"])),
            beta2=float(parse_decimal(plan["beta2"])),
            tau=float(parse_decimal(plan["tau"])),
            scale=grid_scale(privacy["grid_bits"], norm_text(privacy)),
            sample_rate=float(parse_decimal(privacy["sample_rate"])),
            average_last=plan["average_last"],
            rule=AggregationRule.of_charter(charter),
            spans=shared_spans(model["layers"], local) if local else (),
            by_site=privacy["unit"] == "site",
        )

    def released(self, dimension: int) -> int:
        """Return how many numbers an update has for a model of `dimension` parameters."""
        return sum(stop - start for start, stop in self.spans) or dimension

    def divisor(self, nominal_rows: int) -> float:
        """Return what a site's integers are divided by before they are combined.

        Where the unit is the site, each has one nominal row, and a masked sum as many as sites in it.
        """
        if self.by_site:
            return self.scale * nominal_rows
        return self.scale * (nominal_rows * self.sample_rate) if self.is_gradient else self.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteUpdate:
    """One site's released integers, and the charter's constants for that site."""

    site: str
    nominal_rows: int
    weight: float
    values: Sequence[int]


def norm_text(privacy: Any) -> str:
    """Return the norm that one unit's contribution is clipped to, from a charter's canonical terms."""
    return str(privacy["max_update_norm" if privacy["unit"] == "site" else "max_grad_norm"])


def grid_scale(grid_bits: int, max_grad_norm: str) -> float:
    """Return 2**grid_bits / max_grad_norm in float64: grid units for one unit of gradient."""
    return 2.0**grid_bits / float(parse_decimal(max_grad_norm))


@dataclass(slots=True)
class Aggregator:
    """Replays rounds in order; holds the optimiser's state between them."""

    plan: AggregationPlan
    _m: list[float] = field(default_factory=list)
    _v: list[float] = field(default_factory=list)

    def step(self, server_round: int, weights: Sequence[float], updates: Sequence[SiteUpdate]) -> list[float]:
        """Return the weights after the `server_round`-th round that gave a model (1, 2, …).

        Raises:
            ReplayError: no updates, sites out of order, lengths that differ, or a result that is not finite.
        """
        d = pseudo_gradient(self.plan, updates, dimension=len(weights))
        plan = self.plan
        if plan.strategy == "fedavg":
            result = [x + plan.learning_rate * step for x, step in zip(weights, d, strict=True)]
        elif plan.strategy in STRATEGIES:
            result = self._adaptive(server_round, weights, d)
        else:
            raise ReplayError(f"no strategy is called {plan.strategy!r}; use one of {STRATEGIES}")
        if not all(map(math.isfinite, result)):
            raise ReplayError(f"round {server_round} gives weights that are not finite")
        return result

    def _adaptive(self, server_round: int, weights: Sequence[float], d: list[float]) -> list[float]:
        plan = self.plan
        beta1, beta2 = plan.beta1, plan.beta2
        m = self._m = [beta1 * a + (1 - beta1) * g for a, g in zip(self._m or [0.0] * len(d), d, strict=True)]
        before = self._v or [0.0] * len(d)
        if plan.strategy == "fedadam":
            v = [beta2 * a + (1 - beta2) * (g * g) for a, g in zip(before, d, strict=True)]
            eta = plan.learning_rate * math.sqrt(1 - beta2 ** (server_round + 1.0))
            eta = eta / (1 - beta1 ** (server_round + 1.0))
        else:
            v = [a - (1.0 - beta2) * (g * g) * _sign(a - g * g) for a, g in zip(before, d, strict=True)]
            eta = plan.learning_rate
        self._v = v
        return [
            x + eta * step / (math.sqrt(spread) + plan.tau)
            for x, step, spread in zip(weights, m, v, strict=True)
        ]


def pseudo_gradient(plan: AggregationPlan, updates: Sequence[SiteUpdate], *, dimension: int) -> list[float]:
    """Return d, the direction of ascent that the sites' updates give together, shape (dimension,).

    Coordinates of layers that stay at the sites are 0.0. Under a mean the sites' shares are added as they
    come; under every other rule `audit.robust` combines what each site's share would be added from.
    """
    names = [update.site for update in updates]
    if not names or names != sorted(set(names)):
        raise ReplayError(f"updates must come once a site, in the order of the sites' names: {names}")
    released = plan.released(dimension)
    for update in updates:
        if len(update.values) != released:
            raise ReplayError(f"{update.site}: {len(update.values)} values for {released} parameters")
    vectors = (
        [float(s) / divisor for s in update.values]
        for update in updates
        for divisor in (plan.divisor(update.nominal_rows),)
    )
    weights = [update.weight for update in updates]
    acc = (
        _mean(vectors, weights, released)
        if plan.rule.name == "mean"
        else combine(plan.rule, list(vectors), weights)
    )
    if plan.is_gradient:
        acc = [-a for a in acc]
    return spread(plan.spans, acc, dimension)


def spread(spans: Sequence[tuple[int, int]], shared: Sequence[float], dimension: int) -> list[float]:
    """Return the flat vector that has `shared` in the ranges of `spans` and 0.0 elsewhere."""
    if not spans:
        return list(shared)
    flat, offset = [0.0] * dimension, 0
    for start, stop in spans:
        flat[start:stop] = shared[offset : offset + stop - start]
        offset += stop - start
    return flat


def _mean(vectors: Iterable[Sequence[float]], weights: Sequence[float], size: int) -> list[float]:
    total = 0.0
    for weight in weights:
        total = total + weight
    acc = [0.0] * size
    for weight, vector in zip(weights, vectors, strict=True):
        share = weight / total
        acc = [a + share * v for a, v in zip(acc, vector, strict=True)]
    return acc


def average(models: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of weight vectors: a running sum in round order, then one division."""
    if not models:
        raise ReplayError("no rounds to average")
    total = list(models[0])
    for weights in models[1:]:
        total = [a + b for a, b in zip(total, weights, strict=True)]
    return [a / len(models) for a in total]


def _sign(value: float) -> float:
    return float((value > 0) - (value < 0))
