"""Every layer a charter can name, built as the federation builds it, gives the same sum as the definition."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from clients.dp.bookkeeping import BookPass, ClippedGradient
from clients.dp.chain import ChainPass
from clients.dp.grid import sensitivity_grid, sigma_grid
from clients.dp.mechanism import Mechanism, MechanismTerms
from federation.mechanism import release_event
from federation.torch_models import build_model

IMAGE = [
    {"layer": "reshape", "shape": [1, 8, 8]},
    {"layer": "conv2d", "in": 1, "out": 4, "kernel": 3, "stride": 1, "padding": 1},
    {"layer": "group_norm", "groups": 2, "channels": 4},
    {"layer": "relu"},
    {"layer": "max_pool2d", "kernel": 2},
    {"layer": "conv2d", "in": 4, "out": 6, "kernel": 3, "stride": 2, "padding": 1},
    {"layer": "gelu"},
    {"layer": "avg_pool2d", "kernel": 2},
    {"layer": "flatten"},
    {"layer": "linear", "in": 6, "out": 3, "bias": 1},
    {"layer": "site_intercept", "sites": 4, "out": 3},
]
TABLE = [
    {"layer": "linear", "in": 6, "out": 16, "bias": 1},
    {"layer": "tanh"},
    {"layer": "linear", "in": 16, "out": 8, "bias": 0},
    {"layer": "sigmoid"},
    {"layer": "linear", "in": 8, "out": 3, "bias": 1},
    {"layer": "site_intercept", "sites": 3, "out": 3},
]
NORMED = [
    {"layer": "linear", "in": 6, "out": 16, "bias": 1},
    {"layer": "layer_norm", "size": 16},
    {"layer": "gelu"},
    {"layer": "linear", "in": 16, "out": 3, "bias": 1},
]
CODES = [
    {"layer": "embedding", "count": 7, "size": 4},
    {"layer": "flatten"},
    {"layer": "linear", "in": 24, "out": 3, "bias": 1},
]


@pytest.mark.parametrize(
    ("layers", "width", "way"),
    [(IMAGE, 64, BookPass), (TABLE, 6, ChainPass), (NORMED, 6, BookPass), (CODES, 6, BookPass)],
    ids=["image", "table", "normed", "codes"],
)
@pytest.mark.parametrize("site", [1, None])
def test_sum_equals_vmap(vmap_gradients, clip_and_sum, rng, layers, width, way, site):
    model = build_model(layers, site=site)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=rng) * 0.5)
    if layers is CODES:
        inputs = torch.randint(0, 7, (19, width), generator=rng).double()  # codes arrive among float columns
    else:
        inputs = torch.randn(19, width, generator=rng).double()
    targets = torch.randint(0, 3, (19,), generator=rng)
    rows = vmap_gradients(model, inputs, targets, functional.cross_entropy)
    norm = float(rows.norm(dim=1).median())
    engine = ClippedGradient(model, norm, "cross_entropy")
    assert isinstance(engine._pass, way)
    assert torch.allclose(engine(inputs, targets), clip_and_sum(rows, norm), rtol=1e-9, atol=1e-12)


def test_codes_that_arrive_as_nan_or_out_of_range_contribute_zero(rng):
    model = build_model(CODES)
    nn.init.normal_(model[0].weight, generator=rng)
    engine = ClippedGradient(model, 0.5, "cross_entropy")
    inputs, targets = torch.zeros(4, 6).double(), torch.zeros(4, dtype=torch.int64)
    expected = engine(inputs[:1], targets[:1])
    inputs[1, 0], inputs[2, 1], inputs[3, 2] = torch.nan, 7.0, -1.0
    assert torch.allclose(engine(inputs, targets), expected, rtol=1e-12)


@pytest.mark.parametrize("relation", ["add_remove", "zero_out", "replace_one"])
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("multiplier", [Decimal("0.1"), Decimal("5.044"), Decimal("20")])
def test_what_runs_is_what_the_charter_plans(relation, precision, multiplier):
    planned = release_event(
        noise_multiplier=multiplier,
        sample_rate=Decimal("0.25"),
        local_steps=1,
        dimension=27,
        grid_bits=20,
        relation=relation,
        unit="row",
        precision=precision,
    )
    terms = MechanismTerms(
        max_grad_norm=Decimal("0.3"),
        noise_multiplier=multiplier,
        sample_rate=Decimal("0.25"),
        relation=relation,
        grid_bits=20,
        precision=precision,
    )
    release = Mechanism(nn.Linear(8, 3), terms, "cross_entropy").release(
        torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    )
    assert (release.sigma_grid, release.sensitivity_grid) == (planned.sigma_grid, planned.sensitivity_grid)
    assert (release.sampling, release.steps) == (planned.sampling, planned.steps)
    assert Fraction(release.sigma_grid, release.sensitivity_grid) >= Fraction(multiplier)


def test_the_exact_decimal_is_what_counts_not_its_double():
    sensitivity = sensitivity_grid(grid_bits=20, dimension=10, relation="add_remove", precision="float64")
    exact = sigma_grid(noise_multiplier=Decimal("1.1"), sensitivity=sensitivity * 10**6 // 10**6)
    assert exact == -(-11 * sensitivity // 10)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=64), min_size=6, max_size=6),
    label=st.integers(-5, 5) | st.sampled_from([2**62, -(2**63)]),
    layers=st.sampled_from([TABLE, NORMED, CODES]),
)
def test_no_row_whatsoever_raises_or_moves_the_sum_by_more_than_the_norm(values, label, layers):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(3)
    model = build_model(layers, site=0 if layers is TABLE else None)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.5)
    engine = ClippedGradient(model, 0.25, "cross_entropy", self_check=False)
    inputs = torch.randint(0, 7, (5, 6), generator=generator).double()
    targets = torch.randint(0, 3, (5,), generator=generator)
    without = engine(inputs, targets)
    row = torch.tensor([values], dtype=torch.float64)
    found = engine(torch.cat([inputs, row]), torch.cat([targets, torch.tensor([label])]))
    assert np.isfinite(found.numpy()).all()
    assert float((found - without).norm()) <= 0.25 * (1 + 1e-9)
