"""Reads a site's data file (CSV or Parquet) and encodes it by the charter's declared bounds.

Two readers of the same file, for two audiences. `load_training_data` serves a round: nothing about a single
row may change whether or how the site answers, so a row outside the contract is clamped or left out,
silently but for the site's own console. `inspect_file` serves the site's people: it names every file, row
and column that is wrong. Only what is wrong with the file as a whole (missing, unreadable, without a
column) stops either.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from audit.encoding import is_missing
from audit.private_evaluation import Evaluation
from clients.errors import DataFileError, DataProblem
from clients.terms import Terms
from federation.contract import check_frame
from federation.encoding import encode_frame, encode_labels

_logger = logging.getLogger(__name__)

FEW_ROWS: Final = 2
_SHOWN: Final = 40
_DECIMAL: Final = re.compile(r"[+-]?[0-9]{1,190}(?:\.[0-9]{0,190})?")  # within what audit.decimals reads


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A data file as read: every cell a Python value, nothing interpreted yet."""

    file: str
    frame: pd.DataFrame  # dtype object
    ragged: Mapping[int, int]  # position of a row with too few or too many cells: how many it has


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """The usable rows, encoded. How many there are is never released."""

    inputs: NDArray[np.float64]  # (rows, encoded width)
    targets: NDArray[np.float64]  # (rows,): class index, or label scaled to [-1, 1]


def read_table(path: Path) -> Table:
    """Read a CSV (UTF-8, with a header) or Parquet file.

    Raises:
        DataFileError: the file is missing, empty, unreadable, of another kind, or names a column twice.
    """
    try:
        if path.suffix.lower() == ".csv":
            return _read_csv(path)
        if path.suffix.lower() in (".parquet", ".pq"):
            return _read_parquet(path)
    except FileNotFoundError as error:
        raise _fatal(path, "does not exist", "correct `data:` in site.yaml") from error
    except OSError as error:
        raise _fatal(
            path, f"cannot be read: {error.strerror or error}", "let the agent's user read it"
        ) from error
    raise _fatal(path, f"is a {path.suffix or 'nameless'} file", "give a .csv or .parquet file")


def load_training_data(path: Path, terms: Terms) -> TrainingData:
    """Return the file's usable rows for a round: all but those that the charter keeps for evaluation.

    Raises:
        DataFileError: the file as a whole cannot serve; never because of a row.
    """
    data, held_out = load_all_data(path, terms)
    return TrainingData(data.inputs[~held_out], data.targets[~held_out])


def load_evaluation_data(path: Path, terms: Terms) -> TrainingData:
    """Return the file's usable rows that no round trains on; errors as `load_training_data`."""
    data, held_out = load_all_data(path, terms)
    return TrainingData(data.inputs[held_out], data.targets[held_out])


def load_all_data(path: Path, terms: Terms) -> tuple[TrainingData, NDArray[np.bool_]]:
    """Return the file's usable rows, and which of them are for evaluation; errors as `load_training_data`."""
    table = read_table(path)
    _require_columns(table, terms)
    inputs, usable = encode_frame(terms.features, _with_numeric_columns(table.frame, terms))
    targets, labelled = encode_labels(terms.label, table.frame[terms.label["name"]])
    usable &= labelled
    usable[list(table.ragged)] = False
    usable &= _within_subjects(table, terms)
    left_out = int(len(usable) - usable.sum())
    if left_out:
        _logger.warning(
            "%s: %d rows are outside the contract and take no part; `affidavit site status` names them",
            path,
            left_out,
        )
    data = TrainingData(inputs[usable], targets[usable])
    if terms.evaluation is None:
        return data, np.zeros(len(data.targets), dtype=np.bool_)
    subjects = table.frame[terms.subject_id][usable].tolist() if terms.subject_id else None
    return data, _held_out(terms, terms.evaluation, data, subjects)


def inspect_file(path: Path, terms: Terms) -> tuple[DataProblem, ...]:
    """Return everything in the file that the contract does not allow, for the site's own console."""
    try:
        table = read_table(path)
        _require_columns(table, terms)
    except DataFileError as error:
        return error.problems
    rows = len(table.frame)
    problems: list[DataProblem] = []
    if rows == 0:
        problems.append(_about(table, "holds a header and no rows", "export the data again"))
    elif rows < FEW_ROWS:
        problems.append(
            _about(table, "holds one row", "a site of one person contributes little but noise; add rows")
        )
    for position, cells in table.ragged.items():
        problems.append(
            DataProblem(
                file=table.file,
                row=position + 1,
                column=None,
                problem=f"has {cells} cells where the header has {len(table.frame.columns)}",
                fix="check quotes and separators",
            )
        )
    if rows:
        problems += [
            DataProblem(
                file=table.file, row=found.row, column=found.column, problem=found.problem, fix=found.fix
            )
            for found in check_frame(table.frame, terms.features, terms.label)
            if found.row is None or found.row - 1 not in table.ragged
        ]
    return tuple(problems)


def _read_csv(path: Path) -> Table:
    """Read a CSV file line by line: a row is one line, so that no quote left open swallows other people's."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = _cells(next(file, ""))
        if not header:
            raise _fatal(path, "is empty", "export it again, with a header that names the columns")
        if len(set(header)) < len(header):
            twice = sorted({name for name in header if header.count(name) > 1})
            raise _fatal(path, f"names the columns {twice} twice", "name each column once")
        rows: list[list[Any]] = []
        ragged: dict[int, int] = {}
        for line in file:
            cells = _cells(line)
            if not cells:
                continue
            if len(cells) != len(header):
                ragged[len(rows)] = len(cells)
                cells = (cells + [""] * len(header))[: len(header)]
            rows.append(cells)
    return Table(str(path), pd.DataFrame(rows, columns=header, dtype=object), ragged)


def _cells(line: str) -> list[str]:
    """Return a line's cells; one so long that the parser gives up counts as a single cell."""
    try:
        return next(csv.reader((line.rstrip("\r\n"),)), [])
    except csv.Error:
        return [line[:_SHOWN]]


def _read_parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise _fatal(path, f"is not a Parquet file: {error}", "write it again") from error
    names = list(table.column_names)
    if len(set(names)) < len(names):
        raise _fatal(path, "names a column twice", "name each column once")
    frame = pd.DataFrame({name: pd.Series(_values(table[name]), dtype=object) for name in names})
    return Table(str(path), frame, {})


def _values(column: Any) -> list[Any]:
    """Return a Parquet column as Python values; a cell that has none (bad UTF-8, year 5879610) is missing."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        return None


def _require_columns(table: Table, terms: Terms) -> None:
    wanted = [str(feature["name"]) for feature in terms.features] + [str(terms.label["name"])]
    if terms.subject_id:
        wanted.append(terms.subject_id)
    missing = [name for name in wanted if name not in table.frame.columns]
    if missing:
        raise DataFileError(
            tuple(
                DataProblem(
                    file=table.file,
                    row=None,
                    column=name,
                    problem="the column is missing",
                    fix=f"add or rename it; the file has {', '.join(list(table.frame.columns)[:8])}…",
                )
                for name in missing
            )
        )


def _within_subjects(table: Table, terms: Terms) -> NDArray[np.bool_]:
    """Which rows to use: with a subject column, each subject's first `max_rows_per_subject`."""
    if not terms.subject_id:
        return np.ones(len(table.frame), dtype=np.bool_)
    seen: dict[str, int] = {}
    chosen = []
    for subject in table.frame[terms.subject_id].tolist():
        key = "" if is_missing(subject) else str(subject)
        seen[key] = seen.get(key, 0) + 1
        # a row of nobody could be anybody's, so it takes no part
        chosen.append(key != "" and seen[key] <= terms.max_rows_per_subject)
    return np.asarray(chosen, dtype=np.bool_)


def _held_out(
    terms: Terms, evaluation: Evaluation, data: TrainingData, subjects: list[Any] | None
) -> NDArray[np.bool_]:
    """Which rows are for evaluation: each by its own content, or all of a subject by the subject's name."""
    names = (
        [str(subject).encode() for subject in subjects]
        if subjects is not None
        else [x.tobytes() + y.tobytes() for x, y in zip(data.inputs, data.targets, strict=True)]
    )
    chosen = [evaluation.holds_out(terms.digest, name) for name in names]
    return np.asarray(chosen, dtype=np.bool_)


def _with_numeric_columns(frame: pd.DataFrame, terms: Terms) -> pd.DataFrame:
    """Turn columns of plain decimal text into floats at once: the same doubles, many times faster."""
    ready = {}
    for feature in terms.features:
        cells = frame[feature["name"]].tolist()
        if feature["type"] in ("number", "integer") and all(
            isinstance(cell, str) and _DECIMAL.fullmatch(cell) for cell in cells
        ):
            ready[feature["name"]] = np.asarray(cells, dtype=np.float64)
        else:
            ready[feature["name"]] = frame[feature["name"]]
    return pd.DataFrame(ready, index=frame.index)


def _about(table: Table, problem: str, fix: str) -> DataProblem:
    return DataProblem(file=table.file, row=None, column=None, problem=problem, fix=fix)


def _fatal(path: Path, problem: str, fix: str) -> DataFileError:
    return DataFileError((DataProblem(file=str(path), row=None, column=None, problem=problem, fix=fix),))
