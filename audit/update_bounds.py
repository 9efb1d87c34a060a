"""How long an honest update can be, and how much of it is noise: constants of the charter, in grid units.

A site releases a sum of clipped gradients with discrete Gaussian noise, or a difference of weights that such
sums made. Both have a largest length that an honest site passes with probability below 2**-60, whatever its
rows are, as long as they are no more than the charter's `nominal_rows`. Everything is integer and rational
arithmetic, so that coordinator and verifier decide alike.

With t = 44: a vector of d independent noises, each subgaussian with parameter sigma (Canonne et al. 2020,
corollary 17), is longer than sigma (sqrt(d) + sqrt(2 t)) with probability at most exp(-t) (Hsu et al. 2012,
theorem 2.1), and a binomial count of mean v exceeds v + sqrt(2 v t) + t/3 as rarely (Bernstein).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

from audit.decimals import parse_decimal

_T: Final = 44
_ROOT_2T: Final = 10  # ceil(sqrt(2 t))
GRID_SLACK: Final = {"float64": Fraction(1, 10**6), "float32": Fraction(1, 2**8)}
"""Relative excess of a float sum's sensitivity over the clipping norm; derived in `clients.dp.grid`."""


def planned_sensitivity(*, grid_bits: int, dimension: int, relation: str, precision: str) -> int:
    """Return the least sensitivity of a release, in grid units, that a charter's terms permit."""
    clipped = math.ceil((1 << grid_bits) * (1 + GRID_SLACK[precision]))
    return (2 if relation == "replace_one" else 1) * (clipped + _root(dimension))


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateTerms:
    """The charter's constants behind one site's updates."""

    nominal_rows: int
    sample_rate: Fraction
    rows_per_unit: int
    grid_bits: int
    precision: str
    sigma_grid: int
    dimension: int  # coordinates that get noise
    released: int  # coordinates that leave the site
    local_steps: int  # noised sums behind an update: 1 where the whole update gets noise once
    local_learning_rate: Fraction

    @classmethod
    def of_charter(cls, charter: Any, site: str, *, dimension: int, released: int) -> UpdateTerms:
        """Read them from a charter's canonical JSON values; `site` must be a member."""
        plan, privacy = charter["plan"], charter["privacy"]
        sensitivity = planned_sensitivity(
            grid_bits=privacy["grid_bits"],
            dimension=dimension,
            relation=privacy["relation"],
            precision=privacy["precision"],
        )
        return cls(
            nominal_rows=next(item["nominal_rows"] for item in charter["sites"] if item["name"] == site),
            sample_rate=_fraction(privacy["sample_rate"]),
            rows_per_unit=privacy["max_rows_per_subject"] if privacy["unit"] == "subject" else 1,
            grid_bits=privacy["grid_bits"],
            precision=privacy["precision"],
            sigma_grid=math.ceil(_fraction(privacy["noise_multiplier"]) * sensitivity),
            dimension=dimension,
            released=released,
            local_steps=1 if privacy["unit"] == "site" else plan["local_steps"],
            local_learning_rate=_fraction(plan["local_learning_rate"]),
        )

    @property
    def norm_bound(self) -> int:
        """The length, in grid units, that no honest update has."""
        clipped = math.ceil((1 << self.grid_bits) * (1 + GRID_SLACK[self.precision]))
        signal = Fraction(self._rows() * clipped, self.rows_per_unit) + _root(self.dimension)
        tail = (_root(self.released) + _ROOT_2T) ** 2
        noise = math.isqrt(self.local_steps * self.sigma_grid**2 * tail) + 1
        if self.local_steps == 1:
            return math.ceil(signal + noise)
        return math.ceil(self._step * (self.local_steps * signal + noise)) + _root(self.released)

    @property
    def noise_std(self) -> float:
        """The noise of one coordinate as released, in grid units."""
        if self.local_steps == 1:
            return float(self.sigma_grid)
        return float(self._step) * self.sigma_grid * math.sqrt(self.local_steps)

    @property
    def _step(self) -> Fraction:
        return self.local_learning_rate / (self.nominal_rows * self.sample_rate)

    def _rows(self) -> int:
        mean = self.nominal_rows * self.sample_rate
        spread = math.isqrt(math.ceil(2 * mean * (1 - self.sample_rate) * _T)) + 1
        return min(self.nominal_rows, math.ceil(mean) + spread + _T // 3 + 1)


def longest_sum(*, grid_bits: int, precision: str, dimension: int, shares: Sequence[int]) -> int:
    """Return the length, in grid units, that no sum of whole updates has, one for each share of noise.

    Each update is clipped to 2**grid_bits units before it is rounded; `shares` are the widths of the noise
    that their sites drew. Where the unit is the site this holds whatever the rows are, so a longer sum
    proves that somebody sent what was not clipped, or more noise than it said, and not who.
    """
    clipped = math.ceil((1 << grid_bits) * (1 + GRID_SLACK[precision])) + _root(dimension)
    tail = (_root(dimension) + _ROOT_2T) ** 2
    return len(shares) * clipped + math.isqrt(sum(share * share for share in shares) * tail) + 1


def square_norm(values: Sequence[int]) -> int:
    """Return the squared length of an update, exactly."""
    return sum(value * value for value in values)


def is_too_long(terms: UpdateTerms, values: Sequence[int]) -> bool:
    return square_norm(values) > terms.norm_bound**2


def _root(value: int) -> int:
    return math.isqrt(value - 1) + 1


def _fraction(text: str) -> Fraction:
    value: Decimal = parse_decimal(text)
    return Fraction(value)
