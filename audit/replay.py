"""Aggregation, defined: from the sites' integer updates to the next weights, in float64, in one fixed order.

Anyone who repeats these operations gets the same bits, so a round can be replayed from its update files.
Sites come in the order of their names; every sum runs left to right from 0.0; no compensated or parallel
summation. The optimiser formulas are those of Flower's FedAvg, FedAdam and FedYogi on the pseudo-gradient
d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from audit.decimals import parse_decimal
from audit.errors import AuditError

STRATEGIES: Final = ("fedavg", "fedadam", "fedyogi")


class ReplayError(AuditError):
    """The updates cannot be aggregated under the plan."""

    code = "audit.replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregationPlan:
    """What a charter fixes about aggregation."""

    strategy: str
    is_gradient: bool  # local_steps == 1: sites release sums of gradients, not differences of weights
    learning_rate: float
    beta1: float
    beta2: float
    tau: float
    scale: float  # grid units for one unit of gradient: 2**grid_bits / max_grad_norm
    sample_rate: float
    average_last: int

    @classmethod
    def of_charter(cls, charter: Any) -> AggregationPlan:
        """Read the plan from a charter's canonical JSON values."""
        plan, privacy = charter["plan"], charter["privacy"]
        return cls(
            strategy=plan["strategy"],
            is_gradient=plan["local_steps"] == 1,
            learning_rate=float(parse_decimal(plan["learning_rate"])),
            beta1=float(parse_decimal(plan["beta1"])),
            beta2=float(parse_decimal(plan["beta2"])),
            tau=float(parse_decimal(plan["tau"])),
            scale=grid_scale(privacy["grid_bits"], privacy["max_grad_norm"]),
            sample_rate=float(parse_decimal(privacy["sample_rate"])),
            average_last=plan["average_last"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteUpdate:
    """One site's released integers, and the charter's constants for that site."""

    site: str
    nominal_rows: int
    weight: float
    values: Sequence[int]


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
        """Return the weights after round `server_round` (1, 2, …).

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
    """Return d, the direction of ascent that the sites' updates give together, shape (dimension,)."""
    names = [update.site for update in updates]
    if not names or names != sorted(set(names)):
        raise ReplayError(f"updates must come once a site, in the order of the sites' names: {names}")
    total = 0.0
    for update in updates:
        total = total + update.weight
    acc = [0.0] * dimension
    for update in updates:
        if len(update.values) != dimension:
            raise ReplayError(f"{update.site}: {len(update.values)} values for {dimension} parameters")
        share = update.weight / total
        divisor = plan.scale * (update.nominal_rows * plan.sample_rate) if plan.is_gradient else plan.scale
        acc = [a + share * (float(s) / divisor) for a, s in zip(acc, update.values, strict=True)]
    return [-a for a in acc] if plan.is_gradient else acc


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
