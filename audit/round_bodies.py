"""The bodies that say how a round's updates looked, who was left out, and what a model was found worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    name: str
    value: str
    source: str  # "public_set" | "private_release"
    dataset: str  # digest of the public set; of a private release, zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResumed:
    """A coordinator took a run up again; everything it goes on from is in the log, and named here."""

    run: str
    charter: str
    round: int  # the round that comes next; one more than the last one's when only the end is left
    previous_round: str  # leaf hash of the last round's entry, completed or abandoned; zeros for round 1
    base_model: str  # the weights that the last completed round left, or the charter's initial ones
    principal: str  # who resumed it, as the coordinator says


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRefused:
    """A release that arrived, and counts for nothing in its round; it stays debited."""

    run: str
    round: int
    site: str
    update: str  # digest
    statement: str  # leaf hash of the site.undelivered that holds what the site signed
    reason: str  # "norm_bound"
    norm: str  # grid units, rounded down
    bound: str  # grid units; see audit.update_bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundExamined:
    """How a round's updates look beside each other, for the officer; `audit.anomaly` makes it again."""

    run: str
    round: int
    digest: str  # of the document
    apart: tuple[str, ...]  # sites that stand apart


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvaluated:
    """What the run's averaged weights are worth by counts that the sites released with noise."""

    run: str
    round: int  # one after the last
    weights: str
    statements: tuple[str, ...]  # leaf hashes, in the order of the sites' names
    missing: tuple[str, ...]
    metrics: tuple[Metric, ...]
    baseline: str  # the share of the largest class, by the same counts
    spread: str  # standard deviation of the accuracy that the noise alone makes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReferenced:
    """The sketch of the run's training rows, by counts that the sites released with noise."""

    run: str
    round: int  # one after the last, or after the evaluation
    statements: tuple[str, ...]  # leaf hashes, in the order of the sites' names
    missing: tuple[str, ...]
    sketch: str  # digest of the sketch's file; "" where too few sites counted


RoundBody = UpdateRefused | RoundExamined | RunEvaluated | RunReferenced | RunResumed

ROUND_TYPES: Final[dict[str, type[Any]]] = {
    "update.refused": UpdateRefused,
    "round.examined": RoundExamined,
    "run.evaluated": RunEvaluated,
    "run.referenced": RunReferenced,
    "run.resumed": RunResumed,
}
