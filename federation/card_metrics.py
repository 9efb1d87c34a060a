"""What a card says in figures that anybody can compute again: metrics with intervals, and metrics by group.

All of it is on the charter's public set with the version's own weights. A share (accuracy, and the rates of a
group) has Wilson's interval; any other metric a percentile bootstrap, whose generator is seeded by set and
version, so that the same card comes out everywhere. Groups are those that the charter declares: a category's
or a boolean's values, and for a number the two halves of its declared range. Rows without a value are a group
of their own: what a missing value is encoded as says nothing about whom it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from audit.errors import AuditError
from audit.metrics import METRICS_OF_TASK, evaluate
from audit.models import probabilities, value_of
from federation.charter import Charter, Feature
from federation.evaluation import PublicData

LEVEL: Final = 0.95
FEW_ROWS: Final = 20
_Z: Final = 1.959963984540054  # the normal quantile of LEVEL
_RESAMPLES: Final = 400
_MOST_WORK: Final = 400_000  # rows times resamples


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure and where it lies with confidence LEVEL, by chance of the rows alone."""

    name: str
    value: float
    lower: float
    upper: float
    rows: int
    method: str  # "Wilson" | "bootstrap"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRates:
    """One group's figures; None where the group has no row that a figure could be of."""

    group: str
    rows: int
    accuracy: Interval | None
    selection_rate: float | None
    true_positive_rate: float | None
    false_positive_rate: float | None
    error: float | None  # regression: mean absolute error
    positives: int = 0  # rows of the second class, of two


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureFairness:
    """One feature's groups, and the largest differences between any two of them."""

    feature: str
    groups: tuple[GroupRates, ...]
    differences: Mapping[str, float]


def wilson(right: int, rows: int) -> tuple[float, float]:
    """Return Wilson's interval of a share.

    >>> [round(bound, 4) for bound in wilson(90, 100)]
    [0.8256, 0.9448]
    """
    if rows == 0:
        return 0.0, 1.0
    share, square = right / rows, _Z * _Z
    centre = (share + square / (2 * rows)) / (1 + square / rows)
    spread = _Z / (1 + square / rows) * math.sqrt(share * (1 - share) / rows + square / (4 * rows * rows))
    lower = 0.0 if right == 0 else max(0.0, centre - spread)
    return lower, 1.0 if right == rows else min(1.0, centre + spread)


def intervals(
    charter: Charter, data: PublicData, outputs: Sequence[Sequence[float]], *, seed: str
) -> tuple[Interval, ...]:
    """Return every metric of the task with its interval; those undefined on these rows are left out."""
    label, task, rows = charter.document["label"], charter.task, len(data.labels)
    found = []
    for name in METRICS_OF_TASK[task]:
        try:
            value = evaluate(name, task, label, data.labels, outputs)
        except AuditError:
            continue
        if name == "accuracy":
            lower, upper = wilson(round(value * rows), rows)
            found.append(
                Interval(name=name, value=value, lower=lower, upper=upper, rows=rows, method="Wilson")
            )
            continue
        bounds = _bootstrap(lambda y, o, n=name: evaluate(n, task, label, y, o), data.labels, outputs, seed)  # type: ignore[misc]  # a default binds the name
        if bounds is not None:
            found.append(
                Interval(
                    name=name, value=value, lower=bounds[0], upper=bounds[1], rows=rows, method="bootstrap"
                )
            )
    return tuple(found)


def fairness(
    charter: Charter, data: PublicData, outputs: Sequence[Sequence[float]]
) -> tuple[FeatureFairness, ...]:
    """Return the declared groups' figures, by fairlearn.

    Raises:
        ImportError: fairlearn is not installed; it comes with affidavit[explain].
    """
    if charter.fairness is None:
        return ()
    from fairlearn.metrics import MetricFrame  # type: ignore[import-untyped]  # ships no types

    truth, called = _answers(charter, data, outputs)
    measures = _measures(charter)
    found = []
    for name in charter.fairness.groups:
        feature, groups = _feature(charter, name), group_names(charter, name, data)
        frame = MetricFrame(
            metrics=measures, y_true=truth, y_pred=called, sensitive_features=np.asarray(groups, dtype=object)
        )
        table = frame.by_group
        present = set(groups)
        rates = tuple(
            _rates(group, table.loc[group]) if group in present else _no_row(group)
            for group in _declared(feature)
            if group in present or group != _missing(feature)
        )
        differences: dict[str, float] = {
            measure: _largest([getattr(rate, measure) for rate in rates])
            for measure in ("selection_rate", "true_positive_rate", "false_positive_rate", "error")
            if measure in measures
        }
        differences["accuracy"] = _largest(
            [None if rate.accuracy is None else rate.accuracy.value for rate in rates]
        )
        kept = {key: value for key, value in differences.items() if not math.isnan(value)}
        found.append(FeatureFairness(feature=name, groups=rates, differences=kept))
    return tuple(found)


def group_names(charter: Charter, name: str, data: PublicData) -> list[str]:
    """Return each row's group by one feature."""
    feature, without = _feature(charter, name), data.missing[name]
    place = sum(other.width for other in charter.features[: charter.features.index(feature)])
    declared, missing = _declared(feature), _missing(feature)
    return [
        missing if k in without else declared[_place(feature, row[place : place + feature.width])]
        for k, row in enumerate(data.rows)
    ]


def _feature(charter: Charter, name: str) -> Feature:
    return next(feature for feature in charter.features if feature.name == name)


def _declared(feature: Feature) -> list[str]:
    """Return every group of a feature in the order in which a card names them, what is missing last."""
    if feature.type == "category":
        groups = list(feature.categories or ())
    elif feature.type == "boolean":
        groups = ["false", "true"]
    else:
        lower, upper = float(feature.lower or 0), float(feature.upper or 0)
        middle = math.sqrt(lower * upper) if feature.transform == "log" else (lower + upper) / 2
        unit = f" {feature.unit}" if feature.unit not in (None, "", "1") else ""  # "1": no unit
        groups = [f"below {middle:.6g}{unit}", f"{middle:.6g}{unit} and above"]
    return [*groups, _missing(feature)]


def _missing(feature: Feature) -> str:
    """Return the name of the group of rows without a value, which no category has."""
    name = "missing"
    while name in (feature.categories or ()):
        name = f"no value ({name})"
    return name


def _place(feature: Feature, values: Sequence[float]) -> int:
    """Return the place of a value's group among the declared ones."""
    return (
        max(range(len(values)), key=values.__getitem__) if feature.type == "category" else int(values[0] >= 0)
    )


def _no_row(group: str) -> GroupRates:
    return GroupRates(
        group=group,
        rows=0,
        accuracy=None,
        selection_rate=None,
        true_positive_rate=None,
        false_positive_rate=None,
        error=None,
    )


def _answers(
    charter: Charter, data: PublicData, outputs: Sequence[Sequence[float]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the true labels and what was called; both classes as whole numbers, or both values."""
    if charter.task == "regression":
        values = [value_of(charter.document["label"], row) for row in outputs]
        return np.asarray(data.labels, dtype=float), np.asarray(values, dtype=float)
    chances = [probabilities(charter.task, row) for row in outputs]
    called = [int(row[1] >= 0.5) if len(row) == 2 else int(np.argmax(row)) for row in chances]
    return np.asarray(data.labels).astype(int), np.asarray(called)


def _measures(charter: Charter) -> dict[str, Callable[[Any, Any], float]]:
    count: Callable[[Any, Any], float] = lambda truth, called: float(len(truth))  # noqa: E731 - one of a table
    if charter.task == "regression":
        return {"rows": count, "error": lambda truth, called: float(np.mean(np.abs(truth - called)))}
    measures: dict[str, Callable[[Any, Any], float]] = {
        "rows": count,
        "right": lambda truth, called: float(np.sum(truth == called)),
    }
    if charter.task == "binary":
        measures |= {
            "positives": lambda truth, called: float(np.sum(truth == 1)),
            "selection_rate": lambda truth, called: float(np.mean(called == 1)),
            "true_positive_rate": lambda truth, called: _share(called[truth == 1]),
            "false_positive_rate": lambda truth, called: _share(called[truth == 0]),
        }
    return measures


def _share(called: Any) -> float:
    return float(np.mean(called == 1)) if len(called) else math.nan


def _rates(group: str, row: Any) -> GroupRates:
    def of(name: str) -> float | None:
        value = float(row[name]) if name in row else math.nan
        return None if math.isnan(value) else value

    rows, right = int(row["rows"]), of("right")
    accuracy = None
    if right is not None:
        lower, upper = wilson(int(right), rows)
        accuracy = Interval(
            name="accuracy", value=right / rows, lower=lower, upper=upper, rows=rows, method="Wilson"
        )
    return GroupRates(
        group=group,
        rows=rows,
        accuracy=accuracy,
        selection_rate=of("selection_rate"),
        true_positive_rate=of("true_positive_rate"),
        false_positive_rate=of("false_positive_rate"),
        error=of("error"),
        positives=int(of("positives") or 0),
    )


def _largest(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return max(known) - min(known) if len(known) > 1 else math.nan


def _bootstrap(
    measure: Callable[[Sequence[float], Sequence[Sequence[float]]], float],
    labels: Sequence[float],
    outputs: Sequence[Sequence[float]],
    seed: str,
) -> tuple[float, float] | None:
    """Return the percentile interval; None where too few resamples have the metric."""
    rows = len(labels)
    draw = np.random.default_rng(int(seed[:16], 16))
    values = []
    for _ in range(min(_RESAMPLES, max(50, _MOST_WORK // max(1, rows)))):
        chosen = draw.integers(0, rows, rows).tolist()
        try:
            values.append(measure([labels[i] for i in chosen], [outputs[i] for i in chosen]))
        except AuditError:
            continue
    if len(values) < 40:
        return None
    lower, upper = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(lower), float(upper)
