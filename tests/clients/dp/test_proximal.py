"""FedProx: the pull back to the round's model reads no row, so the sensitivity stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.dp.errors import TermsError
from clients.dp.mechanism import Mechanism, MechanismTerms
from federation.torch_models import build_model

LAYERS = [{"layer": "linear", "in": 3, "out": 1, "bias": 1}]


def mechanism(recorded=None, **changes):
    given = {
        "max_grad_norm": 1.0,
        "noise_multiplier": 2.0,
        "sample_rate": 1.0,
        "relation": "add_remove",
        "grid_bits": 20,
        "local_steps": 5,
        "local_learning_rate": 0.5,
        "normaliser": 30.0,
    }
    note = None if recorded is None else lambda name, value: recorded.append((name, value))
    made = Mechanism(
        build_model(LAYERS), MechanismTerms(**given | changes), "binary_cross_entropy", recorder=note
    )
    made.load(torch.zeros(4, dtype=torch.float64))
    return made


def rows(count, seed=1):
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.normal(size=(count, 3))), torch.from_numpy(draw.integers(0, 2, count) * 1.0)


def test_the_release_is_what_fedprox_makes_of_the_noisy_sums():
    recorded = []
    release = mechanism(recorded, proximal=0.4).release(*rows(30))
    sums = [
        (total + noise).astype(float)
        for total, noise in zip(
            [v for name, v in recorded if name == "inside.sum"],
            [v for name, v in recorded if name == "inside.noise"],
            strict=True,
        )
    ]
    theta = np.zeros(4)
    for noisy in sums:
        theta = theta - 0.5 * (noisy / (30 * 2**20) + 0.4 * theta)
    assert release.update == pytest.approx(np.rint(theta * 2**20), abs=1)


def test_event_and_sensitivity_do_not_know_of_the_pull():
    plain, pulled = mechanism().release(*rows(30)), mechanism(proximal=0.9).release(*rows(30))
    for field in ("sigma_grid", "sensitivity_grid", "steps", "dimension", "sampling"):
        assert getattr(plain, field) == getattr(pulled, field)


@pytest.mark.parametrize("proximal", [0, 0.9])
def test_a_row_more_moves_each_noisy_sum_by_no_more_than_the_sensitivity(proximal):
    """The first sums differ by the row alone; later steps follow from noisy sums, as in a plain run."""
    inputs, targets = rows(30)
    with_row, without = [], []
    mechanism(with_row, proximal=proximal).release(inputs, targets)
    mechanism(without, proximal=proximal).release(inputs[:-1], targets[:-1])
    first = [next(v for name, v in told if name == "inside.sum") for told in (with_row, without)]
    gap = np.linalg.norm((first[0] - first[1]).astype(float))
    assert 0 < gap <= mechanism().sensitivity_grid


def test_a_full_pull_undoes_each_step_but_the_last():
    recorded = []
    release = mechanism(recorded, proximal=2).release(*rows(30))
    last = [v for name, v in recorded if name.startswith("inside.")][-2:]
    expected = -0.5 / 30 * (last[0] + last[1])
    assert release.update == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("proximal", [-0.1, 2.1, float("nan"), float("inf")])
def test_a_pull_that_would_overshoot_is_refused(proximal):
    with pytest.raises(TermsError, match="proximal"):
        mechanism(proximal=proximal)
