from __future__ import annotations

import math
from decimal import Decimal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from audit.decimals import DecimalError, decimal_text, float_text, parse_decimal, rounded_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "0.00001"),
        ("1e-5", "0.00001"),
        ("+3.0", "3"),
        (3, "3"),
        (-1.25, "-1.25"),
        (-0.0, "0"),
        ("00.50", "0.5"),
        (Decimal("1E+3"), "1000"),
        (0.1, "0.1"),
        (1e22, "1" + "0" * 22),
        (5e-324, "0." + "0" * 323 + "5"),
    ],
)
def test_a_number_has_one_plain_text(value, text):
    assert decimal_text(value) == text
    assert decimal_text(parse_decimal(text)) == text


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        True,
        None,
        b"1",
        "NaN",
        "Infinity",
        "1_000",
        " 1",
        "1e99999",
        "",
        "0x1",
        "١",
    ],
)
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(DecimalError):
        decimal_text(value)


@pytest.mark.parametrize(
    "text", ["1.0", "+1", "-0", "01", "1e5", ".5", "5.", "0.10", "", "-", "1\n", "٣", "-0.0", 1, None]
)
def test_another_spelling_of_a_number_is_refused(text):
    with pytest.raises(DecimalError):
        parse_decimal(text)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_double_survives_its_text(value):
    assert float(parse_decimal(decimal_text(value))) == value


def test_rounding_is_half_to_even_and_never_gives_minus_zero():
    assert rounded_text(Decimal("0.0000005")) == "0"
    assert rounded_text(Decimal("0.0000015")) == "0.000002"
    assert rounded_text(-1e-9) == "0"
    with pytest.raises(DecimalError):
        rounded_text(math.nan)


NUMBERS = (
    st.floats(allow_nan=False, allow_infinity=False)
    | st.floats(-2, 2)
    | st.integers(-(10**16), 10**16).map(lambda units: units / 10**7)  # ties, and what lies beside them
)


@given(NUMBERS, st.sampled_from([-math.inf, 0, math.inf]))
def test_quick_rounding_is_the_definitions(value, towards):
    value = math.nextafter(value, towards) if towards else value
    assume(math.isfinite(value))  # beside the largest float there is none
    exact = Decimal(repr(value))
    assert rounded_text(value) == rounded_text(exact)  # a Decimal takes the long way


@pytest.mark.parametrize("value", [0.0000005, 0.0000015, 0.1234565, 2.0000005, -0.0000005, -0.0000004, 1e9])
def test_ties_round_to_even_by_their_written_digits(value):
    assert rounded_text(value) == rounded_text(Decimal(repr(value)))


@given(NUMBERS)
def test_float_text_is_decimal_text(value):
    assert float_text(value) == decimal_text(value)
