"""Metrics and the trivial baselines that a gate compares them with, in plain Python.

A gate counts only metrics that anyone can recompute: on the charter's public set, by these functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from audit.decimals import decimal_text, parse_decimal, rounded_text
from audit.entries import GateResult
from audit.errors import AuditError
from audit.models import probabilities, value_of

LOWER_IS_BETTER: Final = frozenset({"mae"})
METRICS_OF_TASK: Final = {
    "binary": ("auc", "accuracy"),
    "multiclass": ("accuracy",),
    "regression": ("r2", "mae"),
}
_TIE: Final = 1e-9  # scores nearer than this count as tied, so that the last bit of a float decides nothing


class MetricError(AuditError):
    """The metric is not defined for this task or these rows."""

    code = "audit.metric"


def auc(labels: Sequence[int], scores: Sequence[float]) -> float:
    """Return the area under the ROC curve; ties count one half.

    Raises:
        MetricError: lengths differ, a score is not finite, or only one class is present.
    """
    _check(labels, scores)
    positives = sum(labels)
    negatives = len(labels) - positives
    if not positives or not negatives or set(labels) - {0, 1}:
        raise MetricError("auc needs rows of both classes, labelled 0 and 1")
    order = sorted(range(len(scores)), key=scores.__getitem__)
    twice_rank_sum, start = 0, 0
    while start < len(order):
        end = start + 1
        while end < len(order) and scores[order[end]] - scores[order[end - 1]] <= _TIE:
            end += 1
        twice_rank_sum += (start + 1 + end) * sum(labels[i] for i in order[start:end])
        start = end
    return (twice_rank_sum - positives * (positives + 1)) / (2 * positives * negatives)


def accuracy(labels: Sequence[int], predicted: Sequence[int]) -> float:
    """Return the share of rows whose class is right."""
    _check(labels, predicted)
    return sum(a == b for a, b in zip(labels, predicted, strict=True)) / len(labels)


def mae(labels: Sequence[float], predicted: Sequence[float]) -> float:
    """Return the mean absolute error, in the label's unit."""
    _check(labels, predicted)
    return math.fsum(abs(a - b) for a, b in zip(labels, predicted, strict=True)) / len(labels)


def r2(labels: Sequence[float], predicted: Sequence[float]) -> float:
    """Return the coefficient of determination; MetricError when every label is the same."""
    _check(labels, predicted)
    mean = math.fsum(labels) / len(labels)
    total = math.fsum((a - mean) ** 2 for a in labels)
    if total == 0:
        raise MetricError("r2 needs labels that differ")
    return 1.0 - math.fsum((a - b) ** 2 for a, b in zip(labels, predicted, strict=True)) / total


def baseline(metric: str, labels: Sequence[float]) -> float:
    """Return what needs no model: majority class, prior (auc 0.5), mean (r2 0) or median (mae)."""
    if not labels:
        raise MetricError("no rows")
    match metric:
        case "auc":
            return 0.5
        case "accuracy":
            return max(map(labels.count, set(labels))) / len(labels)
        case "r2":
            return 0.0
        case "mae":
            return mae(labels, [_median(labels)] * len(labels))
        case _:
            raise MetricError(f"no metric is called {metric!r}")


def evaluate(
    metric: str,
    task: str,
    label: Mapping[str, Any],
    labels: Sequence[float],
    outputs: Sequence[Sequence[float]],
) -> float:
    """Return a metric of raw model outputs.

    Args:
        metric: one of `METRICS_OF_TASK[task]`.
        task: binary, multiclass or regression.
        label: the charter's label.
        labels: class indices, or values in the label's own unit.
        outputs: one model output vector a row.
    """
    if metric not in METRICS_OF_TASK.get(task, ()):
        raise MetricError(f"{metric} is not a metric of a {task} task; use {METRICS_OF_TASK.get(task, ())}")
    if not all(math.isfinite(value) for output in outputs for value in output):
        raise MetricError("an answer of the model is not finite")
    if task == "regression":
        values = [value_of(label, output) for output in outputs]
        return r2(labels, values) if metric == "r2" else mae(labels, values)
    classes = [int(k) for k in labels]
    if metric == "auc":
        return auc(classes, [output[0] for output in outputs])
    chances = [probabilities(task, output) for output in outputs]
    if task == "binary":
        return accuracy(classes, [int(chance[1] >= 0.5) for chance in chances])
    return accuracy(classes, [max(range(len(c)), key=lambda k: (c[k], -k)) for c in chances])


def gate_result(
    gate: Mapping[str, Any],
    dataset: str,
    task: str,
    label: Mapping[str, Any],
    labels: Sequence[float],
    outputs: Sequence[Sequence[float]],
) -> GateResult:
    """Return one gate of the charter, judged on the public set `dataset` (digest), values to six places."""
    metric = gate["metric"]
    value = rounded_text(evaluate(metric, task, label, labels, outputs))
    trivial = rounded_text(baseline(metric, labels))
    return GateResult(
        metric=metric,
        source=gate["source"],
        dataset=dataset,
        floor=gate_needs(gate, trivial=trivial),
        baseline=trivial,
        value=value,
        passed=int(gate_passes(gate, value=value, trivial=trivial)),
    )


def gate_needs(gate: Mapping[str, Any], *, trivial: str) -> str:
    """Return what a value must reach: the floor, or the baseline with its margin, whichever asks for more.

    For mae lower is better, so it is the most that the value may be. Empty when the gate asks for nothing.
    """
    lower = gate["metric"] in LOWER_IS_BETTER
    asked = [parse_decimal(gate["floor"])] if "floor" in gate else []
    if "margin_over_baseline" in gate:
        margin = parse_decimal(gate["margin_over_baseline"])
        asked.append(parse_decimal(trivial) + (-margin if lower else margin))
    if not asked:
        return ""
    return decimal_text(min(asked) if lower else max(asked))


def gate_passes(gate: Mapping[str, Any], *, value: str, trivial: str) -> bool:
    """Whether a value meets the gate's floor and its margin over the baseline (mae: below, by the margin)."""
    needed = gate_needs(gate, trivial=trivial)
    if not needed:
        return True
    if gate["metric"] in LOWER_IS_BETTER:
        return parse_decimal(value) <= parse_decimal(needed)
    return parse_decimal(value) >= parse_decimal(needed)


def _median(values: Sequence[float]) -> float:
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _check(labels: Sequence[float], scores: Sequence[float]) -> None:
    if not labels or len(labels) != len(scores):
        raise MetricError(f"{len(labels)} labels and {len(scores)} answers: give one answer for each label")
    if not all(map(math.isfinite, scores)):
        raise MetricError("an answer is not finite")
