"""A whole table encodes to the very numbers of `audit.encoding`, and a bad row never becomes an exception."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.encoding import EncodingError, RowEncoder
from federation.contract import check_frame, contract_schema
from federation.encoding import encode_frame, encode_labels

LABEL = {"name": "y", "classes": ["no", "yes"]}
CELLS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-10_000, 10_000),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["", "I", "II", "x", "true", "0", "1", " 7 ", "1e3", "nan", "-3.5", "٣"]),
)


@pytest.fixture(scope="module")
def features(charter):
    return charter.document["features"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_table_encodes_as_the_definition_does_row_by_row(features, data):
    names = [feature["name"] for feature in features]
    rows = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(names, CELLS)), min_size=1, max_size=6))
    frame = pd.DataFrame(rows, columns=names, dtype=object)
    inputs, mask = encode_frame(features, frame)
    encoder = RowEncoder(features)
    for position, row in enumerate(frame.to_dict("records")):
        try:
            expected = encoder.encode(row)
        except EncodingError:
            assert not mask[position]
            assert not inputs[position].any()
        else:
            assert mask[position]
            assert inputs[position].tolist() == expected


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=30))
def test_numeric_columns_take_the_fast_way_to_the_same_bits(values):
    for missing in ("refuse", "midpoint"):
        for kind in ("number", "integer"):
            feature = {
                "name": "x", "type": kind, "unit": "", "lower": "-3", "upper": "11",
                "transform": "none", "missing": missing,
            }  # fmt: skip
            fast = encode_frame([feature], pd.DataFrame({"x": np.array(values)}))
            slow = encode_frame([feature], pd.DataFrame({"x": values}, dtype=object))
            assert fast[1].tolist() == slow[1].tolist()
            assert fast[0].tobytes() == slow[0].tobytes()


def test_out_of_bounds_values_are_clamped_and_count(features):
    frame = pd.DataFrame(
        {"radius": [99.0, -99.0], "texture": [1.0, 100.0], "smoker": [1, 0], "stage": ["I", "II"]}
    )
    inputs, mask = encode_frame(features, frame)
    assert mask.all()
    assert inputs[:, 0].tolist() == [1.0, -1.0]
    assert inputs[:, 1].tolist() == [-1.0, 1.0]


def test_a_missing_column_masks_every_row(features):
    inputs, mask = encode_frame(features, pd.DataFrame({"radius": [1.0, 2.0]}))
    assert not mask.any()
    assert not inputs.any()


def test_an_unhashable_cell_is_masked(features):
    frame = pd.DataFrame({"radius": [[1], 2], "texture": [2, 2], "smoker": [1, 1], "stage": ["I", "I"]})
    assert encode_frame(features, frame)[1].tolist() == [False, True]


def test_unknown_labels_are_masked():
    targets, mask = encode_labels(LABEL, pd.Series(["yes", "no", "maybe", None, 1], dtype=object))
    assert targets.tolist() == [1, 0, 0, 0, 0]
    assert mask.tolist() == [True, True, False, False, False]


def test_regression_labels_are_scaled_by_declared_bounds():
    label = {"name": "y", "lower": "0", "upper": "10"}
    targets, mask = encode_labels(label, pd.Series([0, "5", 20.0, math.nan, "x", True], dtype=object))
    assert targets.tolist() == [-1, 0, 1, 0, 0, 0]
    assert mask.tolist() == [True, True, True, False, False, False]


def test_contract_names_row_column_and_fix(features, charter):
    frame = pd.DataFrame(
        {
            "radius": [1, 2, "wide", 99],
            "texture": [2, None, 3, 4],
            "smoker": [True, None, False, "maybe"],
            "stage": ["I", "II", "IV", "III"],
            "diagnosis": ["benign", "benign", "malignant", "unclear"],
        },
        index=[10, 11, 12, 13],
        dtype=object,
    )
    found = {(f.row, f.column) for f in check_frame(frame, features, charter.document["label"])}
    assert found == {
        (2, "texture"), (3, "radius"), (3, "stage"), (4, "radius"), (4, "smoker"), (4, "diagnosis"),
    }  # fmt: skip
    text = "\n".join(map(str, check_frame(frame, features, charter.document["label"])))
    assert "row 3, column radius: 'wide' is not a finite number; correct it" in text
    assert "check the unit" in text
    assert "use one of I, II, III" in text


def test_contract_names_every_missing_column(features, charter):
    found = check_frame(pd.DataFrame({"radius": [1]}), features, charter.document["label"])
    assert [(f.row, f.column) for f in found] == [
        (None, "texture"), (None, "smoker"), (None, "stage"), (None, "diagnosis"),
    ]  # fmt: skip


def test_contract_is_a_pandera_schema_that_a_good_table_passes(features, charter):
    frame = pd.DataFrame(
        {
            "radius": [1],
            "texture": [2],
            "smoker": [True],
            "stage": ["I"],
            "diagnosis": ["benign"],
            "note": ["x"],
        }
    )
    schema = contract_schema(features, charter.document["label"])
    assert schema.validate(frame).equals(frame)
    assert check_frame(frame, features, charter.document["label"]) == []
