"""One row, however broken, takes part or does not; it never stops the site nor touches another's row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients.loader import TrainingData, load_training_data
from clients.terms import Terms, read_terms

HEADER = "age,dose,arm,outcome\n"
ROWS = [f"{20 + i},{5 + i},drug,{'yes' if i % 2 else 'no'}" for i in range(12)]
BROKEN_CELLS = {
    "an open quote": '"31',
    "a quote inside": '3"1',
    "a cell beyond the parser's limit": "x" * 140_000,
    "an open quote and a long cell": '"' + "x" * 140_000,
    "more digits than any number": "0" * 450 + "31",
    "many digits after the point": "31." + "1" * 500,
    "another line break": "3\r1",
    "a null byte": "3\x001",
}


@pytest.fixture
def terms(signed) -> Terms:
    return read_terms(signed.text(), site="alpha")


def load(folder: Path, terms: Terms, rows: list[str]) -> TrainingData:
    path = folder / "people.csv"
    path.write_text(HEADER + "\n".join(rows) + "\n", encoding="utf-8", newline="")
    return load_training_data(path, terms)


def without(data: TrainingData, position: int) -> TrainingData:
    return TrainingData(np.delete(data.inputs, position, 0), np.delete(data.targets, position))


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("name", BROKEN_CELLS)
def test_a_broken_cell_costs_its_own_row_and_no_other(
    tmp_path: Path, terms: Terms, name: str, column: int
) -> None:
    cells = ROWS[4].split(",")
    cells[column] = BROKEN_CELLS[name]
    found = load(tmp_path, terms, [*ROWS[:4], ",".join(cells), *ROWS[5:]])
    others = without(load(tmp_path, terms, ROWS), 4)
    rest = found if len(found.inputs) == len(others.inputs) else without(found, 4)
    assert np.array_equal(rest.inputs, others.inputs)
    assert np.array_equal(rest.targets, others.targets)


@pytest.mark.parametrize("age", ["0" * 450 + "31", "31." + "0" * 390, "1" * 250 + "." + "0" * 250, "31.5"])
def test_whether_a_row_takes_part_does_not_hang_on_how_another_is_written(
    tmp_path: Path, terms: Terms, age: str
) -> None:
    odd = f"{age},10,drug,yes"
    alone = load(tmp_path, terms, [odd])
    among_plain = load(tmp_path, terms, [*ROWS, odd])
    beside_a_broken_one = load(tmp_path, terms, [*ROWS[:-1], "none,10,drug,yes", odd])
    assert len(among_plain.inputs) - len(ROWS) == len(alone.inputs)
    assert len(beside_a_broken_one.inputs) - (len(ROWS) - 1) == len(alone.inputs)


def test_a_parquet_cell_that_python_cannot_hold_costs_its_own_row(tmp_path: Path, terms: Terms) -> None:
    count = 5
    text = b"".join(b"drug" if i != 2 else b"dr\xffg" for i in range(count))
    offsets = np.arange(count + 1, dtype=np.int32) * 4
    arms = pa.Array.from_buffers(pa.string(), count, [None, pa.py_buffer(offsets), pa.py_buffer(text)])
    path = tmp_path / "people.parquet"
    pq.write_table(
        pa.table(
            {
                "age": pa.array([30.0] * count),
                "dose": pa.array([10.0] * count),
                "arm": arms,
                "outcome": pa.array(["yes"] * count),
                "seen": pa.array([2**31 - 1, 1, 1, 1, 1], type=pa.int32()).cast(pa.date32()),
            }
        ),
        path,
    )
    inputs = load_training_data(path, terms).inputs
    assert np.array_equal(np.delete(inputs, 2, 0), np.delete(np.repeat(inputs[:1], len(inputs), 0), 2, 0))
    assert len(inputs) in (count - 1, count)
