"""Every task, model family, strategy and kind of release, from rows to a verified version, replay included.

Each case trains a real federation for a few rounds (agents, ledgers, log, witnesses, Flower's objects), lets
the version pass its gates, has it approved, and hands the evidence to the verifier.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from audit.verify import verify_evidence
from clients.simulation import simulate

PIXELS = [f"p{i:02}" for i in range(16)]


def tabular(rows: int, *, task: str, seed: int) -> pd.DataFrame:
    """Rows with a number, a skewed number, a flag and a category, and a label that follows from them."""
    draw = np.random.default_rng(seed)
    age = draw.uniform(20, 90, rows)
    dose = draw.lognormal(1.0, 0.7, rows).clip(0.2, 80)
    smoker = draw.integers(0, 2, rows).astype(bool)
    ward = draw.choice(["a", "b", "c"], rows)
    score = (age - 55) / 20 + np.log(dose) - 1 + smoker + (ward == "c")
    frame = pd.DataFrame({"age": age.round(1), "dose": dose.round(3), "smoker": smoker, "ward": ward})
    if task == "regression":
        frame["outcome"] = (50 + 10 * score).clip(0, 100).round(2)
    elif task == "binary":
        frame["outcome"] = np.where(score > 0.5, "ill", "well")
    else:
        frame["outcome"] = np.select([score < 0, score < 1.2], ["low", "mid"], "high")
    return frame


def pictures(rows: int, *, seed: int) -> pd.DataFrame:
    """4 by 4 pictures of a bright row (r) or column (c)."""
    draw = np.random.default_rng(seed)
    kind = draw.integers(0, 2, rows)
    images = draw.uniform(0, 0.3, (rows, 4, 4))
    for image, shape in zip(images, kind, strict=True):
        line = draw.integers(0, 4)
        if shape:
            image[:, line] += 0.7
        else:
            image[line, :] += 0.7
    frame = pd.DataFrame(images.reshape(rows, 16).round(4), columns=PIXELS)
    frame["outcome"] = np.where(kind == 1, "column", "row")
    return frame


TABULAR: list[dict[str, Any]] = [
    {"name": "age", "unit": "years", "lower": 0, "upper": 110},
    {"name": "dose", "unit": "mg", "lower": 0.2, "upper": 80, "transform": "log"},
    {"name": "smoker", "type": "boolean"},
    {"name": "ward", "type": "category", "categories": ["a", "b", "c"]},
]
IMAGE: list[dict[str, Any]] = [{"name": name, "lower": 0, "upper": 1} for name in PIXELS]
LABELS: dict[str, dict[str, Any]] = {
    "binary": {"name": "outcome", "classes": ["well", "ill"]},
    "multiclass": {"name": "outcome", "classes": ["low", "mid", "high"]},
    "regression": {"name": "outcome", "lower": 0, "upper": 100},
    "image": {"name": "outcome", "classes": ["row", "column"]},
}

# every noise is written out: finding one is what tests/federation/test_accounting.py is about
CASES: dict[str, dict[str, Any]] = {
    "binary, logistic regression, Poisson sampling": {
        "task": "binary",
        "model": {"family": "logistic_regression"},
        "plan": {"rounds": 2, "learning_rate": 4},
        "privacy": {"sample_rate": 0.5, "noise_multiplier": 3},
        "metric": "auc",
    },
    "multiclass, linear with an intercept per site, FedAdam, zero-out": {
        "task": "multiclass",
        "model": {"family": "logistic_regression", "site_intercept": True},
        "plan": {"rounds": 2, "learning_rate": 0.3, "strategy": "fedadam"},
        "privacy": {"relation": "zero_out"},
        "metric": "accuracy",
    },
    "regression, perceptron, FedYogi, replace-one": {
        "task": "regression",
        "model": {"family": "mlp", "hidden": [6], "activation": "tanh"},
        "plan": {"rounds": 2, "learning_rate": 0.2, "strategy": "fedyogi"},
        "privacy": {"relation": "replace_one", "grid_bits": 26},
        "metric": "mae",
    },
    "regression, linear, zero-out, local steps": {
        "task": "regression",
        "model": {"family": "linear"},
        "plan": {"rounds": 2, "learning_rate": 1, "local_steps": 3, "local_learning_rate": 0.5},
        "privacy": {"relation": "zero_out"},
        "metric": "r2",
    },
    "binary, small CNN, local steps with Poisson sampling": {
        "task": "image",
        "model": {"family": "cnn", "image": [1, 4, 4], "channels": [3]},
        "plan": {"rounds": 2, "learning_rate": 1, "local_steps": 2, "local_learning_rate": 0.5},
        "privacy": {"sample_rate": 0.3, "noise_multiplier": 3},
        "metric": "accuracy",
    },
    "multiclass, layers written out, float32": {
        "task": "multiclass",
        "model": {
            "family": "layers",
            "layers": [
                {"layer": "linear", "in": 6, "out": 8, "bias": True},
                {"layer": "layer_norm", "size": 8},
                {"layer": "gelu"},
                {"layer": "linear", "in": 8, "out": 3, "bias": True},
            ],
        },
        "plan": {"rounds": 2, "learning_rate": 1},
        "privacy": {"precision": "float32"},
        "metric": "accuracy",
    },
    "binary, a subject with several rows, FedYogi": {
        "task": "binary",
        "model": {"family": "logistic_regression"},
        "plan": {"rounds": 2, "learning_rate": 0.5, "strategy": "fedyogi"},
        "privacy": {"unit": "subject", "subject_id": "patient", "max_rows_per_subject": 2},
        "metric": "auc",
    },
}


def charter_of(case: dict[str, Any]) -> dict[str, Any]:
    image = case["task"] == "image"
    privacy = {
        "unit": "row", "relation": "add_remove", "epsilon": 8, "delta": 0.0001, "max_grad_norm": 1,
        "noise_multiplier": 2,
    }  # fmt: skip
    return {
        "affidavit": 1,
        "name": "trial",
        "task": "binary" if image else case["task"],
        "features": IMAGE if image else TABULAR,
        "label": LABELS[case["task"]],
        "model": case["model"],
        "plan": case["plan"],
        "privacy": privacy | case.get("privacy", {}),
        # a floor that any weights pass: what is tested here is the chain, not the model
        "gates": [{"metric": case["metric"], "floor": 1000 if case["metric"] == "mae" else -1000}],
        "purposes": ["trial"],
    }


def data_of(case: dict[str, Any], rows: int, seed: int) -> pd.DataFrame:
    if case["task"] == "image":
        return pictures(rows, seed=seed)
    frame = tabular(rows, task=case["task"], seed=seed)
    if case.get("privacy", {}).get("unit") == "subject":
        frame["patient"] = [f"p{i // 3}" for i in range(rows)]  # three rows each, one more than may count
    return frame


@pytest.mark.parametrize("name", CASES)
def test_it_trains_registers_goes_live_and_verifies(name: str) -> None:
    case = CASES[name]
    sites = {f"site-{i}": data_of(case, 40 + 10 * i, seed=i) for i in range(3)}
    run = simulate(charter_of(case), sites, public=data_of(case, 60, seed=9))
    run.register()
    assert run.approve().state == "live"
    assert run.epsilons["run_epsilon"].between(0, 8, inclusive="right").all()

    report = verify_evidence(run.evidence(), policy_text=run.policy, replay=True)
    words = {step.title: (step.word, step.detail) for step in report.steps}
    assert words["The aggregation"][0] == "PROVED", words["The aggregation"]
    assert words["The model's weights"][0] == "PROVED", words["The model's weights"]
    assert words["Epsilon"][0] == "PROVED", words["Epsilon"]
    assert words["The gates"][0] == "PROVED", words["The gates"]
    assert report.verdict == "VALID", [words[step.title] for step in report.steps if step.word == "FAIL"]
    run.close()
