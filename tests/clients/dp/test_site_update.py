"""A whole site's update: however a site trains and whatever its rows are, one bound and one noise hold it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.dp.errors import TermsError
from clients.dp.mechanism import MechanismTerms
from clients.dp.site_update import LocalTraining, SiteMechanism, drawn_in, plain_training
from federation.families import logistic_regression, mlp
from federation.torch_models import build_model

INPUTS = 4
BOUND = 0.5


def mechanism(
    seen: dict[str, Any] | None = None,
    *,
    steps: int = 5,
    rate: float = 0.7,
    proximal: float = 0.0,
    **terms: Any,
) -> SiteMechanism:
    usual: dict[str, Any] = {
        "max_grad_norm": BOUND,
        "noise_multiplier": 2.0,
        "sample_rate": 1.0,
        "relation": "replace_one",
        "grid_bits": 20,
    }
    made = SiteMechanism(
        build_model(logistic_regression(INPUTS, 1)),
        MechanismTerms(**(usual | terms)),
        "binary_cross_entropy",
        LocalTraining(steps=steps, learning_rate=rate, proximal=proximal),
        recorder=None if seen is None else seen.__setitem__,
    )
    made.load(np.linspace(-1, 1, INPUTS + 1))
    return made


def rows(count: int, seed: int = 0, reach: float = 1.0) -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.uniform(-reach, reach, (count, INPUTS)))
    return x, torch.from_numpy(random.integers(0, 2, count).astype(np.float64))


def sent(x: Tensor, y: Tensor, **options: Any) -> np.ndarray:
    seen: dict[str, Any] = {}
    mechanism(seen, **options).release(x, y)
    total: np.ndarray = seen["inside.sum"]
    return total


def length(values: np.ndarray) -> float:
    return math.sqrt(sum(int(value) ** 2 for value in values))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 999), st.sampled_from([1.0, 1e3, 1e150, 1e300]))
def test_any_two_sites_are_no_further_apart_than_the_sensitivity(
    count: int, other: int, seed: int, reach: float
) -> None:
    one, two = sent(*rows(count, seed, reach), rate=5.0), sent(*rows(other, seed + 1), rate=5.0)
    replaced = mechanism().sensitivity_grid
    zeroed = mechanism(relation="zero_out").sensitivity_grid
    assert length(one - two) <= replaced == 2 * zeroed
    assert max(length(one), length(two)) <= zeroed


def test_an_update_within_the_bound_is_plain_gradient_descent() -> None:
    x, y = rows(60)
    weights = torch.linspace(-1, 1, INPUTS + 1, dtype=torch.float64)
    theta = weights.clone()
    for _ in range(5):
        error = torch.sigmoid(x @ theta[:INPUTS] + theta[INPUTS]) - y
        theta = theta - 0.1 * torch.cat([error @ x, error.sum()[None]]) / len(x)
    assert float((theta - weights).norm()) < BOUND
    found = sent(x, y, rate=0.1) * BOUND / 2**20
    assert found == pytest.approx((theta - weights).numpy(), abs=2e-6)


def test_no_row_is_clipped() -> None:
    """One row with a gradient a thousand times as long as the bound moves the update all the way."""
    x, y = torch.full((1, INPUTS), 500.0, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert length(sent(x, y, steps=1, rate=1.0)) == pytest.approx(2**20, rel=1e-4)


def test_how_many_rows_there_are_does_not_show() -> None:
    x, y = rows(7)
    assert sent(x.repeat(9, 1), y.repeat(9)) == pytest.approx(sent(x, y), abs=1)
    assert not sent(*rows(0)).any()


def test_what_cannot_be_used_is_left_out_and_nothing_is_refused() -> None:
    x, y = rows(20)
    spoilt, labels = x.clone(), y.clone()
    spoilt[3], spoilt[4, 1], labels[5] = math.nan, math.inf, math.nan
    kept = [row for row in range(20) if row not in (3, 4, 5)]
    assert np.array_equal(sent(spoilt, labels), sent(x[kept], y[kept]))
    assert not sent(torch.full((3, INPUTS), math.nan, dtype=torch.float64), y[:3]).any()


def test_training_that_blows_up_sends_zeros_as_any_site_may() -> None:
    model = build_model(mlp(INPUTS, 1, (3,), activation="relu"))
    x, _ = rows(20, reach=1e150)
    made = SiteMechanism(
        model,
        mechanism().terms,
        "squared_error",
        LocalTraining(steps=4, learning_rate=1e10),
        recorder=(seen := dict[str, Any]()).__setitem__,
    )
    release = made.release(x, torch.ones(20, dtype=torch.float64))
    assert not seen["inside.sum"].any()
    assert release.update.any()  # noise all the same


def test_noise_is_drawn_once_whatever_the_steps_and_is_the_site_s_share() -> None:
    size = 20_000
    for steps in (1, 3):
        made = SiteMechanism(
            build_model(logistic_regression(size, 1)),
            MechanismTerms(
                max_grad_norm=1,
                noise_multiplier=2,
                sample_rate=1,
                relation="zero_out",
                grid_bits=20,
                sharers=4,
                summed_sites=5,
            ),
            "binary_cross_entropy",
            LocalTraining(steps=steps, learning_rate=1.0),
        )
        release = made.release(torch.zeros((0, size)), torch.zeros(0))
        assert release.steps == 1
        assert float(np.std(release.update)) == pytest.approx(release.sigma_grid / 2, rel=0.03)


def test_a_release_leaves_the_model_as_it_was_and_draws_anew() -> None:
    made, (x, y) = mechanism(), rows(30)
    before = made._weights()
    one, two = made.release(x, y), made.release(x, y)
    assert torch.equal(made._weights(), before)
    assert (one.update != two.update).any()


def test_sums_of_gradients_prepared_for_many_are_never_what_a_site_sends() -> None:
    """Virtual sites have their clipped sums made in one pass; a whole update is trained at each."""
    seen: dict[str, Any] = {}
    made, sets = mechanism(seen), [rows(20, seed) for seed in range(3)]
    made.prepare(sets)
    for x, y in sets:
        made.release(x, y)
        assert np.array_equal(seen["inside.sum"], sent(x, y))


def test_whatever_is_summed_is_drawn_in_before_the_noise() -> None:
    """The bound is the last thing before the grid, so no other way to the sum gets round it."""
    made = mechanism(seen := {})
    made._noised(torch.full((INPUTS + 1,), 1e6, dtype=torch.float64))
    assert length(seen["inside.sum"]) <= made.sensitivity_grid / 2


def test_the_pull_keeps_an_update_shorter() -> None:
    x, y = rows(50)
    assert length(sent(x, y, rate=0.1, steps=20, proximal=5.0)) < length(sent(x, y, rate=0.1, steps=20))


def test_blocks_of_rows_add_up_to_all_of_them() -> None:
    x, y = rows(2500)
    halves = plain(x[:1000], y[:1000]), plain(x[1000:], y[1000:])
    assert plain(x, y).numpy() == pytest.approx((halves[0] * 0.4 + halves[1] * 0.6).numpy(), abs=1e-12)


def from_zero(outputs: int) -> torch.nn.Module:
    model = build_model(logistic_regression(INPUTS, outputs))
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    return model


def plain(x: Tensor, y: Tensor) -> Tensor:
    return plain_training(
        from_zero(1), "binary_cross_entropy", x, y, LocalTraining(steps=1, learning_rate=0.3)
    )


def test_a_class_that_is_none_is_left_out() -> None:
    x, _ = rows(6)
    labels = torch.tensor([0, 1, 2, 9, -1, 1])
    training, kept = LocalTraining(steps=3, learning_rate=0.2), [0, 1, 2, 5]
    whole = plain_training(from_zero(3), "cross_entropy", x, labels, training)
    part = plain_training(from_zero(3), "cross_entropy", x[kept], labels[kept], training)
    assert torch.equal(whole, part)
    assert float(whole.norm()) > 0.01


@pytest.mark.parametrize("values", [[3e200, 4e200], [3e-200, 4e-200], [3.0, 4.0]])
def test_no_length_overflows_or_vanishes(values: list[float]) -> None:
    drawn = drawn_in(torch.tensor(values, dtype=torch.float64), 1.0)
    if values[0] < 1:
        assert drawn.tolist() == values
    else:
        assert drawn.tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_no_update(bad: float) -> None:
    assert drawn_in(torch.tensor([1.0, bad]), 1.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "terms",
    [
        {"sample_rate": 0.5},
        {"local_steps": 3, "local_learning_rate": 0.1, "normaliser": 1},
        {"rows_per_unit": 4},
        {"max_update_norm": 3.0},
    ],
    ids=lambda terms: next(iter(terms)),
)
def test_terms_of_rows_are_refused(terms: dict[str, Any]) -> None:
    with pytest.raises(TermsError):
        mechanism(**terms)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("proximal", 1.5),
        ("proximal", -1.0),
    ],
)
def test_training_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(TermsError):
        LocalTraining(**{"steps": 1, "learning_rate": 1.0, field: value})  # type: ignore[arg-type]


def test_float32_holds_the_same_bound() -> None:
    x, y = rows(80, reach=1e4)
    found = sent(x, y, rate=3.0, precision="float32")
    assert length(found) <= mechanism(precision="float32", relation="zero_out").sensitivity_grid
