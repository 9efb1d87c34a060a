from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from audit.canonical import canonical_bytes
from audit.encoding import (
    EncodingError,
    NumberedRow,
    RowEncoder,
    check_row,
    encode_row,
    input_size,
    plain_row,
)

FEATURES = [
    {"name": "age", "type": "integer", "unit": "years", "lower": "0", "upper": "120", "transform": "none",
     "missing": "refuse"},
    {"name": "dose", "type": "number", "unit": "mg", "lower": "1", "upper": "100", "transform": "log",
     "missing": "midpoint"},
    {"name": "smoker", "type": "boolean", "unit": "", "missing": "refuse"},
    {"name": "stage", "type": "category", "unit": "", "categories": ["I", "II", "3"], "missing": "midpoint"},
]  # fmt: skip
ROW = {"age": 60, "dose": "10", "smoker": True, "stage": "II"}


def codes(row):
    return {(problem.field, problem.code) for problem in check_row(FEATURES, row)}


def test_a_row_is_scaled_by_declared_bounds_only():
    assert input_size(FEATURES) == 6
    assert check_row(FEATURES, ROW) == []
    assert encode_row(FEATURES, ROW) == pytest.approx([0.0, 0.0, 1.0, 0.0, 1.0, 0.0])


def test_spellings_of_one_value_encode_alike():
    spelt = {"age": "60.0", "dose": 10.0, "smoker": "1", "stage": "II"}
    assert encode_row(FEATURES, spelt) == encode_row(FEATURES, ROW)
    assert encode_row(FEATURES, {**ROW, "stage": 3}) == encode_row(FEATURES, {**ROW, "stage": "3"})


@pytest.mark.parametrize("unit", ["", "1"])
def test_a_value_beyond_the_bounds_of_a_number_without_a_unit_names_none(unit):
    column = {"name": "x", "type": "number", "unit": unit, "lower": "0.5", "upper": "2", "transform": "none",
              "missing": "refuse"}  # fmt: skip
    (problem,) = check_row([column], {"x": "3"})
    assert "'3' is outside 0.5 to 2; check the unit" in str(problem)


def test_a_value_beyond_its_bounds_is_clamped_and_reported_with_its_unit():
    row = {**ROW, "age": 130, "dose": -5}
    assert encode_row(FEATURES, row)[:2] == [1.0, -1.0]
    assert codes(row) == {("age", "out_of_bounds"), ("dose", "out_of_bounds")}
    assert "years" in str(check_row(FEATURES, row)[0])


@pytest.mark.parametrize("nothing", [None, "", math.nan])
def test_a_missing_value_takes_the_midpoint_or_is_refused(nothing):
    row = {**ROW, "dose": nothing, "stage": nothing}
    assert encode_row(FEATURES, row)[1:2] + encode_row(FEATURES, row)[3:] == [0.0] * 4
    assert codes(row) == set()
    with pytest.raises(EncodingError, match="age"):
        encode_row(FEATURES, {**ROW, "age": nothing})
    assert codes({**ROW, "smoker": nothing}) == {("smoker", "missing")}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"age": "sixty"}, ("age", "wrong_type")),
        ({"age": 60.5}, ("age", "wrong_type")),
        ({"age": True}, ("age", "wrong_type")),
        ({"age": math.inf}, ("age", "wrong_type")),
        ({"age": [60]}, ("age", "wrong_type")),
        ({"age": "6_0"}, ("age", "wrong_type")),
        ({"smoker": "perhaps"}, ("smoker", "wrong_type")),
        ({"smoker": 2}, ("smoker", "wrong_type")),
        ({"stage": "IV"}, ("stage", "unknown_category")),
        ({"stage": {"x": 1}}, ("stage", "unknown_category")),
        ({"weight": 80}, ("weight", "unknown_field")),
    ],
)
def test_what_the_charter_does_not_allow_is_named_and_not_encoded(change, expected):
    row = {**ROW, **change}
    assert codes(row) == {expected}
    with pytest.raises(EncodingError) as caught:
        encode_row(FEATURES, row)
    assert [(p.field, p.code) for p in caught.value.problems] == [expected]


def test_every_problem_of_a_row_is_reported_at_once():
    assert len(check_row(FEATURES, {"age": "x", "dose": "y", "smoker": "z", "stage": "q", "more": 1})) == 5


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_inputs_stay_within_minus_one_and_one(age, dose):
    row = {**ROW, "age": age, "dose": dose}
    try:
        values = encode_row(FEATURES, row)
    except EncodingError:
        return
    assert all(-1 <= value <= 1 for value in values)


def test_a_plain_row_encodes_like_the_row_it_came_from():
    row = {"age": 60, "dose": 0.1, "smoker": False, "stage": None}
    plain = plain_row(row)
    assert plain == {"age": "60", "dose": "0.1", "smoker": False, "stage": None}
    assert encode_row(FEATURES, plain) == encode_row(FEATURES, row)
    with pytest.raises(EncodingError):
        plain_row({"age": object()})


SCALES = [
    {"name": "age", "type": "integer", "unit": "years", "lower": "0", "upper": "120", "transform": "none",
     "missing": "refuse"},
    {"name": "dose", "type": "number", "unit": "mg", "lower": "-0.1", "upper": "100.7", "transform": "none",
     "missing": "midpoint"},
]  # fmt: skip
CELLS = (
    st.floats(allow_nan=True, allow_infinity=True)
    | st.floats(-1, 121)
    | st.integers(-1, 121)
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([None, "", "60", "x", True, False, -0.0, 1e-7, 60.5, 100.7, -0.1, 0, 120])
)


@given(st.fixed_dictionaries({"age": CELLS, "dose": CELLS}))
def test_quick_reading_is_the_long_ones_or_none(row):
    encoder = RowEncoder(SCALES)
    quick = encoder.read_plain(row)
    if quick is None:
        return
    plain = plain_row(row)
    assert (quick[0], (quick[1], [])) == (plain, encoder.read(plain))
    assert quick[0].canonical() == canonical_bytes(plain)
    assert [type(value) for value in quick[1]] == [float, float]


@pytest.mark.parametrize(
    "row",
    [
        {"age": 60},
        {"age": 60, "dose": 1.0, "more": 1},
        {"age": 60.5, "dose": 1.0},
        {"age": 60, "dose": math.nan},
        {"age": 60, "dose": math.inf},
        {"age": 60, "dose": 100.8},
        {"age": True, "dose": 1.0},
        {"age": "60", "dose": 1.0},
        {"age": 2**60, "dose": 1.0},
    ],
)
def test_quick_reading_leaves_what_is_odd_to_the_long_one(row):
    assert RowEncoder(SCALES).read_plain(row) is None


def test_charter_with_categories_or_logarithms_is_read_the_long_way():
    assert RowEncoder(FEATURES).read_plain({"age": 60, "dose": 10.0, "smoker": 1, "stage": 3}) is None


def test_the_quick_way_is_taken_where_it_can_be():
    assert RowEncoder(SCALES).read_plain({"age": 60, "dose": 50.3}) is not None


@pytest.mark.parametrize(
    "names",
    [
        ["b", "a", "B", "a b", "1"],
        ["100%", "%s", "%(x)s", "%%"],
        ['a "quoted" name', "back\\slash", "tab\tname", "new\nline", "del\x7f"],
        ["größe", "ä", "z", "\ud7ff", "\U0001f600", "\ufb01"],
        ["only"],
    ],
)
def test_quick_rows_are_committed_to_as_the_long_ways_are_whatever_their_features_are_called(names):
    features = [
        {"name": name, "type": "number", "unit": "", "lower": "-9", "upper": "9", "transform": "none",
         "missing": "refuse"}
        for name in names
    ]  # fmt: skip
    row = dict(zip(names, [1.5, -0.0, 3, -2.0, 1e-7, 0.25], strict=False))
    plain, _ = RowEncoder(features).read_plain(row)
    assert plain == plain_row(row)
    assert plain.canonical() == canonical_bytes(plain_row(row))
    assert canonical_bytes(plain) == plain.canonical()


NAMES = ("age", "dose")


def same_reading(encoder: RowEncoder, names: tuple[str, ...], values: list[object]) -> object:
    """A numbered row is read as the plain dictionary of the same, which it stays; return what is read."""
    row, plain = NumberedRow(names, values), dict(zip(names, values, strict=True))
    quick, expected = encoder.read_plain(row), encoder.read_plain(plain)
    assert repr(quick) == repr(expected)
    if quick is not None and expected is not None:
        assert list(quick[0].items()) == list(expected[0].items())
        assert quick[0].canonical() == expected[0].canonical()
    assert repr(encoder.read(row)) == repr(encoder.read(plain))
    assert repr(row) == repr(plain)
    assert row.in_order is values
    return quick


@given(CELLS, CELLS)
@example(60, 50)
@example(60.0, -0.0)
@example(60.5, 1.0)
@example(math.nan, 1.0)
@example(60, math.nan)
@example(60, math.inf)
@example(2**53, 1.0)
@example(-0.0, 0)
@example(True, False)
def test_numbered_row_is_read_as_the_plain_row(age, dose):
    for names, values in ((NAMES, [age, dose]), (NAMES[::-1], [dose, age])):
        same_reading(RowEncoder(SCALES), names, values)


@pytest.mark.parametrize("values", [[0, -0.1], [120, 100.7], [120.0, 1], [0.0, -0.0], [60, 1e-7], [1, 2]])
def test_numbered_row_within_bounds_is_read_quickly_in_whichever_order_it_came(values):
    encoder = RowEncoder(SCALES)
    assert same_reading(encoder, NAMES, values) == same_reading(encoder, NAMES[::-1], values[::-1])
    assert same_reading(encoder, NAMES, values) is not None


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (NAMES, [-1, 1.0]),
        (NAMES, [121, 1.0]),
        (NAMES, [120.00000000000001, 1.0]),
        (NAMES, [60, 100.70000000000002]),
        (NAMES, [60, -0.10000000000000002]),
        (NAMES, [60.5, 1.0]),
        (NAMES, [math.nan, 1.0]),
        (NAMES, [60, math.nan]),
        (NAMES, [60, -math.inf]),
        (NAMES, [2**60, 1.0]),
        (NAMES, [True, 1.0]),
        (NAMES, [None, 1.0]),
        (NAMES, ["60", 1.0]),
        (("age",), [60]),
        (("dose",), [1.0]),
        ((), []),
        ((*NAMES, "more"), [60, 1.0, 2.0]),
        (("age", "age"), [60, 1.0]),
        (("age", "Dose"), [60, 1.0]),
    ],
)
def test_numbered_row_that_is_odd_is_left_to_the_long_way(names, values):
    assert same_reading(RowEncoder(SCALES), names, values) is None


def test_numbered_row_of_another_charter_is_not_taken_by_its_order():
    """The same names in another order: each value goes to the feature of its name, not of its place."""
    row = NumberedRow(("dose", "age"), [1, 60])
    plain, encoded = RowEncoder(SCALES).read_plain(row)
    assert plain == {"age": "60", "dose": "1"}
    assert encoded == encode_row(SCALES, {"age": 60, "dose": 1})
    assert (
        RowEncoder(FEATURES).read_plain(NumberedRow(("age", "dose", "smoker", "stage"), [60, 10, 1, 3]))
        is None
    )


@pytest.mark.parametrize("values", [[60], [60, 1.0, 2.0], []])
def test_numbered_row_has_a_value_for_each_name(values):
    with pytest.raises(ValueError, match="zip"):
        NumberedRow(NAMES, values)


def test_numbered_row_is_read_with_whichever_texts_the_encoder_is_given():
    asked = []

    def texts_of(numbers):
        asked.append(list(numbers))
        return [str(number) for number in numbers]

    encoder = RowEncoder(SCALES, texts_of)
    assert same_reading(encoder, NAMES, [60, 2.5]) is not None
    assert asked == [[60, 2.5], [60, 2.5]]
