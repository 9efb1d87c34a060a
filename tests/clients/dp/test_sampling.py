from __future__ import annotations

import math

import numpy as np
import pytest

from clients.dp.errors import TermsError
from clients.dp.sampling import sample_rows, sampling_of


def test_each_row_has_a_coin_of_its_own(seeded):
    random = seeded(1)
    taken = np.zeros(50)
    sizes = []
    for _ in range(4000):
        chosen = sample_rows(random, rows=50, sample_rate=0.3)
        taken[chosen] += 1
        sizes.append(len(chosen))
    assert np.abs(taken - 1200).max() < 5.5 * math.sqrt(4000 * 0.3 * 0.7)
    assert abs(np.var(sizes) - 50 * 0.3 * 0.7) < 1.5  # binomial sizes: a fixed batch would have variance 0


def test_neighbouring_rows_are_chosen_independently(seeded):
    random = seeded(2)
    chosen = np.zeros((4000, 2))
    for step in range(4000):
        chosen[step, sample_rows(random, rows=2, sample_rate=0.5)] = 1
    assert abs(np.corrcoef(chosen.T)[0, 1]) < 5 / math.sqrt(4000)


def test_a_row_more_changes_no_other_rows_coin(seeded):
    short = sample_rows(seeded(3), rows=128, sample_rate=0.25)
    long = sample_rows(seeded(3), rows=129, sample_rate=0.25)
    assert np.array_equal(short, long[long < 128])


def test_rate_one_takes_everybody_without_a_coin(seeded):
    random, untouched = seeded(4), seeded(4)
    assert sample_rows(random, rows=10, sample_rate=1) is None
    assert random.uniform_bytes(8) == untouched.uniform_bytes(8)


def test_no_rows_give_no_rows(seeded):
    assert len(sample_rows(seeded(5), rows=0, sample_rate=0.5)) == 0


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, math.nan, math.inf])
def test_a_rate_outside_0_to_1_is_refused(rate):
    with pytest.raises(TermsError, match="sample_rate"):
        sampling_of(rate)


def test_the_words_are_those_of_the_event():
    assert (sampling_of(1), sampling_of(0.25)) == ("full", "poisson")
