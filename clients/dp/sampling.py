"""Which rows take part in a step: independent coins, or everybody.

The number of rows stays inside: it decides how many coins are tossed, never what a coin's probability is.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clients.dp.errors import TermsError
from clients.dp.randomness import SecureRandom

Sampling = Literal["poisson", "full"]


def sampling_of(sample_rate: float | Decimal) -> Sampling:
    """Return what a charter's `sample_rate` q in (0, 1] means: q = 1 is every row, anything less is Poisson.

    Raises:
        TermsError: q is outside (0, 1].
    """
    if not 0 < sample_rate <= 1:
        raise TermsError("sample_rate", sample_rate, "give a probability in (0, 1]")
    return "full" if sample_rate == 1 else "poisson"


def sample_rows(random: SecureRandom, *, rows: int, sample_rate: float | Decimal) -> NDArray[np.int64] | None:
    """Return the indices of the rows that take part, ascending; None is all of them (q = 1, no coin).

    Args:
        random: the stream of coins.
        rows: how many rows the site holds; each gets a coin of its own.
        sample_rate: probability of each row, a constant of the charter.
    """
    if sampling_of(sample_rate) == "full":
        return None
    return np.flatnonzero(random.bernoulli(sample_rate, rows))
