"""Each site's own table: what it reaches alone, with the federation's model, and with its personal one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from audit.verify import verify_evidence
from clients.errors import SimulationError
from clients.home import SiteHome
from clients.local_layers import LocalLayers
from clients.local_prediction import LocalPredictionError, predict_here
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


# answers at the site itself


@pytest.fixture(scope="module")
def version(run):
    (completed,) = run.entries("run.completed")
    return run.federation.coordinator.blobs.get(completed.body.weights)


def rows_of(name):
    data = HELD_OUT[name]
    return data.drop(columns="y").to_csv(index=False).encode(), data["y"].tolist()


def test_a_site_answers_with_what_stayed_there(run, version):
    """The same shares of right answers as in the site's own table; another site's layers answer otherwise."""
    table = run.by_site(HELD_OUT)
    given = {}
    for name in ("high", "low"):
        rows, labels = rows_of(name)
        found = predict_here(SiteHome.open(run.federation.homes[name].path), run.id, version, rows)
        right = [answer["label"] == label for answer, label in zip(found.answers, labels, strict=True)]
        assert sum(right) / len(right) == pytest.approx(table.loc[name, "personal"], abs=0.003)
        assert found.version == run.version.digest
        assert found.own == ("local layers 1", "this site's intercept")
        given[name] = found.answers
    swapped = predict_here(run.federation.homes["low"], run.id, version, rows_of("high")[0])
    assert swapped.answers != given["high"]


def test_an_answer_at_the_site_leaves_no_trace_and_spends_nothing(run, version):
    home = run.federation.homes["high"]
    before = {path: path.read_bytes() for path in home.path.rglob("*.db")}
    entries = run.federation.coordinator.ledger.tree_size
    predict_here(home, run.id, version, b"x,z\n1,1\n")
    assert {path: path.read_bytes() for path in home.path.rglob("*.db")} == before
    assert run.federation.coordinator.ledger.tree_size == entries


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (b"x\n1\n", r"lacks \['z'\]"),
        (b"x,z,x\n1,1,1\n", "twice"),
        (b"x,z\n1,tall\n", "line 2"),
        (b"x,z\n1\n", "line 2"),
        (b"x,z\n", "no rows"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_rows_that_break_the_contract_are_named(run, version, rows, problem):
    with pytest.raises(LocalPredictionError, match=problem):
        predict_here(run.federation.homes["high"], run.id, version, rows)


def test_a_model_of_another_run_is_refused(run, version, tmp_path):
    home, rows = run.federation.homes["high"], b"x,z\n1,1\n"
    with pytest.raises(LocalPredictionError, match="accepted no run"):
        predict_here(home, "run-x", version, rows)
    with pytest.raises(LocalPredictionError, match="does not fit"):
        predict_here(home, run.id, version[:-1], rows)
    kept = LocalLayers(home.local_layers_path)
    moved = home.local_layers_path.rename(tmp_path / "away")
    try:
        assert kept.average(run.id, 8, 4) is None
        with pytest.raises(LocalPredictionError, match="nothing is kept here"):
            predict_here(home, run.id, version, rows)
    finally:
        moved.rename(home.local_layers_path)
