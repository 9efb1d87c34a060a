"""Every task, model family, strategy and kind of release, from rows to a verified version, replay included.

Each case trains a real federation for a few rounds (agents, ledgers, log, witnesses, Flower's objects), lets
the version pass its gates, has it approved, and hands the evidence to the verifier.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from audit.service import export_evidence
from audit.verify import verify_evidence
from clients.service import federation_policy
from clients.simulated import SimulatedRun
from clients.simulation import simulate
from federation.registry import last_transition

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

CASES: dict[str, dict[str, Any]] = {
    "binary, logistic regression, Poisson sampling": {
        "task": "binary",
        "model": {"family": "logistic_regression"},
        "plan": {"rounds": 3, "learning_rate": 4},
        "privacy": {"sample_rate": 0.5, "noise_multiplier": 3},
        "metric": "auc",
    },
    "multiclass, linear with an intercept per site, FedAdam": {
        "task": "multiclass",
        "model": {"family": "logistic_regression", "site_intercept": True},
        "plan": {"rounds": 3, "learning_rate": 0.3, "strategy": "fedadam"},
        "metric": "accuracy",
    },
    "regression, perceptron, FedYogi, replace-one": {
        "task": "regression",
        "model": {"family": "mlp", "hidden": [6], "activation": "tanh"},
        "plan": {"rounds": 3, "learning_rate": 0.2, "strategy": "fedyogi"},
        "privacy": {"relation": "replace_one"},
        "metric": "mae",
    },
    "regression, linear, zero-out, local steps": {
        "task": "regression",
        "model": {"family": "linear"},
        "plan": {"rounds": 3, "learning_rate": 1, "local_steps": 3, "local_learning_rate": 0.5},
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
    "binary, a subject with several rows": {
        "task": "binary",
        "model": {"family": "logistic_regression"},
        "plan": {"rounds": 2, "learning_rate": 4},
        "privacy": {"unit": "subject", "subject_id": "patient", "max_rows_per_subject": 2},
        "metric": "auc",
    },
}


def charter_of(case: dict[str, Any]) -> dict[str, Any]:
    image = case["task"] == "image"
    privacy = {"unit": "row", "relation": "add_remove", "epsilon": 8, "delta": 0.0001, "max_grad_norm": 1}
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


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name)
def run(request: pytest.FixtureRequest) -> Any:
    case = CASES[request.param]
    sites = {f"site-{i}": data_of(case, 40 + 10 * i, seed=i) for i in range(3)}
    done = simulate(charter_of(case), sites, public=data_of(case, 60, seed=9))
    yield done
    done.close()


def test_it_trains_registers_goes_live_and_verifies(run: SimulatedRun) -> None:
    run.register()
    version = run.approve()
    assert version.state == "live"
    coordinator = run.federation.coordinator
    collected = {name: home.keys().witness_signer(name).vkey for name, home in run.federation.homes.items()}
    policy = federation_policy(coordinator.log_key, collected).format()

    leaf = last_leaf_of(run, last_transition(coordinator.ledger, version.model))
    coordinator.publish()
    data = export_evidence(coordinator.ledger, coordinator.blobs.find, leaf_index=leaf)
    report = verify_evidence(data, policy_text=policy, replay=True)
    words = {step.title: (step.word, step.detail) for step in report.steps}
    assert words["The aggregation"][0] == "PROVED", words["The aggregation"]
    assert words["The model's weights"][0] == "PROVED", words["The model's weights"]
    assert words["Epsilon"][0] == "PROVED", words["Epsilon"]
    assert words["The gates"][0] == "PROVED", words["The gates"]
    assert not [step for step in report.steps if step.word == "FAIL"]


def last_leaf_of(run: SimulatedRun, leaf_hash: str) -> int:
    found = run.federation.coordinator.ledger.search(type="version.transition")
    return next(stored.leaf_index for stored in found if stored.leaf_hash.hex() == leaf_hash)
