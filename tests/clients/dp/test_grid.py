from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.dp.errors import GridOverflowError, TermsError
from clients.dp.grid import MAX_ROWS, ceil_sqrt, sensitivity_grid, sigma_grid, sum_limit


@given(st.integers(0, 10**24))
def test_the_root_is_rounded_up(value):
    root = ceil_sqrt(value)
    assert root * root >= value
    assert root == 0 or (root - 1) ** 2 < value


@given(st.floats(0.01, 4), st.integers(1, 10**9))
def test_the_noise_is_never_below_what_was_asked(multiplier, sensitivity):
    sigma = sigma_grid(noise_multiplier=multiplier, sensitivity=sensitivity)
    assert Fraction(sigma, sensitivity) >= Fraction(multiplier)
    assert Fraction(sigma - 1, sensitivity) < Fraction(multiplier)


@pytest.mark.parametrize("bits", [1, 8, 16])
@pytest.mark.parametrize("dimension", [1, 10, 5000])
def test_rounding_two_sums_apart_by_one_gradient_stays_within_the_sensitivity(bits, dimension):
    rng = np.random.default_rng(0)
    bound = sensitivity_grid(grid_bits=bits, dimension=dimension, relation="add_remove", precision="float64")
    for _ in range(50):
        one = rng.normal(size=dimension) * 3
        step = rng.normal(size=dimension)
        other = one + step / np.linalg.norm(step)
        moved = np.rint(one * 2**bits) - np.rint(other * 2**bits)
        assert np.linalg.norm(moved) <= bound


def test_the_worst_case_of_rounding_is_reached_without_the_root():
    """Half-integers either side: without sqrt(d) the bound would be broken, so the term is needed."""
    dimension = 400
    one = np.full(dimension, 0.499)
    other = np.full(dimension, 0.501)
    moved = np.linalg.norm(np.rint(one) - np.rint(other))
    assert moved > np.linalg.norm(one - other) + 10
    assert moved <= sensitivity_grid(
        grid_bits=1, dimension=dimension, relation="add_remove", precision="float64"
    )


def test_replacing_a_row_counts_two_gradients():
    common = {"grid_bits": 24, "dimension": 62, "precision": "float64"}
    assert sensitivity_grid(relation="zero_out", **common) == sensitivity_grid(
        relation="add_remove", **common
    )
    assert sensitivity_grid(relation="replace_one", **common) > 2 * 2**24
    assert (
        sensitivity_grid(relation="add_remove", **common) == math.ceil(2**24 * (1 + Fraction(1, 10**6))) + 8
    )


def test_single_precision_declares_more_slack():
    common = {"grid_bits": 24, "dimension": 62, "relation": "add_remove"}
    assert sensitivity_grid(precision="float32", **common) > 2**24 * (1 + 2**-8)
    assert sensitivity_grid(precision="float64", **common) < 2**24 * 1.00001


@pytest.mark.parametrize(
    ("field", "value"),
    [("grid_bits", 0), ("grid_bits", 39), ("dimension", 0), ("relation", "swap"), ("precision", "float16")],
)
def test_terms_out_of_range_are_named(field, value):
    terms = {"grid_bits": 24, "dimension": 62, "relation": "add_remove", "precision": "float64"} | {
        field: value
    }
    with pytest.raises(TermsError, match=field):
        sensitivity_grid(**terms)


@pytest.mark.parametrize("multiplier", [0, -1, math.nan, math.inf, 1e9])
def test_noise_out_of_range_is_refused(multiplier):
    with pytest.raises(TermsError, match="noise_multiplier"):
        sigma_grid(noise_multiplier=multiplier, sensitivity=2**24)


def test_a_grid_too_fine_for_int64_is_refused():
    with pytest.raises(GridOverflowError, match="grid_bits=38"):
        sum_limit(grid_bits=38, sigma=2**40, steps=1)


def test_the_largest_sum_with_the_largest_noise_fits_int64():
    sigma = 2**36
    limit = sum_limit(grid_bits=32, sigma=sigma, steps=1)
    assert limit >= MAX_ROWS * 2**32
    assert limit + 44 * (sigma + 1) <= np.iinfo(np.int64).max


def test_grid_and_noise_load_without_torch():
    code = "import clients.dp.grid, clients.dp.randomness, clients.dp.sampling, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "opacus", "flwr", "pandas"} & set(loaded)
