"""Coins and noise: distribution, tails, and no stream ever drawn twice."""

from __future__ import annotations

import copy
import math
import os
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from clients.dp.errors import TermsError
from clients.dp.randomness import SecureRandom, UnsafeSeededRandom


def exact_probabilities(sigma: float) -> tuple[np.ndarray, np.ndarray]:
    reach = math.ceil(12 * sigma) + 2
    k = np.arange(-reach, reach + 1)
    weights = np.exp(-(k.astype(float) ** 2) / (2 * sigma**2))
    return k, weights / weights.sum()


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1, 3, 50])
def test_small_noise_passes_a_chi_square_against_the_exact_probabilities(sigma, seeded):
    draws = seeded(1).discrete_gaussian(sigma, 200_000)
    k, p = exact_probabilities(sigma)
    counts = np.array([(draws == value).sum() for value in k])
    assert counts.sum() == len(draws)
    common = p * len(draws) >= 10
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(p[common], p[~common].sum()) * len(draws)
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < stats.chi2.isf(1e-6, len(observed) - 1)


@pytest.mark.parametrize("wrong", [0.67, 0.73])
def test_the_chi_square_would_notice_a_sigma_that_is_five_percent_off(wrong, seeded):
    draws = seeded(1).discrete_gaussian(wrong, 200_000)
    k, p = exact_probabilities(0.7)
    common = p * len(draws) >= 10
    observed = np.array([(draws == value).sum() for value in k[common]])
    expected = p[common] * len(draws)
    assert ((observed - expected) ** 2 / expected).sum() > stats.chi2.isf(1e-6, common.sum())


@pytest.mark.parametrize("sigma", [2**24, 3 * 2**30 + 1, 2**32])
def test_large_noise_has_the_moments_and_tails_of_a_gaussian(sigma, seeded):
    draws = seeded(2).discrete_gaussian(sigma, 400_000) / sigma
    n = len(draws)
    assert abs(draws.mean()) < 5 / math.sqrt(n)
    assert abs(draws.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((draws**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert stats.kstest(draws, "norm").pvalue > 1e-6
    beyond = (np.abs(draws) > 3).sum()
    assert abs(beyond - n * 0.0026998) < 6 * math.sqrt(n * 0.0027)


def test_large_noise_uses_the_lowest_bit_of_the_grid(seeded):
    draws = seeded(3).discrete_gaussian(2**30, 100_000)
    for modulus in (2, 16, 256):
        counts = np.bincount(draws % modulus, minlength=modulus)
        expected = len(draws) / modulus
        assert ((counts - expected) ** 2 / expected).sum() < stats.chi2.isf(1e-6, modulus - 1)


def test_signs_are_fair_and_zero_is_not_counted_twice(seeded):
    draws = seeded(4).discrete_gaussian(1, 300_000)
    positive, negative, zero = (draws > 0).sum(), (draws < 0).sum(), (draws == 0).sum()
    assert abs(positive - negative) < 5 * math.sqrt(positive + negative)
    k, p = exact_probabilities(1)
    assert abs(zero / len(draws) - p[k == 0][0]) < 0.005


@pytest.mark.parametrize("sigma", [0, -1, math.nan, math.inf, 2**32 + 1])
def test_a_sigma_out_of_range_is_refused(sigma):
    with pytest.raises(TermsError, match="sigma"):
        SecureRandom().discrete_gaussian(sigma, 3)


def test_no_draws_are_an_empty_vector():
    assert SecureRandom().discrete_gaussian(3, 0).shape == (0,)
    assert SecureRandom().uniform_bytes(0) == b""


@pytest.mark.parametrize("p", [1e-3, 0.25, 0.5, 0.999])
def test_coins_fall_true_at_their_probability(p, seeded):
    n = 400_000
    assert abs(seeded(5).bernoulli(p, n).sum() - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_certain_coins_are_exact_and_draw_nothing(seeded):
    random, untouched = seeded(6), seeded(6)
    assert random.bernoulli(1.0, 1000).all()
    assert not random.bernoulli(0.0, 1000).any()
    assert random.uniform_bytes(16) == untouched.uniform_bytes(16)


@pytest.mark.parametrize("p", [-1e-9, 1.0000001, math.nan])
def test_a_probability_outside_0_and_1_is_refused(p):
    with pytest.raises(TermsError, match="probability"):
        SecureRandom().bernoulli(p, 3)


def test_two_generators_never_agree():
    first, second = SecureRandom(), SecureRandom()
    assert first.uniform_bytes(32) != second.uniform_bytes(32)
    assert first.child("noise").uniform_bytes(32) != first.child("noise").uniform_bytes(32)


def test_one_stream_never_repeats_itself():
    random = SecureRandom()
    blocks = {random.uniform_bytes(16) for _ in range(2000)}
    assert len(blocks) == 2000


def test_torch_and_numpy_seeds_do_not_reach_the_stream():
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)
        drawn.append(SecureRandom().discrete_gaussian(2**20, 50))
    assert not np.array_equal(drawn[0], drawn[1])


def test_long_requests_equal_short_ones_laid_end_to_end(seeded):
    size = (1 << 20) + 77
    whole, parts = seeded(7), seeded(7)
    assert whole.uniform_bytes(size) == b"".join(
        [parts.uniform_bytes(1 << 19) for _ in range(2)]
    ) + parts.uniform_bytes(77)


@pytest.mark.parametrize(
    "make", [SecureRandom, lambda: UnsafeSeededRandom(b"k" * 32)], ids=["secure", "seeded"]
)
def test_a_forked_child_does_not_draw_its_parents_noise(make):
    random = make()
    random.uniform_bytes(16)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, random.uniform_bytes(64))
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    from_child = os.read(read, 64)
    os.close(read)
    assert len(from_child) == 64
    assert from_child != random.uniform_bytes(64)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_stream_cannot_be_copied_or_stored(duplicate):
    with pytest.raises(TypeError, match="same noise"):
        duplicate(SecureRandom())


def test_a_seeded_stream_repeats_and_its_children_differ_by_label(seeded):
    assert seeded(8).uniform_bytes(99) == seeded(8).uniform_bytes(99)
    assert seeded(8).child("a").uniform_bytes(9) == seeded(8).child("a").uniform_bytes(9)
    assert seeded(8).child("a").uniform_bytes(9) != seeded(8).child("b").uniform_bytes(9)


@pytest.mark.parametrize("key", [b"", b"short", b"x" * 33])
def test_a_seed_of_another_length_is_refused(key):
    with pytest.raises(TermsError, match="32 bytes"):
        UnsafeSeededRandom(key)


def test_a_copy_of_a_running_process_does_not_repeat_the_noise():
    """A restored snapshot goes on with the same key; every release therefore begins with a fresh one."""
    one, other = SecureRandom(), SecureRandom()
    key = bytes(range(32))
    one._rekey(key)
    other._rekey(key)
    assert one.uniform_bytes(64) == other.uniform_bytes(64)
    one.refresh()
    other.refresh()
    assert one.uniform_bytes(64) != other.uniform_bytes(64)
