"""The integer grid: from a float sum of clipped gradients to integers whose sensitivity is known exactly.

The clipping norm C maps to 2**grid_bits units. Two sums that differ in one row differ, as floats, by at most
C (1 + slack), where `slack` covers what floating point adds; rounding each coordinate to the nearest integer
moves the difference by at most one unit a coordinate, sqrt(dimension) in all. Everything here is integer or
rational arithmetic, and loads without torch.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from clients.dp.errors import GridOverflowError, TermsError
from clients.dp.randomness import MAX_SIGMA_GRID

Relation = Literal["add_remove", "zero_out", "replace_one"]
Precision = Literal["float64", "float32"]

SLACK: dict[Precision, Fraction] = {"float64": Fraction(1, 10**6), "float32": Fraction(1, 2**8)}
"""Relative excess of a float sum's sensitivity over C.

With u the unit roundoff, B rows in the sum and k additions behind each coordinate:

1. The clipping factor comes from a rounded norm. A norm is a sum of at most D squares, or a Gram product with
   an upward guard (`layers`), so a scaled gradient exceeds C by less than D u.
2. Removing a row changes how the others are added up; each float sum errs by at most k u B C (Higham 3.1).
3. A row's own gradient may round differently in another batch: q u B C, where q grows with the network's
   depth, width and conditioning. This term is a model of rounding, not a bound for every network there is.

Sums are taken in blocks of 1024 rows, so with one position a row k is about 1024 + B / 1024.
float64, u = 1.1e-16: 2 (k + q) u B < 1e-6 up to 2**20 rows and k + q = 4000.
float32, u = 6.0e-8: 2 (k + q) u B < 2**-8 only while (k + q) B < 3e4. Beyond it 2**-8 counts on roundings
that do not all point the same way, so float32 is a declared choice and float64 the default.
"""

LEAST_CLIP: dict[Precision, float] = {"float64": 1e-6, "float32": 1e-3}
MOST_CLIP = 1e6
"""A row's clipping norm: below it a square can underflow to zero while the gradient itself is longer."""

MAX_ROWS = 1 << 24
"""Rows for which the sum is sure to fit; a coordinate past that is held at the limit."""


def ceil_sqrt(value: int) -> int:
    """Return the smallest integer whose square is at least `value` >= 0."""
    return math.isqrt(value - 1) + 1 if value > 0 else 0


def check_clip(max_grad_norm: float | Decimal, *, rows_per_unit: int, precision: Precision) -> None:
    """Refuse a clipping norm at which floating point itself would break the bound.

    Raises:
        TermsError: C, or a row's share of it, is outside the range.
    """
    least = LEAST_CLIP[precision]
    if not (max_grad_norm <= MOST_CLIP and max_grad_norm >= least * rows_per_unit):
        raise TermsError(
            "max_grad_norm", max_grad_norm, f"give {least:g} for each row of a person to {MOST_CLIP:g}"
        )


def sensitivity_grid(*, grid_bits: int, dimension: int, relation: Relation, precision: Precision) -> int:
    """Return an upper bound, in grid units, on the L2 distance of two neighbouring rounded sums.

    `add_remove` and `zero_out` move the sum by one clipped gradient; `replace_one` by two, each with its own
    rounding, because a sampled step may hold the one and not the other.

    Raises:
        TermsError: a value is outside its range.
    """
    if not 1 <= grid_bits <= 38:
        raise TermsError("grid_bits", grid_bits, "give a whole number from 1 to 38")
    if dimension < 1:
        raise TermsError("dimension", dimension, "the model needs a trainable parameter")
    if precision not in SLACK:
        raise TermsError("precision", precision, "give float64 or float32")
    if relation not in ("add_remove", "zero_out", "replace_one"):
        raise TermsError("relation", relation, "give add_remove, zero_out or replace_one")
    gradients = 2 if relation == "replace_one" else 1
    return gradients * (math.ceil((1 << grid_bits) * (1 + SLACK[precision])) + ceil_sqrt(dimension))


def sigma_grid(*, noise_multiplier: float | Decimal | Fraction, sensitivity: int) -> int:
    """Return the noise in grid units: the least integer of at least noise_multiplier * sensitivity.

    Raises:
        TermsError: the multiplier is not positive and finite, or the noise is out of the sampler's range.
    """
    if not (noise_multiplier > 0 and math.isfinite(noise_multiplier)):
        raise TermsError("noise_multiplier", noise_multiplier, "give a positive number")
    sigma = math.ceil(Fraction(noise_multiplier) * sensitivity)
    if sigma > MAX_SIGMA_GRID:
        raise TermsError(
            "noise_multiplier", noise_multiplier, "with this grid_bits the noise passes 2**32; lower one"
        )
    return sigma


def float_below(limit: int) -> float:
    """Return the largest float that is at most `limit`: the nearest one can be hundreds of units above it."""
    nearest = float(limit)
    return nearest if int(nearest) <= limit else math.nextafter(nearest, 0.0)


def sum_limit(*, grid_bits: int, sigma: int, steps: int, sites: int = 1) -> int:
    """Return the largest magnitude of a coordinate with which `steps` noisy sums of `sites` fit in int64.

    The noise sampler cannot pass 43 (sigma + 1).

    Raises:
        GridOverflowError: fewer than MAX_ROWS clipped rows would fit.
    """
    limit = (2**63 - 1) // (steps * sites) - 44 * (sigma + 1)
    if limit < MAX_ROWS * 2 ** (grid_bits + 1):
        raise GridOverflowError(grid_bits=grid_bits, sigma_grid=sigma)
    return limit
