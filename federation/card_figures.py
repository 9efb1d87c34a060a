"""What a card says of a version's worth: gates, intervals, groups, and where each figure comes from.

A figure on the public set anybody computes again; one that the sites released with noise is as they counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from audit.entries import GateResult
from audit.errors import AuditError
from audit.metrics import LOWER_IS_BETTER
from audit.models import weights_of_file
from audit.private_evaluation import SOURCE
from audit.round_bodies import RunEvaluated
from federation.card import Block, Paragraph, Table, told
from federation.card_metrics import (
    FEW_ROWS,
    FeatureFairness,
    GroupRates,
    Interval,
    fairness,
    intervals,
    wilson,
)
from federation.charter import Charter
from federation.errors import FederationError
from federation.evaluation import PublicData, model_outputs
from federation.registry import Version

FindBlob = Callable[[str], bytes | None]
_Z: Final = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A version's outputs on the charter's public set, or why there are none."""

    data: PublicData | None
    outputs: list[list[float]]
    missing: str  # why; "" where there are some

    @classmethod
    def of(cls, charter: Charter, version: Version, find_blob: FindBlob | None) -> Measured:
        """Measure the version with the registry's files."""
        if charter.public_set is None:
            return cls._without("the charter declares no public set")
        public = None if find_blob is None else find_blob(charter.public_set.digest)
        weights = None if find_blob is None else find_blob(version.digest)
        if public is None or weights is None:
            return cls._without("the public set or the weights are not at hand where this card was made")
        try:
            data = PublicData.read(charter, public)
            flat = weights_of_file(charter.layers, weights)
            outputs = model_outputs(charter.layers, flat, data.rows)
        except (AuditError, FederationError) as error:
            return cls._without(f"they cannot be used ({error})")
        return cls(data=data, outputs=outputs, missing="")

    @classmethod
    def _without(cls, why: str) -> Measured:
        return cls(data=None, outputs=[], missing=why)


def metric_blocks(
    version: Version, charter: Charter, measured: Measured, evaluated: RunEvaluated | None
) -> Iterator[Block]:
    """Yield what the card's section on metrics holds."""
    gates = version.registered.gates
    if not gates:
        yield Paragraph(told("NO EVIDENCE: the charter names no metric that anybody can recompute."))
    else:
        yield from _sources(gates, charter)
        yield Table(
            ("metric", "value", "trivial baseline", "needed", "source", "gate"), tuple(map(_gate_row, gates))
        )
    if measured.data is None:
        yield Paragraph(told("Confidence intervals: NO EVIDENCE; {}.", measured.missing))
    else:
        found = intervals(charter, measured.data, measured.outputs, seed=version.digest)
        yield Paragraph(
            "With 95 % confidence, by chance of the public set's rows alone (Wilson's interval of a share; "
            "percentile bootstrap, seeded by the version, of the others):"
        )
        yield Table(
            ("metric", "value", "from", "to", "rows", "method"),
            tuple(
                (i.name, _number(i.value), _number(i.lower), _number(i.upper), str(i.rows), i.method)
                for i in found
            ),
        )
    if evaluated is not None and evaluated.metrics:
        yield _released(evaluated)


def _sources(gates: tuple[GateResult, ...], charter: Charter) -> Iterator[Block]:
    if any(gate.source != SOURCE for gate in gates) and charter.public_set is not None:
        yield Paragraph(
            f"Gates of source public_set: on the charter's public set of {charter.public_set.rows} rows, "
            "which a verifier recomputes."
        )
    if any(gate.source == SOURCE for gate in gates):
        yield Paragraph(
            told(
                "Gates of source {}: on rows that stayed at the sites and were kept out of training. Each "
                "site counted its own and released the counts once, with noise and paid for on its odometer. "
                "That they were counted as said is ATTESTED by the sites; a verifier recomputes only what "
                "follows from the released counts.",
                SOURCE,
            )
        )


def _gate_row(gate: GateResult) -> tuple[str, ...]:
    none = told("NO EVIDENCE")
    return (
        gate.metric,
        gate.value or none,
        gate.baseline or none,
        gate.floor or "-",
        gate.source,
        _passed(gate) if gate.passed == 1 else told("FAILED"),
    )


def _passed(gate: GateResult) -> str:
    """Say of a gate that passed whether it asked for more than the model that always gives one answer."""
    lower = gate.metric in LOWER_IS_BETTER
    if gate.value and gate.baseline:
        value, baseline = Decimal(gate.value), Decimal(gate.baseline)
        if value >= baseline if lower else value <= baseline:
            return "passed, no better than the baseline"
        if not gate.floor or (Decimal(gate.floor) >= baseline if lower else Decimal(gate.floor) <= baseline):
            return "passed, asks for no more than the baseline"
    return "passed"


def _released(evaluated: RunEvaluated) -> Paragraph:
    """What the sites' noisy counts say, and where it lies by their noise: a share, and so within 0 and 1."""
    metric, spread = evaluated.metrics[0], float(evaluated.spread)
    low, high = float(metric.value) - _Z * spread, float(metric.value) + _Z * spread
    clipped = ", cut off at what a share can be" if low < 0 or high > 1 else ""
    left_out = f" Without {', '.join(evaluated.missing)}." if evaluated.missing else ""
    return Paragraph(
        told(
            "On rows that stayed at the sites, by {} sites: {} {}, between {} and {} by the noise that the "
            "sites added (95 %{}; chance of the rows comes on top). Counted as the sites attest (ATTESTED), "
            "paid for on each odometer.{}",
            len(evaluated.statements),
            metric.name,
            metric.value,
            _number(max(0.0, low)),
            _number(min(1.0, high)),
            clipped,
            left_out,
        )
    )


def fairness_blocks(charter: Charter, measured: Measured) -> Iterator[Block]:
    """Yield what the card's section on groups holds."""
    if charter.fairness is None:
        yield Paragraph(told("NO EVIDENCE: the charter declares no groups."))
        return
    if measured.data is None:
        yield Paragraph(told("NO EVIDENCE for {}: {}.", ", ".join(charter.fairness.groups), measured.missing))
        return
    try:
        found = fairness(charter, measured.data, measured.outputs)
    except ImportError:
        yield Paragraph(told("NO EVIDENCE: this installation cannot tell groups apart; it needs fairlearn."))
        return
    yield Paragraph(
        "On the public set; what holds there need not hold for the people of a site. A share stands with its "
        f"95 % interval. Groups of fewer than {FEW_ROWS} rows are marked: their figures say little. Rows "
        "without a value are a group of their own, in which there may be anybody."
    )
    for feature in found:
        yield _group_table(charter, feature)
        if feature.differences:
            shown = ", ".join(
                f"{_called(charter) if name == 'selection_rate' else name.replace('_', ' ')} {_number(value)}"
                for name, value in sorted(feature.differences.items())
            )
            yield Paragraph(told("Largest difference between groups of **{}**: {}.", feature.feature, shown))


def _group_table(charter: Charter, feature: FeatureFairness) -> Table:
    if charter.task == "regression":
        return Table(
            (feature.feature, "rows", "mean absolute error"),
            tuple((_group(g), str(g.rows), _number(g.error)) for g in feature.groups),
        )
    header: tuple[str, ...] = (feature.feature, "rows", "accuracy")
    if charter.task == "binary":
        header = (*header, _called(charter), "true positive rate", "false positive rate")
    return Table(header, tuple(_group_row(charter, group) for group in feature.groups))


def _called(charter: Charter) -> str:
    return f"called {(charter.label.classes or ('', ''))[1]}"


def _group_row(charter: Charter, group: GroupRates) -> tuple[str, ...]:
    cells = (_group(group), str(group.rows), _interval(group.accuracy))
    if charter.task != "binary":
        return cells
    return (
        *cells,
        _share(group.selection_rate, group.rows),
        _share(group.true_positive_rate, group.positives),
        _share(group.false_positive_rate, group.rows - group.positives),
    )


def _group(group: GroupRates) -> str:
    if group.rows == 0:
        return f"{group.group} (no row)"
    return f"{group.group} (few rows)" if group.rows < FEW_ROWS else group.group


def _share(value: float | None, rows: int) -> str:
    if value is None:
        return "-"
    lower, upper = wilson(round(value * rows), rows)
    return f"{_number(value)} ({_number(lower)} to {_number(upper)}) of {rows}"


def _interval(found: Interval | None) -> str:
    if found is None:
        return "-"
    return f"{_number(found.value)} ({_number(found.lower)} to {_number(found.upper)})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}".rstrip("0").rstrip(".")
