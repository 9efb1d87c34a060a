"""Federated evaluation: what the averaged weights are worth on rows that stay at the sites.

A charter's `evaluation` holds a share of every site's rows out of training. After the last round each site
counts them by true and called class, adds discrete Gaussian noise to every cell, and releases the noisy
matrix under a statement of its own: an event on its odometer like any other. A row counts in one cell, so a
person of m rows moves the matrix by m at most, in L2 norm; one row replaced by another by less than twice
that. Counts are scaled by 2**GRID_BITS before the noise, which takes whole numbers.

From the sum of the matrices everybody computes the same metrics. That they were counted as said is the
sites' word.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

from audit.bodies import ZERO_DIGEST, GateResult, MechanismEvent
from audit.decimals import parse_decimal, rounded_text
from audit.errors import AuditError
from audit.metrics import gate_needs, gate_passes
from audit.round_bodies import RunEvaluated

SOURCE: Final = "private_release"
METRIC: Final = "accuracy"
GRID_BITS: Final = 16
MAX_SIGMA_GRID: Final = 1 << 32  # what sites can draw
MAX_CLASSES: Final = 64
_DOMAIN: Final = b"affidavit/evaluation/v1\x00"


class EvaluationError(AuditError):
    """The counts or the terms of an evaluation do not hold."""

    code = "audit.evaluation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A charter's terms of evaluation, and the event that each site's release must carry."""

    share: Fraction
    classes: int
    event: MechanismEvent

    @classmethod
    def of_charter(cls, charter: Any) -> Evaluation | None:
        """Read the terms from a charter's canonical JSON values; None where it has none.

        Raises:
            EvaluationError: they are out of range, or the task has no classes to count.
        """
        part: Mapping[str, Any] | None = charter.get("evaluation")
        if part is None:
            return None
        privacy = charter["privacy"]
        share, noise = _fraction(part["share"]), _fraction(part["noise_multiplier"])
        classes = len(charter["label"].get("classes", ()))
        if not 2 <= classes <= MAX_CLASSES:
            raise EvaluationError(f"evaluation counts 2 to {MAX_CLASSES} classes, the label has {classes}")
        if not 0 < share < 1 or noise <= 0:
            raise EvaluationError("evaluation.share lies between 0 and 1, its noise_multiplier above 0")
        rows = privacy["max_rows_per_subject"] if privacy["unit"] == "subject" else 1
        moved = (2 if privacy["relation"] == "replace_one" else 1) * rows << GRID_BITS
        if noise * moved > MAX_SIGMA_GRID:
            most = MAX_SIGMA_GRID // moved
            raise EvaluationError(f"evaluation.noise_multiplier is {noise}; sites can draw at most {most}")
        event = MechanismEvent(
            mechanism="discrete_gaussian",
            sampling="full",
            sample_rate="1",
            steps=1,
            sigma_grid=math.ceil(noise * moved),
            sensitivity_grid=moved,
            dimension=classes * classes,
            grid_bits=GRID_BITS,
            relation=privacy["relation"],
            unit=privacy["unit"],
        )
        return cls(share=share, classes=classes, event=event)

    def holds_out(self, charter_digest: str, row: bytes) -> bool:
        """Whether a row (or all rows of a subject, named by `row`) is for evaluation and not for training.

        It follows from charter and row alone: another row's coming or going changes nothing.
        """
        digest = hashlib.sha256(_DOMAIN + bytes.fromhex(charter_digest) + row).digest()
        return Fraction(int.from_bytes(digest[:8], "big"), 1 << 64) < self.share


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """What the summed noisy counts say, as decimal text of six places."""

    accuracy: str
    baseline: str
    spread: str


def worth(evaluation: Evaluation, counts: Sequence[Sequence[int]]) -> Worth:
    """Return accuracy and baseline by the sum of the sites' noisy matrices, and what noise alone makes of it.

    Args:
        counts: one flat matrix a site, classes * classes integers, true class by row.

    Raises:
        EvaluationError: no matrix, one of another size, or no rows left under the noise.
    """
    size = evaluation.classes
    if not counts or any(len(matrix) != size * size for matrix in counts):
        raise EvaluationError(f"evaluation needs matrices of {size} by {size} counts")
    total = [sum(cells) for cells in zip(*counts, strict=True)]
    rows = sum(total)
    if rows <= 0:
        raise EvaluationError("the noisy counts add up to no row; evaluate on more rows or with less noise")
    right = Fraction(sum(total[k * size + k] for k in range(size)), rows)
    largest = Fraction(max(sum(total[k * size : (k + 1) * size]) for k in range(size)), rows)
    accuracy = min(max(right, Fraction(0)), Fraction(1))
    sigma = evaluation.event.sigma_grid * math.sqrt(len(counts)) / rows
    cells = size * (1 - accuracy) ** 2 + (size * size - size) * accuracy**2
    return Worth(
        accuracy=_text(accuracy),
        baseline=_text(min(max(largest, Fraction(0)), Fraction(1))),
        spread=rounded_text(sigma * math.sqrt(cells)),
    )


def private_gate(gate: Mapping[str, Any], evaluated: RunEvaluated | None) -> GateResult:
    """Return one gate judged by the released counts; without them it does not pass."""
    metrics = [] if evaluated is None else [m for m in evaluated.metrics if m.name == gate["metric"]]
    value = metrics[0].value if metrics else ""
    trivial = evaluated.baseline if evaluated is not None and metrics else ""
    return GateResult(
        metric=gate["metric"],
        source=SOURCE,
        dataset=ZERO_DIGEST,
        floor=gate_needs(gate, trivial=trivial) if metrics else "",
        baseline=trivial,
        value=value,
        passed=int(bool(metrics) and gate_passes(gate, value=value, trivial=trivial)),
    )


def _text(value: Fraction) -> str:
    return rounded_text(Decimal(value.numerator) / Decimal(value.denominator))


def _fraction(text: object) -> Fraction:
    return Fraction(parse_decimal(text))
