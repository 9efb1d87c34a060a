from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as oracle

from audit.metrics import (
    MetricError,
    accuracy,
    auc,
    baseline,
    evaluate,
    gate_passes,
    gate_result,
    mae,
    r2,
)

RNG = np.random.default_rng(3)
LABELS = [int(v) for v in RNG.integers(0, 2, 200)]
SCORES = [float(v) for v in RNG.integers(-4, 5, 200)]  # many ties


def test_metrics_equal_scikit_learn():
    values, guesses = RNG.normal(size=100).tolist(), RNG.normal(size=100).tolist()
    assert auc(LABELS, SCORES) == pytest.approx(oracle.roc_auc_score(LABELS, SCORES), abs=1e-12)
    predicted = [int(s > 0) for s in SCORES]
    assert accuracy(LABELS, predicted) == pytest.approx(oracle.accuracy_score(LABELS, predicted))
    assert mae(values, guesses) == pytest.approx(oracle.mean_absolute_error(values, guesses))
    assert r2(values, guesses) == pytest.approx(oracle.r2_score(values, guesses))


def test_constant_scores_have_the_auc_of_chance():
    assert auc(LABELS, [1.0] * 200) == 0.5


def test_the_last_bit_of_a_score_does_not_move_the_auc():
    assert auc([0, 1, 0, 1], [0.3, 0.1 + 0.2, 0.3, 0.3]) == 0.5


@pytest.mark.parametrize(
    "call",
    [
        lambda: auc([1, 1], [0.1, 0.2]),
        lambda: auc([0, 2], [0.1, 0.2]),
        lambda: auc([0, 1], [0.1]),
        lambda: auc([], []),
        lambda: auc([0, 1], [float("nan"), 1.0]),
        lambda: r2([1.0, 1.0], [1.0, 1.0]),
        lambda: baseline("f1", [1.0]),
        lambda: baseline("auc", []),
        lambda: evaluate("auc", "regression", {"name": "y", "lower": "0", "upper": "1"}, [1.0], [[0.0]]),
    ],
)
def test_an_undefined_metric_is_an_error(call):
    with pytest.raises(MetricError):
        call()


def test_baselines_need_no_model():
    assert baseline("accuracy", [0, 1, 1, 2, 1]) == 0.6
    assert baseline("mae", [0.0, 1.0, 5.0]) == pytest.approx((1 + 0 + 4) / 3)
    assert (baseline("auc", LABELS), baseline("r2", [1.0])) == (0.5, 0.0)


def test_a_gate_needs_its_floor_and_its_margin():
    both = {"metric": "auc", "floor": "0.8", "margin_over_baseline": "0.3"}
    assert gate_passes(both, value="0.85", trivial="0.5")
    assert not gate_passes(both, value="0.79", trivial="0.4")
    assert not gate_passes(both, value="0.82", trivial="0.53")
    error = {"metric": "mae", "floor": "2", "margin_over_baseline": "0.5"}
    assert gate_passes(error, value="1.5", trivial="2")
    assert not gate_passes(error, value="1.6", trivial="2")
    assert not gate_passes(error, value="2.1", trivial="9")


def test_gate_results_say_what_was_measured():
    label = {"name": "y", "classes": ["no", "yes"]}
    gate = {"metric": "accuracy", "source": "public_set", "margin_over_baseline": "0.1"}
    result = gate_result(gate, "ab" * 32, "binary", label, [0, 1, 1, 0], [[-1.0], [2.0], [3.0], [1.0]])
    assert (result.value, result.baseline, result.floor, result.passed) == ("0.75", "0.5", "0.6", 1)
    regression = {"name": "y", "lower": "0", "upper": "10"}
    gate = {"metric": "r2", "source": "public_set", "floor": "0.9"}
    result = gate_result(gate, "ab" * 32, "regression", regression, [0.0, 10.0], [[-1.0], [1.0]])
    assert (result.value, result.passed) == ("1", 1)
    multi = {"name": "y", "classes": ["a", "b", "c"]}
    assert evaluate("accuracy", "multiclass", multi, [2, 0], [[0.0, 0.1, 0.2], [0.0, 0.1, 0.2]]) == 0.5
