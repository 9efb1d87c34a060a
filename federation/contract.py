"""The charter's data contract as a pandera schema, and what a table breaks of it: for the site's own console.

Nothing of this ever leaves a site. Each finding names the column, the row (counted from 1, below the
header) and the fix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from audit.encoding import RowEncoder

if TYPE_CHECKING:
    import pandas as pd
    import pandera.pandas as pa

MAX_FINDINGS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One cell, or one column (`row` is None), that the contract does not allow."""

    column: str
    row: int | None
    problem: str
    fix: str

    def __str__(self) -> str:
        where = self.column if self.row is None else f"row {self.row}, column {self.column}"
        return f"{where}: {self.problem}; {self.fix}"


def contract_schema(features: Sequence[Mapping[str, Any]], label: Mapping[str, Any]) -> pa.DataFrameSchema:
    """Return the schema: every feature and the label must be there, every value as `audit.encoding` reads
    it.
    """
    import pandera.pandas as pa

    columns = {feature["name"]: _column_schema(feature) for feature in features}
    columns[label["name"]] = _column_schema(_label_feature(label))
    return pa.DataFrameSchema(columns, strict=False, coerce=False)


def check_frame(
    frame: pd.DataFrame, features: Sequence[Mapping[str, Any]], label: Mapping[str, Any]
) -> list[Finding]:
    """Return everything in `frame` that the contract does not allow, at most `MAX_FINDINGS`."""
    from pandera.errors import SchemaErrors

    specs = {feature["name"]: feature for feature in (*features, _label_feature(label))}
    found = [
        Finding(
            column=name,
            row=None,
            problem="the column is missing",
            fix=f"add or rename it; the table has {', '.join(map(str, list(frame.columns)[:8]))}",
        )
        for name in specs
        if name not in frame.columns
    ]
    present = {name: spec for name, spec in specs.items() if name in frame.columns}
    table = frame[list(present)].reset_index(drop=True)
    try:
        schema = contract_schema([s for n, s in present.items() if n != label["name"]], label)
        if label["name"] not in present:
            schema = schema.remove_columns([label["name"]])
        schema.validate(table, lazy=True)
    except SchemaErrors as error:
        cases = error.failure_cases
        for column, row in sorted(
            {(str(c), int(i)) for c, i in zip(cases["column"], cases["index"], strict=True) if i is not None}
        )[:MAX_FINDINGS]:
            found += _explain(present[column], table[column].tolist()[row], row + 1)
    return found[:MAX_FINDINGS]


def _column_schema(feature: Mapping[str, Any]) -> pa.Column:
    import pandera.pandas as pa

    encoder = RowEncoder([feature])
    name = feature["name"]

    def is_allowed(value: object) -> bool:
        return not encoder.check({name: value})

    check = pa.Check(is_allowed, element_wise=True, name="contract", ignore_na=False)
    return pa.Column(None, checks=check, nullable=True, required=True)


def _label_feature(label: Mapping[str, Any]) -> dict[str, Any]:
    """Return the label as a feature whose values are checked the same way."""
    common = {"name": label["name"], "unit": "", "missing": "refuse"}
    if "classes" in label:
        return {**common, "type": "category", "categories": label["classes"]}
    return {
        **common,
        "type": "number",
        "lower": label["lower"],
        "upper": label["upper"],
        "transform": "none",
    }


def _explain(feature: Mapping[str, Any], value: object, row: int) -> list[Finding]:
    found = []
    for problem in RowEncoder([feature]).check({feature["name"]: value}):
        text, _, fix = problem.message.partition("; ")
        found.append(Finding(column=feature["name"], row=row, problem=text, fix=fix or "correct it"))
    return found
