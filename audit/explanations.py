"""Attributions of one answer to its features, and what anybody can check of them.

What is explained is the model's raw output for the class that was answered (binary: the logit; regression:
the output in [-1, 1]), against the charter's own baseline: the encoded row of zeros, the middle of every
declared range and no category. A category's attribution is the sum over its inputs.

For one linear layer the attribution is exact: weight times input. Otherwise integrated gradients share out
`total - base` along the straight line from the baseline; the sum of the attributions must come to that
difference (completeness), which a verifier recomputes from row and weights. How a non-linear model's
difference is shared out among the features is not recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from audit.answers import EXACT
from audit.decimals import parse_decimal, rounded_text
from audit.errors import AuditError
from audit.forward import forward

LINEAR: Final = "weight_times_input"
GRADIENTS: Final = "integrated_gradients"
GAP_LIMIT: Final = Decimal("0.05")  # of 1 + |total - base|: what a sum over steps may miss
_GRAIN: Final = Decimal("0.000001")
_FIELDS: Final = frozenset({"method", "output", "base", "total", "gap", "values"})


class ExplanationError(AuditError):
    """A model has no attributions of this kind, or a document is none; the message says which."""

    code = "audit.explanation"


def explained_output(task: str, label: Mapping[str, Any], answer: Mapping[str, Any]) -> int:
    """Return the index of the raw output that an answer's attributions are about."""
    return list(label["classes"]).index(answer["label"]) if task == "multiclass" else 0


def is_linear(layers: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the model is one linear layer, with or without an intercept for each site."""
    kinds = [layer["layer"] for layer in layers]
    return kinds.count("linear") == 1 and set(kinds) <= {"linear", "site_intercept"} and kinds[0] == "linear"


def linear_attributions(
    layers: Sequence[Mapping[str, Any]], weights: Sequence[float], encoded: Sequence[float], output: int
) -> list[float]:
    """Return weight times input for each encoded input, of a model by `is_linear`."""
    size = layers[0]["in"]
    row = weights[output * size : (output + 1) * size]
    return [weight * value for weight, value in zip(row, encoded, strict=True)]


def by_feature(features: Sequence[Mapping[str, Any]], attributions: Sequence[float]) -> dict[str, float]:
    """Return the attributions by feature: a category's is the sum over its inputs.

    Raises:
        ExplanationError: they are not one for each encoded input, or not finite.
    """
    found: dict[str, float] = {}
    place = 0
    for feature in features:
        width = len(feature["categories"]) if feature["type"] == "category" else 1
        found[feature["name"]] = math.fsum(attributions[place : place + width])
        place += width
    if place != len(attributions) or not all(map(math.isfinite, attributions)):
        raise ExplanationError(f"{len(attributions)} attributions do not fit the row, or one is not finite")
    return found


def attribution_document(
    *, method: str, output: int, base: float, total: float, values: Mapping[str, float], decimals: int = EXACT
) -> dict[str, Any]:
    """Return what is committed to: numbers as decimal text, of no more decimals than the charter lets out.

    `gap` is what the attributions, as they are written, lack of `total - base`.
    """
    written = {name: rounded_text(value, decimals) for name, value in values.items()}
    texts = {"base": rounded_text(base, decimals), "total": rounded_text(total, decimals)}
    return {"method": method, "output": output, **texts, "values": written, "gap": _gap(texts, written)}


def completeness_problem(
    layers: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
    features: Sequence[Mapping[str, Any]],
    claimed: object,
    *,
    encoded: Sequence[float],
    outputs: Sequence[float],
    answer: Mapping[str, Any],
    task: str,
    label: Mapping[str, Any],
    site: int | None,
    slack: Decimal,
) -> str:
    """Return how a document of attributions contradicts the model, or "".

    Args:
        claimed: as `attribution_document` writes it.
        encoded, outputs: the row, and what the model gives for it.
        slack: how far the charter's rounding moves a number.
    """
    if not isinstance(claimed, Mapping) or set(claimed) != _FIELDS:
        return f"attributions hold exactly {', '.join(sorted(_FIELDS))}"
    if claimed["method"] != (LINEAR if is_linear(layers) else GRADIENTS):
        return f"attributions are by {claimed['method']!s:.40}, which is not this model's method"
    if claimed["output"] != explained_output(task, label, answer):
        return f"attributions are of output {claimed['output']!s:.20}, which is not what was answered"
    values = claimed["values"]
    if not isinstance(values, Mapping) or set(values) != {feature["name"] for feature in features}:
        return "attributions do not name each feature once"
    output, grain = claimed["output"], _GRAIN + slack
    try:
        base = forward(layers, weights, [0.0] * len(encoded), site)[output]
        numbers = {name: parse_decimal(claimed[name]) for name in ("base", "total", "gap")}
        parse_decimal(_gap(claimed, values))
        if (
            abs(numbers["base"] - _decimal(base)) > grain
            or abs(numbers["total"] - _decimal(outputs[output])) > grain
        ):
            return f"base and total are {claimed['base']} and {claimed['total']}, not what the model gives"
        if claimed["gap"] != _gap(claimed, values):
            return f"the gap is said to be {claimed['gap']}, the numbers give {_gap(claimed, values)}"
        allowed = GAP_LIMIT * (1 + abs(numbers["total"] - numbers["base"])) + len(values) * slack
        if abs(numbers["gap"]) > allowed:
            return f"the attributions miss {claimed['gap']} of the difference they are to share out"
        if claimed["method"] == LINEAR:
            ours = by_feature(features, linear_attributions(layers, weights, encoded, output))
            for name, value in ours.items():
                if abs(parse_decimal(values[name]) - _decimal(value)) > grain:
                    return f"the attribution of {name} is {values[name]}, the weights give {value:.6f}"
    except AuditError as error:
        return f"attributions cannot be read: {error}"
    return ""


def _gap(texts: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    total = sum((parse_decimal(value) for value in values.values()), Decimal(0))
    return rounded_text(parse_decimal(texts["total"]) - parse_decimal(texts["base"]) - total)


def _decimal(value: float) -> Decimal:
    return Decimal(repr(value))
