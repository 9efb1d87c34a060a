"""A charter to fill in, from the names of the columns alone.

Bounds, units and categories are left open on purpose: they come from what a field means, not from anybody's
data, which would leak it. `Charter.load` names every line that is still open.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from federation.charter import PLACEHOLDER
from federation.errors import CharterFileError

_MAX_HEADER: Final = 1 << 20
TYPES: Final = ("number", "integer", "boolean", "category")

_HEAD: Final = """\
# A charter: what the sites agree on. Fill in every {placeholder}; `affidavit charter check` names those left.
# Bounds, units and categories say what a field can hold by definition. Never take them from anybody's data.
affidavit: 1
name: {name}
task: {task}

features:
"""

_TAIL: Final = """\

model: {{family: {family}, site_intercept: false}}
{terms}
# public_set: {{digest: 64 hex digits of sha256sum, rows: 100}}
gates: []                    # - {{metric: {metric}, source: public_set, margin_over_baseline: 0.1}}
purposes: [{placeholder}]
officers: []                 # - {{name: dr-lee, key: "ed25519:..."}}
"""


_ROWS: Final = f"""\
plan: {{strategy: fedavg, rounds: 30, learning_rate: 6, round_timeout_s: 60}}

privacy:
  unit: row                  # or subject, with subject_id and max_rows_per_subject; or site, see --unit
  relation: add_remove       # or zero_out, replace_one
  epsilon: {PLACEHOLDER}              # the whole run, for each site's population
  delta: 1e-5                # well below 1 / rows of the smallest site
  max_grad_norm: 1
  noise_multiplier: {PLACEHOLDER}     # `affidavit charter check` says what epsilon needs

sites:                       # one line a member; nominal_rows is a public number, not a count
  - {{name: {PLACEHOLDER}, identity: "{PLACEHOLDER}", nominal_rows: {PLACEHOLDER}}}

# secure_aggregation: {{tolerated: 1}}   # the coordinator reads sums alone, the sites share the noise
"""

_SITES: Final = f"""\
plan:                        # local steps are without noise; a site sends what they made of the model
  {{strategy: fedavg, rounds: 30, learning_rate: 1, local_steps: 5, local_learning_rate: 0.5,
    round_timeout_s: 60, minimum_sites: {PLACEHOLDER}}}   # all sites but those tolerated, or more

privacy:
  unit: site                 # a whole site; a row in it has its site's protection and none of its own
  relation: replace_one      # its rows by any others; or zero_out: by nothing
  epsilon: {PLACEHOLDER}              # the whole run, for each site
  delta: {PLACEHOLDER}                # well below 1 / number of sites
  max_update_norm: {PLACEHOLDER}      # what a site's whole update is clipped to, in units of the weights
  noise_multiplier: {PLACEHOLDER}     # `affidavit charter check` says what epsilon needs

secure_aggregation: {{tolerated: 1}}   # the coordinator reads sums alone, the sites share the noise

sites:                       # one line a member; every site counts once
  - {{name: {PLACEHOLDER}, identity: "{PLACEHOLDER}", nominal_rows: 1}}

"""


def read_header(path: Path | str) -> list[str]:
    """Return the column names of a CSV file: its first line, and nothing after it.

    Raises:
        CharterFileError: the file cannot be read, or its first line names no columns.
    """
    try:
        with open(path, "rb", buffering=0) as file:  # unbuffered: not a byte beyond the header is read
            line = file.readline(_MAX_HEADER)
        names = next(csv.reader([line.decode("utf-8-sig")]), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CharterFileError(f"cannot be read: {error}", source=str(path), line=None) from error
    if not names or any(not name.strip() for name in names):
        raise CharterFileError("the first line does not name every column", source=str(path), line=1)
    return [name.strip() for name in names]


def draft_charter(
    columns: Sequence[str],
    *,
    label: str,
    name: str = "my-federation",
    task: str = "binary",
    types: Mapping[str, str] | None = None,
    leave_out: Sequence[str] = (),
    unit: str = "row",
) -> str:
    """Return the YAML of a charter for these columns; no value of any row is asked for.

    `types` says which columns are not numbers; `leave_out` names columns that are no features, such as
    identifiers. `unit` is row, or site: what noise protects.

    Raises:
        CharterFileError: the label is no column, a column is named twice, or a type or unit is unknown.
    """
    if label not in columns:
        known = ", ".join(columns[:12])
        raise CharterFileError(
            f"the label {label!r} is no column; the columns are {known}", source="", line=None
        )
    if len(set(columns)) < len(columns):
        raise CharterFileError("a column is named twice; name each column once", source="", line=None)
    if task not in ("binary", "multiclass", "regression"):
        raise CharterFileError(f"task {task!r} is not binary, multiclass or regression", source="", line=None)
    if unit not in ("row", "site"):
        raise CharterFileError(f"unit {unit!r} is neither row nor site", source="", line=None)
    lines = []
    for column in columns:
        kind = (types or {}).get(column, "number")
        if kind not in TYPES:
            raise CharterFileError(
                f"type {kind!r} of {column} is none of {', '.join(TYPES)}", source="", line=None
            )
        if column != label and column not in leave_out:
            lines.append(f"  - {_feature(column, kind)}")
    bounds = f"lower: {PLACEHOLDER}, upper: {PLACEHOLDER}"
    classes = f"classes: [{PLACEHOLDER} negative, {PLACEHOLDER} positive]"
    fields = bounds if task == "regression" else classes
    return (
        _HEAD.format(placeholder=PLACEHOLDER, name=name, task=task)
        + "\n".join(lines)
        + f"\nlabel: {{name: {_quoted(label)}, {fields}}}\n"
        + _TAIL.format(
            placeholder=PLACEHOLDER,
            terms=_SITES if unit == "site" else _ROWS,
            family="linear" if task == "regression" else "logistic_regression",
            metric={"binary": "auc", "multiclass": "accuracy"}.get(task, "r2"),
        )
    )


def _feature(column: str, kind: str) -> str:
    if kind == "category":
        return f"{{name: {_quoted(column)}, type: category, categories: [{PLACEHOLDER}]}}"
    if kind == "boolean":
        return f"{{name: {_quoted(column)}, type: boolean}}"
    bounds = f"lower: {PLACEHOLDER}, upper: {PLACEHOLDER}"
    return f"{{name: {_quoted(column)}, type: {kind}, unit: {PLACEHOLDER}, {bounds}}}"


def _quoted(text: str) -> str:
    plain = text.replace("_", "").isalnum() and text.isascii() and not text[0].isdigit()
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
