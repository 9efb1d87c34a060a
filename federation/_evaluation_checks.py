"""What a charter says about evaluating on rows that stay at the sites."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from audit.private_evaluation import GRID_BITS, MAX_CLASSES, MAX_SIGMA_GRID, METRIC
from federation.errors import Problem

if TYPE_CHECKING:
    from federation.charter import Charter


def check_evaluation(charter: Charter) -> Iterator[Problem]:
    """Yield what the terms of evaluation contradict."""
    if charter.evaluation is None:
        return
    if charter.task == "regression" or len(charter.label.classes or ()) > MAX_CLASSES:
        yield Problem(
            path="evaluation",
            message=f"counts rows by true and called class, of 2 to {MAX_CLASSES} classes",
            fix="remove it, and judge this model on a public set",
        )
    rows = charter.privacy.max_rows_per_subject if charter.privacy.unit == "subject" else 1
    moved = (2 if charter.privacy.relation == "replace_one" else 1) * rows << GRID_BITS
    if charter.evaluation.noise_multiplier * moved > MAX_SIGMA_GRID:
        yield Problem(
            path="evaluation.noise_multiplier",
            message="drowns any count, and passes what sites can draw",
            fix=f"write at most {MAX_SIGMA_GRID // moved}; at 10, a hundred rows are known to about ten",
        )


def check_private_gate(charter: Charter, index: int) -> Iterator[Problem]:
    """Yield what is wrong with a gate that counts on the sites' own released counts."""
    path = f"gates[{index}]"
    if charter.evaluation is None:
        yield Problem(
            path=path,
            message="counts on a private release, and the charter has no terms of evaluation",
            fix="add `evaluation: {share: …, noise_multiplier: …}`",
        )
    if charter.gates[index].metric != METRIC:
        yield Problem(
            path=f"{path}.metric",
            message=f"{charter.gates[index].metric} does not follow from counts by class",
            fix=f"write metric: {METRIC}",
        )
