"""Bad files: the site's own people read file, row, column and fix; a round is silent about every row."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from clients.errors import DataFileError
from clients.loader import inspect_file, load_training_data, read_table
from clients.terms import read_terms

HEADER = "age,dose,arm,outcome\n"
GOOD = "50,10,drug,yes\n40,20,placebo,no\n"


@pytest.fixture
def terms(signed):
    return read_terms(signed.text(), site="alpha")


@pytest.fixture
def write(tmp_path):
    def write(text, name="rows.csv"):
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


@pytest.mark.parametrize(
    ("row", "column", "problem"),
    [
        ("abc,10,drug,yes", "age", "'abc' is not a finite number"),
        ("NaN,10,drug,yes", "age", "'NaN' is not a finite number"),
        ("inf,10,drug,yes", "age", "'inf' is not a finite number"),
        (",10,drug,yes", "age", "is missing"),
        ("101,10,drug,yes", "age", "'101' is outside 0 to 100"),
        ("-1,10,drug,yes", "age", "'-1' is outside 0 to 100"),
        ("50,0,drug,yes", "dose", "'0' is outside 1 to 1000"),
        ("50,10,vaccine,yes", "arm", "'vaccine' is not declared"),
        ("50,10,drug,maybe", "outcome", "'maybe' is not declared"),
        ("50,10,drug,", "outcome", "is missing"),
    ],
)
def test_a_bad_cell_is_named_by_file_row_and_column(terms, write, row, column, problem):
    path = write(HEADER + GOOD + row + "\n")
    (found,) = inspect_file(path, terms)
    assert (found.file, found.row, found.column) == (str(path), 3, column)
    assert problem in found.problem
    assert found.fix
    assert str(found).startswith(f"{path}, row 3, column {column!r}: ")


@pytest.mark.parametrize("row", ["50,10,drug", "50,10,drug,yes,more", '"50,10,drug,yes'])
def test_a_row_with_missing_or_spare_cells_is_named(terms, write, row):
    found = inspect_file(write(HEADER + GOOD + row + "\n"), terms)
    assert (found[0].row, found[0].column) == (3, None)
    assert "cells where the header has 4" in found[0].problem


@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        (b"", "rows.csv", "is empty"),
        (HEADER.encode(), "rows.csv", "no rows"),
        ((HEADER + "50,10,drug,yes\n").encode(), "rows.csv", "one row"),
        (b"age,dose,arm\n50,10,drug\n", "rows.csv", "column is missing"),
        (b"age,age,dose,arm,outcome\n1,1,2,drug,yes\n", "rows.csv", "twice"),
        (HEADER.encode(), "rows.txt", ".txt file"),
        (b"not parquet", "rows.parquet", "not a Parquet file"),
    ],
)
def test_a_bad_file_is_named(terms, write, content, name, problem):
    path = write(content, name)
    found = inspect_file(path, terms)
    assert any(problem in str(each) for each in found)
    assert all(each.file == str(path) for each in found)


def test_a_file_that_is_not_there_is_named(terms, tmp_path):
    (found,) = inspect_file(tmp_path / "gone.csv", terms)
    assert "does not exist" in found.problem


def test_bytes_that_are_no_text_are_a_bad_cell_and_no_crash(terms, write):
    path = write(HEADER.encode() + GOOD.encode() + b"\xff\xfe,10,drug,yes\n\x00,10,drug,yes\n")
    assert {each.row for each in inspect_file(path, terms)} == {3, 4}
    assert len(load_training_data(path, terms).inputs) == 2


@pytest.mark.parametrize(
    "row",
    [
        "abc,10,drug,yes",
        "NaN,10,drug,yes",
        ",,,",
        "50,10,vaccine,yes",
        "50,10,drug,maybe",
        "50,10",
        "1,2,3,4,5,6",
    ],
)
def test_in_a_round_a_row_outside_the_contract_takes_no_part(terms, write, row):
    clean = load_training_data(write(HEADER + GOOD), terms)
    dirty = load_training_data(write(HEADER + GOOD + row + "\n", "dirty.csv"), terms)
    np.testing.assert_array_equal(dirty.inputs, clean.inputs)
    np.testing.assert_array_equal(dirty.targets, clean.targets)


def test_in_a_round_a_value_out_of_bounds_is_clamped(terms, write):
    data = load_training_data(write(HEADER + "500,10,drug,yes\n100,10,drug,yes\n"), terms)
    np.testing.assert_array_equal(data.inputs[0], data.inputs[1])


@pytest.mark.parametrize("rows", ["", "abc,1,drug,yes\n", "50,10,drug,yes\n"])
def test_in_a_round_no_number_of_rows_is_too_small(terms, write, rows):
    data = load_training_data(write(HEADER + rows), terms)
    assert data.inputs.shape == (1 if rows.startswith("50") else 0, 4)


def test_in_a_round_a_missing_column_stops_the_site(terms, write):
    with pytest.raises(DataFileError, match="'outcome': the column is missing"):
        load_training_data(write("age,dose,arm\n50,10,drug\n"), terms)


def test_parquet_and_csv_give_the_same_rows(terms, tmp_path, write):
    csv = write(HEADER + GOOD)
    frame = pd.DataFrame(
        {"age": [50, 40], "dose": [10.0, 20.0], "arm": ["drug", "placebo"], "outcome": ["yes", "no"]}
    )
    frame.to_parquet(tmp_path / "rows.parquet")
    left, right = load_training_data(csv, terms), load_training_data(tmp_path / "rows.parquet", terms)
    np.testing.assert_array_equal(left.inputs, right.inputs)
    np.testing.assert_array_equal(left.targets, right.targets)


def test_fast_columns_give_the_definitions_doubles(terms, write):
    from audit.encoding import RowEncoder

    cells = ["0.1", "33.333333333333336", "99.99999999999999", "+7", "1.", "00050"]
    path = write(HEADER + "".join(f"{cell},{n + 1},drug,yes\n" for n, cell in enumerate(cells)))
    encoder = RowEncoder(terms.features)
    expected = [encoder.encode({"age": c, "dose": str(n + 1), "arm": "drug"}) for n, c in enumerate(cells)]
    np.testing.assert_array_equal(load_training_data(path, terms).inputs, expected)


def test_the_byte_order_mark_of_a_spreadsheet_is_no_part_of_the_header(terms, write):
    assert inspect_file(write("\ufeff" + HEADER + GOOD), terms) == ()


def test_a_table_keeps_cells_as_they_were_written(write):
    table = read_table(write(HEADER + "050,1e1,drug,yes\n"))
    assert table.frame.iloc[0].tolist() == ["050", "1e1", "drug", "yes"]


WIRE_SAYS = {
    "missing column": ("age,dose,arm\n50,10,drug\n", "contract_not_met"),
    "no header": ("", "contract_not_met"),
    "wrong type": (HEADER + GOOD + "abc,10,drug,yes\n", ""),
    "out of bounds": (HEADER + GOOD + "5000,10,drug,yes\n", ""),
    "unknown category": (HEADER + GOOD + "50,10,vaccine,yes\n", ""),
    "empty": (HEADER, ""),
    "NaN": (HEADER + GOOD + "NaN,10,drug,yes\n", ""),
    "one row": (HEADER + "50,10,drug,yes\n", ""),
}


@pytest.mark.parametrize("case", WIRE_SAYS)
def test_bad_data_leaves_the_site_as_a_closed_code_or_not_at_all(signed, code_of, caplog, case):
    """The wire carries one code for a file that cannot serve, and nothing for a row."""
    text, expected = WIRE_SAYS[case]
    path = signed.agents["gamma"].home.config.data
    before = path.read_bytes()
    path.write_text(text, encoding="utf-8")
    try:
        answer = signed.propose(only="gamma", run=f"run-{case.replace(' ', '-')}")["gamma"]
    finally:
        path.write_bytes(before)
    if expected:
        assert code_of(answer) == expected
        assert str(path) in caplog.text
        assert str(path) not in str(answer)
        assert "the column is missing" not in str(answer)
    else:
        assert "acceptance" in answer
        signed.agents["gamma"].handle(
            "run.finished", b'{"run":"run-%s"}' % case.replace(" ", "-").encode(), {}
        )
