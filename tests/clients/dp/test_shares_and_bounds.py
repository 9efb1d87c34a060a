"""A site's share of a shared noise, and the bound on what a whole site moves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.shared_noise import share_grid
from clients.dp.errors import TermsError
from clients.dp.grid import MAX_ROWS, float_below, sum_limit
from clients.dp.mechanism import Mechanism, MechanismTerms
from federation.families import logistic_regression
from federation.torch_models import build_model

INPUTS = 5


def terms(**changes: Any) -> MechanismTerms:
    usual: dict[str, Any] = {
        "max_grad_norm": 1.0,
        "noise_multiplier": 2.0,
        "sample_rate": 1.0,
        "relation": "add_remove",
        "grid_bits": 20,
    }
    return MechanismTerms(**(usual | changes))


def mechanism(seen: dict[str, Any] | None = None, *, inputs: int = INPUTS, **changes: Any) -> Mechanism:
    def keep(name: str, value: object) -> None:
        if seen is not None:
            seen[name] = value

    model = build_model(logistic_regression(inputs, 1))
    made = Mechanism(model, terms(**changes), "binary_cross_entropy", recorder=keep)
    made.load(np.linspace(-1, 1, inputs + 1))  # the same base model in each
    return made


def rows(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.uniform(-1, 1, (count, INPUTS)))
    return x, torch.from_numpy(random.integers(0, 2, count).astype(np.float64))


@pytest.mark.parametrize("sharers", [2, 3, 9])
def test_a_site_draws_its_share_and_enough_shares_make_the_noise(sharers: int) -> None:
    size = 20_000
    one = mechanism(inputs=size, sharers=sharers, summed_sites=sharers + 1)
    nothing = torch.zeros((0, size), dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    releases = [one.release(*nothing) for _ in range(sharers)]
    assert {release.share_grid for release in releases} == {share_grid(one.sigma_grid, sharers)}
    each = float(np.std(releases[0].update))
    assert each == pytest.approx(one.sigma_grid / math.sqrt(sharers), rel=0.03)
    total = sum(release.update for release in releases)
    assert float(np.std(total)) == pytest.approx(one.sigma_grid, rel=0.03)
    apart = np.corrcoef(releases[0].update, releases[1].update)[0, 1]
    assert abs(apart) < 0.05  # nobody draws what another drew


def test_a_site_alone_draws_everything() -> None:
    assert mechanism().share_grid == mechanism().sigma_grid
    assert mechanism(sharers=4).share_grid < mechanism().sigma_grid


def test_a_share_is_for_one_step() -> None:
    with pytest.raises(TermsError, match="sharers"):
        terms(sharers=3, local_steps=2, local_learning_rate=0.1, normaliser=10)
    with pytest.raises(TermsError, match="max_update_norm"):
        terms(max_update_norm=2.0, local_steps=2, local_learning_rate=0.1, normaliser=10)
    with pytest.raises(TermsError, match="max_update_norm"):
        terms(max_update_norm=0.0)


def test_no_sum_of_all_sites_wraps_even_at_the_largest_draws() -> None:
    for sites in (3, 10, 1000):
        limit = sum_limit(grid_bits=20, sigma=1 << 22, steps=1, sites=sites)
        assert sites * (limit + 44 * ((1 << 22) + 1)) < 2**63
        assert limit >= MAX_ROWS * 2**21


@pytest.mark.parametrize("sites", [1, 3, 7, 1000])
def test_a_coordinate_held_at_the_limit_is_not_above_it(sites: int) -> None:
    """The nearest float to the limit can lie hundreds above it: more than is left for the noise."""
    one = mechanism(grid_bits=8, noise_multiplier=0.03, summed_sites=sites)
    limit = sum_limit(grid_bits=8, sigma=one.share_grid, steps=1, sites=sites)
    for sign in (1, -1):
        held = one._to_grid(torch.full((2,), sign * 1e30, dtype=torch.float64))
        assert {sign * int(value) for value in held} == {int(float_below(limit))}
        assert sites * (abs(int(held[0])) + 43 * (one.share_grid + 1)) < 2**63
    assert 0 <= limit - float_below(limit) <= 1024


@pytest.mark.parametrize("bound", [0.5, 3.0, 1000.0])
def test_a_whole_site_is_never_longer_than_its_bound(bound: float) -> None:
    seen: dict[str, Any] = {}
    one = mechanism(seen, max_update_norm=bound)
    one.release(*rows(400))
    length = float(np.linalg.norm(seen["inside.sum"].astype(np.float64)))
    assert length <= one.site_sensitivity_grid
    if bound < 100:
        assert length > 0.99 * bound * 2**20  # it was drawn in to the bound, not beyond


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.3, 1.0, 4.0, 20.0]))
def test_the_bound_brings_neighbouring_sums_no_further_apart(seed: int, bound: float) -> None:
    x, y = rows(30, seed)
    with_row: dict[str, Any] = {}
    without: dict[str, Any] = {}
    one = mechanism(with_row, max_update_norm=bound)
    one.release(x, y)
    mechanism(without, max_update_norm=bound).release(x[1:], y[1:])
    apart = (with_row["inside.sum"] - without["inside.sum"]).astype(np.float64)
    assert float(np.linalg.norm(apart)) <= one.sensitivity_grid
