"""Shares of noise: wide enough together, and as smooth as one draw, counted in whole numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.entries import MechanismEvent
from audit.epsilon import EpsilonError, check_event, on_one_footing, recompute
from audit.shared_noise import (
    SharedNoiseError,
    alone,
    check_shares,
    log_ratio,
    share_grid,
    site_level,
    site_sensitivity_grid,
)

EVENT = MechanismEvent(
    mechanism="discrete_gaussian",
    sampling="full",
    sample_rate="1",
    steps=1,
    sigma_grid=3_000_000,
    sensitivity_grid=1_048_600,
    dimension=30,
    grid_bits=20,
    relation="add_remove",
    unit="row",
    share_grid=1_000_000,
    sharers=9,
    site_sensitivity_grid=4_000_000,
)


@given(st.integers(1, 2**32), st.integers(1, 1000))
def test_a_share_is_the_least_that_suffices(sigma: int, sharers: int) -> None:
    share = share_grid(sigma, sharers)
    assert sharers * share**2 >= sigma**2
    assert share == 1 or sharers * (share - 1) ** 2 < sigma**2


def discrete_gaussian(sigma: float, reach: int) -> np.ndarray:
    values = np.exp(-(np.arange(-reach, reach + 1, dtype=np.float64) ** 2) / (2 * sigma**2))
    return values / values.sum()


@pytest.mark.parametrize(("sigma", "shares"), [(0.8, 2), (0.8, 3), (1.0, 2), (1.0, 4), (1.3, 3)])
def test_a_sum_of_shares_lies_as_near_one_draw_as_is_proved(sigma: float, shares: int) -> None:
    """Where the difference can be seen at all: by adding the distributions up."""
    total = single = discrete_gaussian(sigma, 40)
    for _ in range(shares - 1):
        total = np.convolve(total, single)
    middle, span = len(total) // 2, math.ceil(5 * sigma * math.sqrt(shares))
    one = discrete_gaussian(sigma * math.sqrt(shares), middle)
    window = slice(middle - span, middle + span + 1)
    found = float(np.abs(np.log(total[window] / one[window])).max())
    bound = log_ratio(sigma, shares)
    assert 1e-12 < found <= bound + 1e-9, (found, bound)


def test_from_a_share_of_eight_on_nobody_could_tell() -> None:
    assert log_ratio(8, 1000) * 1e12 < 1e-250
    assert log_ratio(0.1, 2) == math.inf


@pytest.mark.parametrize(
    "changes",
    [
        {"share_grid": 999_999},
        {"sharers": 8},
        {"share_grid": 0},
        {"sharers": 0},
        {"sharers": 1, "share_grid": 3_000_000},
        {"share_grid": 7, "sigma_grid": 21},
        {"share_grid": -1_000_000},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_shares_that_make_less_than_the_noise_are_refused(changes: dict[str, int]) -> None:
    check_shares(EVENT)
    bad = replace(EVENT, **changes)  # type: ignore[arg-type]
    with pytest.raises(SharedNoiseError):
        check_shares(bad)
    with pytest.raises(EpsilonError):
        check_event(bad)


def test_shared_noise_costs_what_the_same_noise_of_one_site_costs() -> None:
    plain = replace(EVENT, share_grid=0, sharers=0, site_sensitivity_grid=0)
    assert recompute([EVENT] * 30, 1e-5) == recompute([plain] * 30, 1e-5)
    by_itself = recompute([alone(EVENT)] * 30, 1e-5).value
    assert by_itself > 3 * recompute([EVENT] * 30, 1e-5).value
    assert alone(plain) == plain


def test_a_whole_site_counts_with_its_own_sensitivity_and_without_sampling() -> None:
    sampled = replace(EVENT, sampling="poisson", sample_rate="0.1")
    whole = site_level(sampled)
    assert (whole.unit, whole.relation, whole.sampling, whole.sample_rate) == (
        "site",
        "zero_out",
        "full",
        "1",
    )
    assert whole.sensitivity_grid == EVENT.site_sensitivity_grid
    assert recompute([whole], 1e-5).value > recompute([sampled], 1e-5).value
    with pytest.raises(SharedNoiseError):
        site_level(replace(EVENT, site_sensitivity_grid=0))


def test_rows_and_sites_do_not_compose() -> None:
    with pytest.raises(EpsilonError, match="do not compose"):
        on_one_footing([EVENT, site_level(EVENT)])


def test_a_site_moves_the_sum_by_its_norm_and_the_rounding() -> None:
    from decimal import Decimal

    found = site_sensitivity_grid(
        grid_bits=20, max_grad_norm=Decimal("0.5"), max_update_norm=Decimal("2"), dimension=100,
        precision="float64",
    )  # fmt: skip
    assert 4 * 2**20 + 10 <= found <= math.ceil(4 * 2**20 * 1.000002) + 10
