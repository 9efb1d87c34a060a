"""Each site's own table: what it reaches alone, with the federation's model, and with its personal one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from audit.verify import verify_evidence
from clients.errors import SimulationError
from clients.simulation import simulate

CHARTER = """
name: shifted
task: binary
features: [{name: x, type: number, lower: -3, upper: 3}, {name: z, type: number, lower: -3, upper: 3}]
label: {name: y, classes: ["no", "yes"]}
model:
  family: logistic_regression
  site_intercept: true
  local_layers: [1]
plan: {learning_rate: 6, local_learning_rate: 6, rounds: 8}
privacy: {unit: row, relation: add_remove, epsilon: 8, delta: 1e-5, max_grad_norm: 1, noise_multiplier: 3}
gates: [{metric: auc, margin_over_baseline: 0.05}]
"""
CUTS = {"high": 1.2, "low": -1.2, "mid": 0.0}


def frame(rows, cut, seed):
    """Each site calls another height ill, which no common model can know."""
    draw = np.random.default_rng(seed)
    x, z = draw.uniform(-3, 3, rows), draw.uniform(-3, 3, rows)
    labels = np.where(x + 0.3 * z > cut, "yes", "no")
    return pd.DataFrame({"x": x.round(3), "z": z.round(3), "y": labels})


@pytest.fixture(scope="module")
def run():
    sites = {name: frame(300, cut, seed) for seed, (name, cut) in enumerate(CUTS.items())}
    made = simulate(CHARTER, sites, public=frame(80, 0.0, 9))
    made.register()
    yield made
    made.close()


HELD_OUT = {name: frame(400, cut, 20 + seed) for seed, (name, cut) in enumerate(CUTS.items())}


def test_a_layer_that_stays_serves_the_sites_that_differ(run):
    table = run.by_site(HELD_OUT)
    assert table.index.tolist() == ["high", "low", "mid"]
    assert (table.loc[["high", "low"], "personal"] > table.loc[["high", "low"], "federated"] + 0.05).all()
    assert (table["local_only"] > table["trivial"]).all()
    assert (table["gain"] == table["personal"] - table["local_only"]).all()
    assert table["rows"].tolist() == [400, 400, 400]


def test_the_version_verifies_and_holds_no_site_s_layer(run):
    assert run.weights[-3:] == [0.0, 0.0, 0.0]
    report = verify_evidence(run.evidence(), policy_text=run.policy, replay=True)
    assert report.step("The aggregation").code == "ok"
    assert report.step("The rounds and their statements").code == "ok"


def test_another_metric_can_be_asked_for(run):
    table = run.by_site({"high": HELD_OUT["high"]}, metric="auc")
    assert table.loc["high", "metric"] == "auc"
    assert table.loc["high", "trivial"] == 0.5


@pytest.mark.parametrize(
    ("held_out", "metric", "said"),
    [({"elsewhere": HELD_OUT["mid"]}, None, "elsewhere"), ({"mid": HELD_OUT["mid"]}, "r2", "r2")],
)
def test_what_cannot_be_compared_is_refused(run, held_out, metric, said):
    with pytest.raises(SimulationError, match=said):
        run.by_site(held_out, metric=metric)
