"""Every task, model, sampler, relation and unit trains end to end, and a stranger verifies the result."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from audit.verify import verify_evidence
from clients.simulation import simulate

LABELS = {
    "binary": '{name: y, classes: ["no", "yes"]}',
    "multiclass": "{name: y, classes: [low, middle, high]}",
    "regression": "{name: y, lower: -2, upper: 2}",
}
METRICS = {"binary": "auc", "multiclass": "accuracy", "regression": "mae"}

RECIPES = {
    "linear regression": ("regression", "{family: linear}", "", "", "row", "add_remove"),
    "intercept a site": (
        "multiclass", "{family: logistic_regression, site_intercept: true}", "", "", "row", "zero_out",
    ),
    "local steps": (
        "binary",
        "{family: mlp, hidden: [6]}",
        ", local_steps: 3, local_learning_rate: 0.5",
        ", sample_rate: 0.5",
        "row",
        "add_remove",
    ),
    "images": ("binary", "{family: cnn, image: [1, 2, 2], channels: [2]}", "", "", "row", "replace_one"),
    "adam": ("multiclass", "{family: mlp, hidden: [6]}", ", strategy: fedadam", "", "row", "add_remove"),
    "subjects": (
        "binary",
        "{family: logistic_regression}",
        ", strategy: fedyogi",
        ", subject_id: who, max_rows_per_subject: 2",
        "subject",
        "add_remove",
    ),
}  # fmt: skip


def rows(count, seed, task):
    random = np.random.default_rng(seed)
    inputs = random.uniform(-1, 1, (count, 4))
    score = inputs[:, 0] + inputs[:, 1]
    frame = pd.DataFrame(inputs, columns=list("abcd"))
    if task == "binary":
        frame["y"] = np.where(score > 0, "yes", "no")
    elif task == "multiclass":
        frame["y"] = np.select([score > 0.4, score < -0.4], ["high", "low"], "middle")
    else:
        frame["y"] = score
    frame["who"] = [f"person {n // 2}" for n in range(count)]
    return frame


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_is_approved_and_verifies(name):
    task, model, plan, privacy, unit, relation = RECIPES[name]
    charter = f"""
name: recipe
task: {task}
features: [{", ".join(f"{{name: {c}, type: number, lower: -1, upper: 1}}" for c in "abcd")}]
label: {LABELS[task]}
model: {model}
plan: {{learning_rate: 0.5, rounds: 2{plan}}}
privacy:
  {{unit: {unit}, relation: {relation}, epsilon: 8, delta: 1e-5, max_grad_norm: 1, noise_multiplier: 2,
   grid_bits: 26{privacy}}}
gates: [{{metric: {METRICS[task]}, floor: {5 if task == "regression" else 0.01}}}]
"""
    sites = {f"site-{n}": rows(80 + 30 * n, n, task) for n in range(3)}
    run = simulate(charter, sites, public=rows(100, 9, task))
    run.register()
    assert run.approve().state == "live"
    report = verify_evidence(run.evidence(), policy_text=run.policy, replay=True)
    assert report.verdict == "VALID", [(s.title, s.word, s.detail) for s in report.steps if s.word == "FAIL"]
    assert run.epsilons["run_epsilon"].le(8).all()
    run.close()
